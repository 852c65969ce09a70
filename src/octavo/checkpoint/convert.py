"""A model from one way of keeping it to another: single file ↔ diffusers folder, without loss.

    with open_source(path) as source:
        conversion = plan_conversion(source, to, Wishes())     # headers only; every check but that of the values
        conversion.run()                                        # streamed; all or nothing

How names and FP8 scales change is in `translate`, what a folder holds beside weights in `configs` and `vocabularies`,
how it all comes into its place in `publish`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from octavo.checkpoint import configs, octavo_form, vocabularies
from octavo.checkpoint.detect import unsaid
from octavo.checkpoint.kinds import CONFIG_KEY, TITLES, Kind, Style
from octavo.checkpoint.octavo_form import LayerForm
from octavo.checkpoint.plan import MODELS, Plan, plan_part
from octavo.checkpoint.presets import SETTINGS_KEY, Preset, preset_for
from octavo.checkpoint.publish import NewFile, check_place, is_file_name, publish
from octavo.checkpoint.rewrite import Target, as_it_is
from octavo.checkpoint.scales import METADATA_KEY
from octavo.checkpoint.source import Source
from octavo.checkpoint.tensors import TensorFile
from octavo.checkpoint.translate import translate
from octavo.errors import RequestError
from octavo.models import ClipConfig, MMDiTConfig

# Prefixes in files of several parts.
PREFIXES: Mapping[Kind, str] = {
    "mmdit": "model.diffusion_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
    "vae": "first_stage_model.",
}
KINDS = tuple(PREFIXES)
RELEASED_CLIP_WIDTHS = (768, 1280)  # by which CLIP-L and CLIP-G are told from each other
SHARD_BYTES = 10_000_000_000
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Headers that are written anew, because names change.
REWRITTEN = frozenset({METADATA_KEY, octavo_form.KEY, CONFIG_KEY})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """How the result shall be."""

    parts: tuple[Kind, ...] | None = None  # to write; None: all
    dtype: torch.dtype | None = None  # of everything but FP8; None: as it is
    bare: bool = False  # a single file of one part: names without prefix
    form: Literal["comfyui", "octavo"] | None = None  # of FP8 in a single file; None: ComfyUI's where it will do
    shard_bytes: int | None = None  # at most in one file of a folder; None: SHARD_BYTES
    force: bool = False  # replace what is at the place


@dataclass(frozen=True, slots=True)
class Conversion:
    """What will be written.

    Attributes:
        to: a file or a folder.
        kinds: the parts.
        files: of weights.
        texts: other files.
        notes: what the user should know, in sentences.
    """

    to: Path
    kinds: tuple[Kind, ...]
    files: tuple[NewFile, ...]
    texts: Mapping[Path, bytes]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(file.nbytes for file in self.files)

    def run(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """Write it; see `publish`."""
        publish(self.to, self.files, self.texts, progress)


def plan_conversion(source: Source, to: Path, wishes: Wishes | None = None) -> Conversion:
    """Plan the conversion of `source`, which stays open until it is run.

    Args:
        source: any form that Octavo loads.
        to: a file if it ends on .safetensors, else a diffusers folder.
        wishes: how the result shall be.

    Raises:
        WrongModelError: the source holds no model, or not the part asked for.
        CheckpointError: the source is damaged, or cannot be kept in the other form without loss.
        RequestError: `to` may not be written, or the wishes do not go together.
    """
    wishes = wishes or Wishes()
    _check_wishes(to, wishes)
    check_place(to, [header.path for file in source.files for header in file.headers], force=wishes.force)
    plans = [plan_part(source.require(kind)) for kind in _kinds(source, wishes)]
    kinds = tuple(plan.located.part.kind for plan in plans)
    if is_file_name(to):
        file, texts = _single_file(plans, to, wishes)
        files: tuple[NewFile, ...] = (file,)
    else:
        files, texts = _folder(plans, to, wishes)
    return Conversion(to, kinds, files, texts, tuple(_notes(source, plans, files, to)))


def _check_wishes(to: Path, wishes: Wishes) -> None:
    """Refuse what would have no effect."""
    if is_file_name(to):
        if wishes.shard_bytes is not None:
            raise RequestError(
                f"'{to}' is one file, so there are no shards to limit. Name a folder, or drop the limit."
            )
        return
    for wished, what in ((wishes.bare, "Names without prefix"), (wishes.form, "Forms of FP8")):
        if wished:
            raise RequestError(f"{what} are for single files; '{to}' is a diffusers folder, which has ways of its own.")


def _kinds(source: Source, wishes: Wishes) -> list[Kind]:
    source.require(*KINDS)  # says what the file is instead
    held = [located.part.kind for located in source.parts if located.part.kind in MODELS]
    for kind in wishes.parts or ():
        source.require(kind)
    kinds = [kind for kind in dict.fromkeys(held) if wishes.parts is None or kind in wishes.parts]
    if wishes.bare and len(kinds) > 1:
        raise RequestError(
            f"Names without prefix would mix the {' and the '.join(TITLES[kind] for kind in kinds)}. "
            "Choose one part with --parts."
        )
    return kinds


def _single_file(plans: Sequence[Plan], to: Path, wishes: Wishes) -> tuple[NewFile, dict[Path, bytes]]:
    alone = plans[0].located.part.kind if len(plans) == 1 else None
    targets: list[Target] = []
    forms: dict[str, LayerForm] = {}
    texts: dict[Path, bytes] = {}
    for plan in plans:
        kind = plan.located.part.kind
        # Encoders and VAEs by themselves have no prefix, as released; diffusion models have theirs unless asked.
        prefix = "" if wishes.bare or (alone and alone != "mmdit") else PREFIXES[kind]
        translation = translate(plan, "single-file", prefix, dtype=wishes.dtype, form=wishes.form)
        targets += [*translation.targets, *_carried(plan, "single-file", prefix, wishes)]
        forms |= translation.forms
        if kind == alone and not vocabularies.is_released(plan) and (own := vocabularies.beside_file(plan)):
            texts[Path(f"{to.stem}.tokenizer.json")] = own
    metadata: dict[str, str] = {}
    for plan in plans:  # the diffusion model first, whose word counts
        metadata = {**plan.located.file.metadata, **metadata}
    said = {plan.located.part.kind: _said(plan, alone) for plan in plans}
    own_config: dict[str, Any] = said[alone] if alone else {kind: fields for kind, fields in said.items() if fields}
    extra = {CONFIG_KEY: json.dumps(own_config)} if own_config else {}
    extra |= _settings(plans, to)
    return NewFile(Path(to.name), tuple(targets), _header(metadata, forms, extra)), texts


def _said(plan: Plan, alone: Kind | None) -> dict[str, Any]:
    """What `octavo.config` must say of a part."""
    said = unsaid(plan.located.part.kind, plan.config)
    if alone and isinstance(plan.config, ClipConfig) and plan.config.width not in RELEASED_CLIP_WIDTHS:
        said["kind"] = plan.located.part.kind
    return said


def _folder(plans: Sequence[Plan], to: Path, wishes: Wishes) -> tuple[tuple[NewFile, ...], dict[Path, bytes]]:
    kinds = [plan.located.part.kind for plan in plans]
    main = next((plan.located.file for plan in plans if plan.located.part.kind == "mmdit"), None)
    files: list[NewFile] = []
    texts: dict[Path, bytes] = {}
    tokenizers: list[Kind] = []
    for plan in plans:
        kind, file = plan.located.part.kind, plan.located.file
        folder, library, _ = configs.COMPONENTS[kind]
        translation = translate(plan, "diffusers", dtype=wishes.dtype)
        targets = [*translation.targets, *_carried(plan, "diffusers", "", wishes)]
        # What an all-in-one file says of itself stays with the diffusion model.
        metadata = dict(file.metadata) if kind == "mmdit" or file is not main else {}
        if kind == "mmdit":
            metadata |= _settings(plans, to / folder / "diffusion_pytorch_model.safetensors")
        stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
        shards, index = _shards(
            targets, translation.forms, metadata, Path(folder, stem), wishes.shard_bytes or SHARD_BYTES
        )
        files += shards
        if index:
            texts[Path(folder, f"{stem}.safetensors.index.json")] = index
        texts[Path(folder, "config.json")] = _json(configs.config_json(plan.config))
        if kind in configs.TOKENIZERS and (vocabulary := vocabularies.in_folder(plan)):
            texts |= vocabulary
            tokenizers.append(kind)
    shift = _preset(plans).shift if "mmdit" in kinds else Preset(name="").shift
    texts[Path("scheduler", "scheduler_config.json")] = _json(configs.scheduler_config(shift))
    texts[Path("model_index.json")] = _json(configs.model_index(kinds, tokenizers))
    return tuple(files), texts


def _shards(
    targets: Sequence[Target], forms: Mapping[str, LayerForm], metadata: Mapping[str, str], stem: Path, limit: int
) -> tuple[list[NewFile], bytes | None]:
    """The files of one component, none larger than `limit` unless a tensor is, and their index if there are several."""
    groups: list[list[Target]] = [[]]
    for target in targets:
        if groups[-1] and sum(each.nbytes for each in groups[-1]) + target.nbytes > limit:
            groups.append([])
        groups[-1].append(target)
    shards = []
    for i, group in enumerate(groups):
        number = f"-{i + 1:05}-of-{len(groups):05}" if len(groups) > 1 else ""
        held = {target.name for target in group}
        mine = {layer: form for layer, form in forms.items() if f"{layer}.weight" in held}
        path = stem.with_name(f"{stem.name}{number}.safetensors")
        shards.append(NewFile(path, tuple(group), _header(metadata, mine, {})))
    if len(shards) == 1:
        return shards, None
    weight_map = {target.name: shard.path.name for shard in shards for target in shard.targets}
    total = sum(target.nbytes for target in targets)
    return shards, _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _carried(plan: Plan, style: Style, prefix: str, wishes: Wishes) -> Iterator[Target]:
    """What the model has no use for, but others have: for files all of it, for diffusers CLIP's projection."""
    part, file = plan.located.part, plan.located.file
    projected = isinstance(plan.config, ClipConfig) and plan.config.projection is not None
    for name in plan.surplus:
        if not _is_carried(plan, style, name):
            continue
        bare = name.removeprefix(part.prefix)
        target = as_it_is(file, name)
        if bare.startswith("text_projection"):
            projected = True
            if wishes.dtype is not None and target.dtype in FLOATS and not bare.endswith("scale"):
                target = replace(target, dtype=wishes.dtype)
        if style == "diffusers" and bare == "text_projection":
            yield _turned(file, name, target)
        else:
            yield replace(target, name=prefix + bare)
    if style == "diffusers" and isinstance(plan.config, ClipConfig) and not projected:
        # Their class always projects the pooled output; SD3 takes it as it is.
        dtype = wishes.dtype or _dtype_of(plan)
        side = plan.config.width
        yield Target(
            name="text_projection.weight", dtype=dtype, shape=(side, side), make=lambda: torch.eye(side, dtype=dtype)
        )


