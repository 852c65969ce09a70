"""How many threads a CPU's products take: what the user says, else what a short trial on this machine found.

torch's own number is that of the machine's cores. It does not know of a container that may keep only some of them
busy, and two cores that share one unit of arithmetic may be faster alone or together. What a trial found lies in
`threads.json` in the cache folder, by processor, cores and torch; delete it to have it tried again.
"""

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import active_count

import torch
from torch import nn

from octavo.devices import device_name, keep_freed_memory
from octavo.errors import RequestError
from octavo.fp8.timing import cache_folder

logger = logging.getLogger(__name__)

FILE = "threads.json"
LARGE = 1 << 28  # weights of a model, from which on a trial takes less time than it saves


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """How many threads a CPU's products take, and why."""

    count: int
    why: str


def take_threads(given: int | None, device: torch.device, *, measure: bool = False, lean: bool = False) -> None:
    """Let a CPU multiply with so many threads, or with as many as are best, and keep the memory of a step for the next.

    Call it before weights are read, and before the thread that is to do the work has asked torch for anything: each
    keeps the number that it found then. The calling thread and those to come take the new one.

    Args:
        given: what the user asks for.
        device: where the work is done.
        measure: as of `pick_threads`.
        lean: give memory back to the system as it is freed; for work that is to be small rather than quick.

    Raises:
        RequestError: as `check_threads`.
    """
    check_threads(given, device)
    if device.type == "cpu":
        use_threads(pick_threads(given, measure=measure))
        if not lean:
            keep_freed_memory()


def check_threads(given: int | None, device: torch.device) -> None:
    """Refuse at once what cannot be heeded.

    Raises:
        RequestError: fewer threads than one, more than could ever help, or any number where the work is not a CPU's.
    """
    if given is None:
        return
    if device.type != "cpu":
        raise RequestError(f"--threads is about CPUs, and this is on '{device}'. Leave it out.")
    most = 4 * (os.cpu_count() or 1)
    if not 1 <= given <= most:
        raise RequestError(f"--threads {given}: choose 1 to {most} on this machine of {os.cpu_count()} cores.")


def is_large(model: nn.Module) -> bool:
    """Whether a trial of a fraction of a second pays for `model`, which may be on the meta device."""
    return sum(weight.numel() for weight in (*model.parameters(), *model.buffers())) >= LARGE


def pick_threads(given: int | None = None, *, measure: bool = False) -> Threads:
    """How many threads to multiply with on a CPU; sets nothing.

    What the user says comes first, then OMP_NUM_THREADS, then what a trial found. Without a trial it is torch's own
    number, or that of the cores allowed here if they are fewer.

    Args:
        given: what the user asks for.
        measure: whether a trial, of a fraction of a second, pays where none is on record: it does for large models.

    Raises:
        RequestError: as `check_threads`.
    """
    if given is not None:
        check_threads(given, torch.device("cpu"))
        return Threads(count=given, why="as asked")
    now = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS"):
        return Threads(count=now, why="by OMP_NUM_THREADS")
    allowed = allowed_cores()
    counts = sorted({min(count, allowed) for count in (now, physical_cores(), allowed)})
    if len(counts) == 1:
        (count,) = counts
        return Threads(count=count, why="one for each core" if count == now else "one for each core allowed here")
    known = _trials().get(_machine(counts))
    if known in counts:
        return Threads(count=known, why="as a trial on this machine found")
    count = min(now, allowed)
    if not measure:
        return Threads(count=count, why="not tried out yet")
    if active_count() > 1:
        return Threads(count=count, why="not tried out, since other threads are at work")
    found = _fastest(counts)
    _keep_trial(_machine(counts), found)
    return Threads(count=found, why=f"the fastest of {', '.join(map(str, counts))} in a trial")


def use_threads(picked: Threads) -> None:
    """Let torch take so many from now on, in threads to come, too."""
    if picked.count != torch.get_num_threads():
        torch.set_num_threads(picked.count)
    logger.info("%d threads: %s.", picked.count, picked.why)


def allowed_cores() -> int:
    """Cores that this process may keep busy: of those it may run on, as many as its control group pays for."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota - 0.01)))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores that the control group of this process, or one around it, may use at most; None where nothing is said."""
    try:
        lines = groups.read_text("ascii").splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        for folder in _upwards(top, path):
            quotas += _quota(folder)
    return min(quotas, default=None)


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """The group's folder and those around it; in a container the path may begin outside of what is mounted."""
    folder = top / path.strip("/")
    yield from (each for each in (folder, *folder.parents) if each == top or top in each.parents)


def _quota(folder: Path) -> list[float]:
    try:
        if (folder / "cpu.max").exists():  # version 2: "200000 100000", or "max 100000"
            quota, period = (folder / "cpu.max").read_text("ascii").split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text("ascii") for name in ("quota", "period"))
        return [float(quota) / float(period)] if quota != "max" and float(quota) > 0 else []
    except (OSError, ValueError):
        return []


def physical_cores() -> int:
    """Cores with a unit of arithmetic of their own among those this process may run on."""
    try:
        siblings = {
            Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text("ascii")
            for core in os.sched_getaffinity(0)
        }
    except (AttributeError, OSError):
        return os.cpu_count() or 1
    return len(siblings)


def _fastest(counts: Sequence[int]) -> int:
    """Which number of threads takes the least for a product and the small steps around it, each tried in turns."""
    x, weight = torch.ones(512, 2048), torch.ones(2048, 2048)
    before, seconds = torch.get_num_threads(), dict[int, list[float]]()
    try:
        for _ in range(4):
            for count in counts:
                torch.set_num_threads(count)
                start = time.perf_counter()
                for _ in range(2):
                    torch.nn.functional.gelu(torch.nn.functional.linear(x, weight)).add_(x)
                seconds.setdefault(count, []).append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    # The first round of each wakes its threads. Of equals the fewer: the others may serve someone else.
    best = min(min(each[1:]) for each in seconds.values())
    return next(count for count in counts if min(seconds[count][1:]) <= 1.03 * best)


def _machine(counts: Sequence[int]) -> str:
    return f"{device_name(torch.device('cpu'))}, {' or '.join(map(str, counts))} threads, torch {torch.__version__}"


def _trials() -> dict[str, int]:
    try:
        held = json.loads((cache_folder() / FILE).read_text("utf-8"))
        return {machine: count for machine, count in held.items() if isinstance(count, int) and count > 0}
    except (OSError, ValueError, AttributeError):
        return {}


def _keep_trial(machine: str, count: int) -> None:
    """Add it to the file in one stroke; where nothing can be written, the next process tries again."""
    path = cache_folder() / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            json.dump({**_trials(), machine: count}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        logger.info("The number of threads that was found is not kept: %s", error)
