"""Compile the Triton kernels of `octavo.fp8.kernels` for GPUs that need not be here, and tell what each would take.

Triton brings NVIDIA's assembler, so a machine without a GPU can see that a kernel compiles, how many registers it takes
and whether any of them spill to memory; how fast it is, it cannot see. One line of JSON for each kernel and processor.

    python -m benchmarks.fused_compile                # 8.0 (A100), 8.9 (RTX 40xx, L4), 9.0 (H100, H200)
    python -m benchmarks.fused_compile --capability 90
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH, HIDDEN = 2432, 9728  # of SD3.5 Large
CAPABILITIES = (80, 89, 90)
NATIVE = 89  # from here on the processor converts to e4m3fn
FLOATS = ("eps", "fit")  # arguments that are numbers of 32 bits; others count or step


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel as it is launched."""

    what: str
    kernel: Any
    pointers: Mapping[str, str]  # type of what each points to
    constants: Mapping[str, object]
    warps: int
    stages: int | None = None  # loads in flight; Triton's default if None


def cases(capability: int) -> Iterator[Case]:
    """Every kernel, as SD3.5 Large launches it."""
    import triton

    from octavo.fp8.kernels import gelu, heads, modulate, quantize, residual
    from octavo.fp8.kernels.launch import warps

    native, block = capability >= NATIVE, triton.next_power_of_2(WIDTH)
    tokens = dict.fromkeys(("x", "gate", "branch", "new", "shift_a", "scale_a", "shift_b", "scale_b"), "bf16")
    floats = dict.fromkeys(("given_a", "scales_a", "given_b", "scales_b"), "fp32")
    forms = {0: ("bf16", 0.0), 1: ("u8", 448.0), 2: ("i8", 127.0)}
    for form, (code, largest) in forms.items():
        for gated, two in ((False, False), (False, True), (True, False)):
            constants: dict[str, object] = {"RESIDUAL": gated, "TWO": two, "NATIVE": native, "BLOCK": block}
            for side in "AB":
                constants |= {f"FORM_{side}": form, f"GIVEN_{side}": False, f"EACH_{side}": 0}
                constants[f"LARGEST_{side}"] = largest
            pointers = {**tokens, **floats, "out_a": code, "out_b": code}
            what = ("residual, " if gated else "") + ("two norms" if two else "norm") + f" into {code}"
            yield Case(what, modulate._norm_rows, pointers, constants, warps(block))
    given = {**constants, "FORM_A": 1, "GIVEN_A": True, "EACH_A": 1, "LARGEST_A": 448.0}
    yield Case("norm by given scales", modulate._norm_rows, {**pointers, "out_a": "u8"}, given, warps(block))
    for form in (1, 2):
        code, largest = forms[form]
        rows = {"INTEGER": form == 2, "EACH": 0, "NATIVE": native, "LARGEST": largest}
        for calibrated in (False, True):
            pointers = {"x": "bf16", "q": code, "scales": "fp32", "given": "fp32"}
            constants = {**rows, "GIVEN": calibrated, "BLOCK": gelu.BLOCK}
            yield Case(f"GELU into {code}", gelu._gelu_rows, pointers, constants, warps(gelu.BLOCK))
        launches = [(WIDTH, False), (HIDDEN, False), *([(WIDTH, True)] if form == 1 else [])]
        for columns, calibrated in launches:
            part, count = quantize.part_of(columns)
            constants = {**rows, "GIVEN": calibrated, "BLOCK": part}
            what = f"rows of {columns} into {code}" + (" by a given scale" if calibrated else "")
            yield Case(what, quantize._quantize_rows, pointers, constants, count)
    pointers = dict.fromkeys(("x", "gate", "branch", "new"), "bf16")
    yield Case("residual", residual._residual, pointers, {"BLOCK": residual.BLOCK}, residual.WARPS)
    for normed in (True, False):
        pointers = dict.fromkeys(("qkv", "of_q", "of_k", "out"), "bf16")
        constants = {"NORM_Q": normed, "NORM_K": normed, "TOKENS": heads.TOKENS, "BLOCK": 64}
        yield Case("heads" if normed else "heads without norms", heads._heads, pointers, constants, heads.WARPS)


def compiled(case: Case, capability: int) -> dict[str, object]:
    """What the kernel takes on this processor."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    for name in case.kernel.arg_names:
        pointer = case.pointers.get(name)
        number = "constexpr" if name in case.constants else "fp32" if name in FLOATS else "i32"
        signature[name] = f"*{pointer}" if pointer else number
    # Addresses, widths and strides of SD3.5 are multiples of 16, which lets loads take 16 bytes at once.
    even = [i for i, kind in enumerate(signature.values()) if kind not in ("constexpr", "fp32")]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=dict(case.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in even},
    )
    options = {"num_warps": case.warps} | ({} if case.stages is None else {"num_stages": case.stages})
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _usage(binary.asm["cubin"])
    return {"registers": usage["REG"], "stack_bytes": usage["STACK"], "wide_loads": _wide(binary.asm["ptx"])}


def _usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, stdout=subprocess.PIPE, text=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", told.stdout)}


def _wide(ptx: str) -> int:
    return len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx))


def main() -> None:
    """Print one JSON line for each kernel and processor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="*", default=CAPABILITIES, help="such as 90")
    for capability in parser.parse_args().capability:
        for case in cases(capability):
            figures = compiled(case, capability)
            print(json.dumps({"kernel": case.what, "capability": capability, "warps": case.warps, **figures}))


if __name__ == "__main__":
    main()