def _is_carried(plan: Plan, style: Style, name: str) -> bool:
    part = plan.located.part
    if style == "single-file":
        return part.style == "single-file"
    return isinstance(plan.config, ClipConfig) and name.removeprefix(part.prefix).startswith("text_projection")


def _turned(file: TensorFile, name: str, target: Target) -> Target:
    """A projection kept as a bare [in, out] parameter, as the weight of a linear layer."""

    def make() -> Tensor:
        return file.read(name).t().contiguous().to(target.dtype)

    return Target(name="text_projection.weight", dtype=target.dtype, shape=target.shape[::-1], make=make)


def _dtype_of(plan: Plan) -> torch.dtype:
    """The first 16- or 32-bit dtype of the part."""
    dtypes = (as_it_is(plan.located.file, slab.entry.name).dtype for origin in plan.origins for slab in origin.slabs)
    return next((dtype for dtype in dtypes if dtype in FLOATS), torch.float16)


def _header(metadata: Mapping[str, str], forms: Mapping[str, LayerForm], extra: Mapping[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in metadata.items() if key not in REWRITTEN}
    # transformers opens no file that does not say so.
    header = {**kept, **extra, "format": "pt"}
    return {**header, octavo_form.KEY: octavo_form.dumps(forms)} if forms else header


def _preset(plans: Sequence[Plan]) -> Preset:
    plan = next(plan for plan in plans if plan.located.part.kind == "mmdit")
    assert isinstance(plan.config, MMDiTConfig)
    return preset_for(plan.config, plan.located.file)


def _settings(plans: Sequence[Plan], to: Path) -> dict[str, str]:
    """The model's settings, for the header, where its new name does not tell them: a Turbo that is called otherwise."""
    plan = next((plan for plan in plans if plan.located.part.kind == "mmdit"), None)
    if plan is None or SETTINGS_KEY in plan.located.file.metadata:
        return {}
    assert isinstance(plan.config, MMDiTConfig)
    preset = _preset(plans)
    told = preset_for(plan.config, TensorFile(to, ()))
    return {} if preset == told else {SETTINGS_KEY: json.dumps(asdict(preset))}


def _notes(source: Source, plans: Sequence[Plan], files: Iterable[NewFile], to: Path) -> Iterator[str]:
    left = [name for located in source.parts for name in located.part.names if located.part.kind not in MODELS]
    claimed = {name for located in source.parts for name in located.part.names}
    left += [name for file in source.files for name in file.entries if name not in claimed]
    style: Style = "single-file" if is_file_name(to) else "diffusers"
    left += [name for plan in plans for name in plan.surplus if not _is_carried(plan, style, name)]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        names = ", ".join(f"'{name}'" for name in sorted(left)[:3])
        yield f"Left out, since no model has a use for it: {names}{more}."
    if is_file_name(to) and any(octavo_form.KEY in file.metadata for file in files):
        yield (
            "The FP8 layers are kept in Octavo's own form, because ComfyUI's has no scales by row and no low-rank "
            "branches: Octavo reads this file, ComfyUI does not."
        )
    if len(plans) > 1 and is_file_name(to):
        own = [plan for plan in plans if plan.located.part.kind in configs.TOKENIZERS]
        if any(not vocabularies.is_released(plan) for plan in own):
            yield "The encoders have vocabularies of their own, which a file of several parts cannot bring along."


def _json(fields: object) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode()
