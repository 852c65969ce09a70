"""Triton's interpreter takes what its compiler refuses: kernels are compiled for a GPU that is not here, too."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRITON = importlib.util.find_spec("triton")
ASSEMBLER = (
    TRITON is not None and TRITON.origin is not None and Path(TRITON.origin).with_name("backends") / "nvidia/bin"
)


@pytest.mark.skipif(not (ASSEMBLER and (ASSEMBLER / "ptxas").exists()), reason="triton came without NVIDIA's assembler")
@pytest.mark.parametrize(("module", "kernels"), [("fused_compile", 22), ("attention_compile", 11)])
def test_every_kernel_compiles_for_an_h200_and_keeps_its_numbers_in_registers(
    module: str, kernels: int, tmp_path: Path
) -> None:
    """In a process of its own: where the interpreter is on, nothing can be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", "--capability", "90"],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(lines) == kernels
    for line in lines:
        assert line["stack_bytes"] == 0, f"{line['kernel']} spills"
        assert line["wide_loads"] > 0, f"{line['kernel']} reads 16 bits at a time"
