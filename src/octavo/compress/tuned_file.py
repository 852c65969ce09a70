"""The fine-tuned student as a file: all of the old one, with other scales, biases and branches."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from octavo._version import __version__
from octavo.checkpoint import octavo_form
from octavo.checkpoint.octavo_form import DOWN, UP
from octavo.checkpoint.plan import Plan
from octavo.checkpoint.rewrite import as_it_is, copy, layout_of, made
from octavo.checkpoint.save import Writer
from octavo.checkpoint.tensors import TensorFile, torch_dtype
from octavo.compress.student import Trained
from octavo.errors import RequestError

KEY = "octavo.finetune"  # of the header: how the file was fine-tuned, JSON


def check_student(plan: Plan) -> None:
    """Refuse a file that cannot be written again with other scales.

    Raises:
        RequestError: it has no FP8 layers, is not in Octavo's form, or has scales by block.
    """
    located = plan.located
    name = located.file.path.name
    if not plan.fp8_linears:
        raise RequestError(f"The student '{name}' has no FP8 weights; make it by 'octavo quantize' first.")
    forms = octavo_form.read_forms(located.file)
    if len(located.file.headers) != 1 or located.part.style != "single-file" or not forms:
        raise RequestError(
            f"The student '{name}' is FP8 of another form ({plan.fp8_form}); only single files in Octavo's form, which "
            "'octavo quantize --format octavo' writes, can be fine-tuned."
        )
    if any(form.granularity == "block" for form in forms.values()):
        raise RequestError(f"The student '{name}' has scales by block, which are not trained; quantize it by row.")


def file_dtype(plan: Plan) -> torch.dtype:
    """The dtype of biases and branches in the student's file: that of its FP8 layers' biases, 16 bits as a rule."""
    entries, prefix = plan.located.file.entries, plan.located.part.prefix
    names = [f"{prefix}{name}.bias" for name in plan.fp8_linears if f"{prefix}{name}.bias" in entries]
    return torch_dtype(entries[names[0]]) if names else torch.float16


def write_tuned(path: Path, plan: Plan, layers: Mapping[str, Trained], said: Mapping[str, object]) -> None:
    """Write the student with what it has learnt, all or nothing.

    Args:
        path: of the new file.
        plan: of the old one.
        layers: what became of each layer, by name.
        said: how, for the header.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to.
    """
    file, prefix = plan.located.file, plan.located.part.prefix
    forms = dict(octavo_form.read_forms(file))
    new: dict[str, Tensor] = {}
    for name, layer in layers.items():
        full = prefix + name
        if layer.bias is not None:
            new[f"{full}.bias"] = layer.bias.to(torch_dtype(file.entries[f"{full}.bias"]))
        if layer.scale is not None:
            new[f"{full}.weight_scale"] = layer.scale
            forms[full] = replace(forms[full], granularity="row")
        if layer.low_rank is not None:
            new[full + DOWN], new[full + UP] = layer.low_rank
            forms[full] = replace(forms[full], low_rank=len(layer.low_rank[0]))
    metadata = {
        **file.metadata,
        octavo_form.KEY: octavo_form.dumps(forms),
        octavo_form.VERSION_KEY: __version__,
        KEY: json.dumps(said, sort_keys=True),
    }
    kept = [as_it_is(file, name) for name in file.entries if name not in new]
    every = [*kept, *(made(name, tensor.cpu().contiguous()) for name, tensor in new.items())]
    with Writer(path, layout_of(every), metadata) as writer:
        copy(every, writer)


def write_same(path: Path, plan: Plan) -> None:
    """Write the student as it was, all or nothing; errors as of `write_tuned`."""
    file = plan.located.file
    every = [as_it_is(file, name) for name in file.entries]
    with Writer(path, layout_of(every), file.metadata) as writer:
        copy(every, writer)


def digest_of(files: Iterable[TensorFile]) -> str:
    """A hash of the content of all these files, hexadecimal."""
    state = hashlib.sha256()
    for path in sorted({header.path for file in files for header in file.headers}):
        with path.open("rb") as opened:
            state.update(hashlib.file_digest(opened, "sha256").digest())
    return state.hexdigest()
