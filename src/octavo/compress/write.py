"""Files written stage by stage, and what there is to say of them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.checkpoint.resume import ResumableWriter
from octavo.compress.files import File, Written
from octavo.compress.finetune import Result
from octavo.compress.layers import quantized_layers
from octavo.compress.progress import Report
from octavo.compress.stages import Batch, Stages
from octavo.devices import whole_processor
from octavo.quantize import Sensitivity


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What was done."""

    source: Path
    source_bytes: int
    files: tuple[Written, ...]
    seconds: float
    resumed: bool  # whether the work of an interrupted job was gone on with
    sensitivity: Sensitivity | None
    finetuned: Result | None  # what training came to


@torch.inference_mode()
@whole_processor()
def write_files(stream: Stages, files: Sequence[File], batches: Sequence[Batch], report: Report) -> None:
    """Copy what stays and quantize the rest, block by block; what a stopped job has written is not made again.

    Args:
        batches: to calibrate on, at the beginning of the model.
    """
    with ExitStack() as stack:
        opened = [
            (file, stack.enter_context(ResumableWriter(file.part, file.output.layout, file.output.metadata)))
            for file in files
            if not file.complete
        ]
        # Those that even outliers out work on copies; the last one takes the batches through the original.
        opened.sort(key=lambda each: not each[0].recipe.equalize)
        total, done = sum(file.output.nbytes for file, _ in opened), 0

        def wrote(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            report("write", done, total)

        for file, writer in opened:
            wrote(sum(map(file.nbytes_of, writer.done)))
            file.output.copy(writer, wrote)
        calibrated = any(file.recipe.needs_calibration for file, _ in opened)
        if not calibrated:
            batches = ()
        for stage in stream.stages if opened else ():
            for i, (file, writer) in enumerate(opened):
                missing = set(file.output.missing(writer))
                names = [name for name in stream.linears(stage) if name in missing]
                last = i == len(opened) - 1
                for name, layer in quantized_layers(stream, stage, batches, file.recipe, names, advance=last):
                    file.output.write(writer, name, layer)
                    wrote(sum(map(file.nbytes_of, file.output.layers[name])))
