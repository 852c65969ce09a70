"""A model with LoRAs made part of its weights: one file, streamed, one layer in memory at a time.

    with open_source(path) as source:
        merge = plan_merge(source, [(Path("style.safetensors"), 0.8)], to)     # headers of the model, all of the LoRAs
        merge.run()

The parts that change are written in 16 bits, whatever they were: rounding merged weights to FP8 again is a matter of
its own, which `compress.quantize_checkpoint` does with care. Parts that no LoRA changes are copied as they are.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from octavo.checkpoint import octavo_form
from octavo.checkpoint.convert import PREFIXES, Wishes, plan_conversion
from octavo.checkpoint.kinds import TITLES, Kind
from octavo.checkpoint.load import read_values
from octavo.checkpoint.lora import read_lora
from octavo.checkpoint.plan import Origin, Plan, plan_part
from octavo.checkpoint.publish import NewFile, is_file_name, publish
from octavo.checkpoint.rewrite import Target
from octavo.checkpoint.source import Source
from octavo.checkpoint.tensors import TensorFile, torch_dtype
from octavo.checkpoint.translate import shape_of
from octavo.errors import RequestError
from octavo.models.adapter import Adapter

MERGED_KEY = "octavo.merged"  # in the header: the LoRAs and their strengths, JSON
CHANGED: tuple[Kind, ...] = ("mmdit", "clip_l", "clip_g", "t5")
HALVES = (torch.bfloat16, torch.float16, torch.float32)

Stack = Sequence[tuple[Adapter, float]]


@dataclass(frozen=True, slots=True)
class Merge:
    """What will be written.

    Attributes:
        to: the file.
        file: its tensors.
        texts: what goes beside it.
        changed: by part, how many of its layers change.
    """

    to: Path
    file: NewFile
    texts: Mapping[Path, bytes]
    changed: Mapping[Kind, int]

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return self.file.nbytes

    def run(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """Write it, all or nothing.

        Raises:
            CheckpointError: a weight is NaN, infinite or too large for its dtype, or the disk is full.
        """
        publish(self.to, [self.file], self.texts, progress)


def plan_merge(
    source: Source,
    loras: Sequence[tuple[Path, float]],
    to: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Merge:
    """Plan the merge; `source` stays open until it is run.

    Args:
        source: the model; any form that Octavo loads.
        loras: files and strengths.
        to: the file to write, ending on .safetensors.
        dtype: of the parts that change; that of the file if None, bfloat16 where that is FP8.
        force: replace what is there.

    Raises:
        RequestError: `to` may not be written or is no file's name; no LoRA is given.
        CheckpointError: a LoRA that does not fit the model, or a damaged file.
    """
    if not loras:
        raise RequestError("No LoRA is given to be merged.")
    if not is_file_name(to):
        raise RequestError(f"'{to}' is no name of a file: end it in .safetensors.")
    main = source.require("mmdit").file
    conversion = plan_conversion(source, to, Wishes(force=force, parts=_kinds_in(source, main)))
    (file,) = conversion.files
    plans = {
        kind: plan_part(located)
        for kind in CHANGED
        if (located := source.find(kind)) is not None and located.file is main
    }
    stacks: dict[Kind, list[tuple[Adapter, float]]] = {}
    for path, strength in loras:
        for kind, adapter in read_lora(path, {kind: plan.model for kind, plan in plans.items()}).items():
            stacks.setdefault(kind, []).append((adapter, strength))

    prefixes = tuple(PREFIXES[kind] for kind in stacks)
    targets = [target for target in file.targets if not target.name.startswith(prefixes)]
    for kind, stack in stacks.items():
        targets += _merged(plans[kind], stack, PREFIXES[kind], dtype)
    metadata = _without_forms(file.metadata, prefixes)
    noted = [{"name": path.name, "strength": strength} for path, strength in loras]
    metadata[MERGED_KEY] = json.dumps([*json.loads(metadata.get(MERGED_KEY, "[]")), *noted])
    changed = {kind: len({name for adapter, _ in stack for name in adapter.layers}) for kind, stack in stacks.items()}
    return Merge(to, NewFile(file.path, tuple(targets), metadata), conversion.texts, changed)


def described(changed: Mapping[Kind, int]) -> str:
    """What a merge changes, in words."""
    return ", ".join(f"{count} layers of the {TITLES[kind]}" for kind, count in changed.items())


def _kinds_in(source: Source, main: TensorFile) -> tuple[Kind, ...]:
    """The parts in the diffusion model's own file; in a diffusers folder, that is the diffusion model."""
    return tuple(
        located.part.kind for located in source.parts if located.file is main and located.part.kind in PREFIXES
    )


def _merged(plan: Plan, stack: Stack, prefix: str, dtype: torch.dtype | None) -> Iterator[Target]:
    """The tensors of one part, in the names of single files."""
    stored = {torch_dtype(slab.entry) for origin in plan.origins for slab in origin.slabs}
    wanted = dtype or next((each for each in HALVES if each in stored), torch.bfloat16)
    for origin in plan.origins:
        layer, _, name = origin.ours.rpartition(".")
        changes = [(adapter, strength) for adapter, strength in stack if name == "weight" and layer in adapter.layers]
        shape = shape_of(plan, origin.ours)
        # A table of positions in float32 stays so: 16 bits of it are another table.
        own = torch_dtype(origin.slabs[0].entry)
        kept = own if dtype is None and own in HALVES else wanted
        make = partial(_weight, plan, origin, layer, changes, shape, kept)
        yield Target(name=prefix + origin.ours, dtype=kept, shape=shape, make=make)


def _weight(
    plan: Plan, origin: Origin, layer: str, changes: Stack, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """One weight, changed and rounded once.

    Raises:
        RequestError: it has values beyond the dtype's.
    """
    weight = read_values(plan.located.file, origin).view(shape)
    # As side branches do, each change starts from the weight as it was.
    merged = weight
    for adapter, strength in changes:
        merged = merged + (adapter.layers[layer].merged(weight, strength) - weight)
    rounded = merged.to(dtype)
    if not bool(rounded.isfinite().all()):
        raise RequestError(
            f"'{origin.ours}' has values beyond {torch.finfo(dtype).max:g} after the merge: take a lower strength, or "
            "--dtype bfloat16."
        )
    return rounded


def _without_forms(metadata: Mapping[str, str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """The header without what it says of FP8 layers that are written in 16 bits."""
    kept = dict(metadata)
    if octavo_form.KEY in kept:
        said = json.loads(kept[octavo_form.KEY])
        said["layers"] = {name: form for name, form in said["layers"].items() if not name.startswith(prefixes)}
        if said["layers"]:
            kept[octavo_form.KEY] = json.dumps(said)
        else:
            for key in (octavo_form.KEY, octavo_form.RECIPE_KEY, octavo_form.CALIBRATION_KEY):
                kept.pop(key, None)
    return kept
