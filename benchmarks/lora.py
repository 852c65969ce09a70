"""LoRAs on the embedded model: how long a change of LoRAs takes, and what one costs at each step.

    python -m benchmarks.lora                     # rank 16 on attention and MLPs of all blocks
    python -m benchmarks.lora --model octavo-demo-fp8 --repeats 10

`lora_switch`: a request with a LoRA that was never read, from its prompt to the end of its first step, less the same
with a LoRA that is in use already: reading the file, placing it, new tables of modulation. `lora_step` is a step of two
rows of 128x128 pixels with a LoRA, `lora_step_without` the same without; `lora_step_ratio` compares them in turns. On a
CPU these are the seconds of its one thread (OMP_NUM_THREADS=1), whatever else runs.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import Timing, interleave, ratio, report
from octavo import GenerateRequest, load
from octavo.checkpoint.lora_form import tensors_of
from octavo.checkpoint.save import save_safetensors
from octavo.models import MMDiT
from octavo.pipeline.components import Components
from octavo.pipeline.denoise import Question, denoise
from octavo.pipeline.generate import prepare, start
from octavo.pipeline.request import Lora, resolve
from octavo.pipeline.run import Walk
from octavo.train.branches import Branches


def write_files(mmdit: MMDiT, folder: Path, count: int, rank: int) -> list[Path]:
    """LoRA files as training writes them, random."""
    paths = []
    for seed in range(count):
        branches = Branches(mmdit, layers="blocks", rank=rank, alpha=rank, seed=seed)
        for name, parameter in branches.named_parameters():
            if name.endswith("up"):
                torch.nn.init.normal_(parameter, std=0.01)
        tensors = tensors_of(branches.changes(), "diffusers", depth=len(mmdit.joint_blocks), dtype=torch.bfloat16)
        paths.append(folder / f"{seed}.safetensors")
        save_safetensors(paths[-1], tensors)
    return paths


def question(components: Components, *loras: Lora) -> Question:
    """What the first step of a run with these LoRAs asks."""
    request = GenerateRequest(prompt="a red star on blue", seed=1, loras=loras)
    job = resolve(request, components.preset, model=components.name, max_side=components.max_side)
    found = Walk(start(components, job, prepare(components, job))).question
    assert found is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    components = load(arguments.model)
    mmdit, repeats = components.mmdit(), arguments.repeats
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        paths = write_files(mmdit, Path(folder), repeats + 3, arguments.rank)
        used, fresh = Lora(str(paths[0])), iter(paths[1:])
        plain, changed = question(components), question(components, used)
        times = interleave(
            {
                "other": lambda: denoise(mmdit, [question(components, Lora(str(next(fresh))))]),
                "same": lambda: denoise(mmdit, [question(components, used)]),
                "with": lambda: denoise(mmdit, [changed]),
                "without": lambda: denoise(mmdit, [plain]),
            },
            warmup=2,
            repeats=repeats,
            clock=time.perf_counter if components.device.type == "cuda" else time.thread_time,
        )
    conditions = {"model": components.name, "rank": arguments.rank, "dtype": str(components.dtype)}
    switch = Timing(tuple(a - b for a, b in zip(times["other"].seconds, times["same"].seconds, strict=True)))
    report("lora_switch", "s", switch, **conditions)
    report("lora_step", "s", times["with"], **conditions)
    report("lora_step_without", "s", times["without"], **conditions)
    report("lora_step_ratio", "1", ratio(times["with"], times["without"]), **conditions)


if __name__ == "__main__":
    main()
