"""What a report says of the machine, and how much memory the work took."""

from __future__ import annotations

import contextlib
import os
import platform
from typing import Any

import torch

from octavo._version import __version__


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, accelerator and versions, as plain data."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "octavo": __version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["accelerator"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        facts["cuda"] = torch.version.cuda
    return facts


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def forget_peaks(device: torch.device) -> None:
    """Begin to count peak memory anew, on the host where the system lets a process do so (Linux)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def host_peak() -> int:
    """Most bytes that this process held in memory (resident) since `forget_peaks`; since its start where not Linux."""
    try:
        # Not `ru_maxrss`: it cannot be reset, and on Linux a child inherits it.
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_peak(device: torch.device) -> int | None:
    """Most bytes that torch held on `device` since `forget_peaks`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
