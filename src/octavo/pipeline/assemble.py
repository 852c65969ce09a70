"""From a name to a model: which files make it up, and whether they belong together.

A part is taken from the file or folder that was named, else from the same models tree. Only headers are read, so that
wrong, damaged or missing files are refused before any work is done.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from octavo.checkpoint.folders import EMBEDDED, MODELS, Folders
from octavo.checkpoint.kinds import WORDS_KEY, Kind
from octavo.checkpoint.presets import Preset, preset_for
from octavo.checkpoint.source import Located, Source, open_source
from octavo.checkpoint.tensors import open_tensors
from octavo.devices import free_bytes, pick_device, pick_dtype
from octavo.errors import CheckpointError, ModelNotFoundError, RequestError, WrongModelError, did_you_mean
from octavo.fp8 import E4M3FN, FORMATS, Fp8Format
from octavo.models import VAE, ClipConfig, ClipTextEncoder, MMDiT, MMDiTConfig, T5Config, T5Encoder
from octavo.pipeline.components import Arithmetic, Components, Part
from octavo.pipeline.controlnets import ControlNets
from octavo.pipeline.encode import TextEncoders
from octavo.pipeline.loras import Loras
from octavo.pipeline.placing import Budget, Placing, budget_of
from octavo.placement.running import Running
from octavo.placement.work import Work
from octavo.text.tokenizers import EncoderTokenizer, Tokenizers
from octavo.text.vocabulary import Vocabulary, clip_vocabulary, read_vocabulary, t5_vocabulary

EMBEDDED_MODEL = EMBEDDED / "checkpoints" / "octavo-demo.safetensors"
ENCODERS: tuple[Kind, ...] = ("clip_l", "clip_g", "t5")
CALLED = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}

PartMaker = Callable[[Located, torch.device, torch.dtype, Arithmetic], Part[nn.Module]]

# By folder of a text encoder in a diffusers model, the folder of its vocabulary.
VOCABULARY_FOLDERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    models_dir: str | os.PathLike[str] | None = None,
    text_encoders: Sequence[str | os.PathLike[str]] = (),
    vae: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    tiled_vae: bool | None = None,
    fast: bool = False,
    force_fp8: bool | str = False,
    force_fp8_text_encoders: bool | str = False,
    supports_fp8_compute: bool = False,
    backend: str | None = None,
    measure: bool | None = None,
    retry_bf16: bool = False,
    attention: str | None = None,
    compile: bool | str = False,
    graphs: bool | None = None,
    vram: str | int | Budget | None = None,
    planned: bool = True,
    make_part: PartMaker = Part,
    loras: Loras | None = None,
) -> Components:
    """Find a model and all that belongs to it. Headers are read now, weights when they are needed.

    Args:
        model: a path, or a name in the models tree; None for the embedded model.
        models_dir: root of the tree; else $OCTAVO_MODELS, else ./models.
        text_encoders: paths or names of encoders to prefer over those in the model's file and in the tree.
        vae: likewise.
        device: cpu, cuda, cuda:1, mps; the fastest here when not given.
        dtype: float32, bfloat16 or float16, for all but FP8 weights; what suits the device when not given.
        tiled_vae: whether to decode in tiles; by free memory when not given.
        fast: let the inputs of FP8 layers be rounded to 8 or 16 bits where that saves time; else only weights are.
        force_fp8: quantize the model's linear layers at load, as far as they are not in FP8 yet: True or "e4m3fn", or
            "e5m2". Each row gets a scale of its own. Some small layers stay as they are (`checkpoint.force.KEPT`).
        force_fp8_text_encoders: the same for the text encoders.
        supports_fp8_compute: act as if a CUDA device could multiply in FP8, whatever it says.
        backend: name of the way to multiply by FP8 weights (see `octavo.fp8.BACKENDS`), for every layer of the model
            and of its encoders that can use it; what suits each layer when not given.
        measure: choose how to multiply by measured times, which are kept on disk, rather than by a known order; when
            not given, on CUDA devices only.
        retry_bf16: where an FP8 layer of the model gives NaN or infinity, warn, let it multiply in bfloat16 or float32
            from then on, and repeat the step; else such a number is an error.
        attention: name of the way in which the model attends (see `octavo.placement.attention.ATTENTION_BACKENDS`); by
            measured times among the exact ones when not given, among all with `fast`.
        compile: let torch.compile make code of the model's blocks: True for inductor, or another backend's name.
        graphs: replay the model's work as CUDA graphs; when not given, on CUDA devices.
        vram: how much of the device's memory may be used: "6GB", "80%" or bytes; what is free on a CUDA device when not
            given. What does not fit comes and goes, or passes through block by block; the pictures stay the same. On a
            CPU it is followed as well, for tests: there it only costs.
        planned: False keeps each part whole on the device while it is loaded, as those need who train it.
        make_part: makes each part, or gives one that was made before; see `shelf`.
        loras: where LoRAs are looked for; in the models tree and at any path when not given.

    Raises:
        ModelNotFoundError: a file is not there; says what to download and where to put it.
        CheckpointError: a file is damaged, of another kind, or does not belong to the others.
        RequestError: no such device, dtype, format, backend or attention, or one that cannot serve here; or `vram` is
            no size.
        PlacementError: `vram` does not suffice for any picture.
    """
    arithmetic = Arithmetic(
        mode="fast" if fast else "fp8",
        backend=backend,
        measure=measure,
        assume_fp8_compute=supports_fp8_compute,
        force=format_called(force_fp8),
        running=Running(attention=attention, compile=compile, graphs=graphs),
    )
    of_encoders = replace(arithmetic, force=format_called(force_fp8_text_encoders))
    folders = Folders.standard(None if models_dir is None else Path(models_dir))
    path = EMBEDDED_MODEL if model is None else folders.find(os.fspath(model), *MODELS)
    chosen_device = pick_device(device)
    chosen_dtype = pick_dtype(dtype, chosen_device)
    chosen = [open_source(folders.find(os.fspath(name), "text_encoders", "checkpoints")) for name in text_encoders]
    chosen_vae = [] if vae is None else [open_source(folders.find(os.fspath(vae), "vae", "checkpoints"))]
    own = open_source(path)
    # What was made of the embedded model, such as an FP8 file of it, belongs to it wherever it lies.
    embedded = any(WORDS_KEY in file.metadata for file in own.files)

    located = own.require("mmdit")
    mmdit = cast("Part[MMDiT]", make_part(located, chosen_device, chosen_dtype, arithmetic))
    if mmdit.refused is not None:
        raise RequestError(f"'{path.name}': {mmdit.refused}")
    config = cast(MMDiTConfig, mmdit.config)
    if why := arithmetic.running.refusal(chosen_device, chosen_dtype, config.width // config.heads):
        raise RequestError(f"'{path.name}': {why}.")

    # The embedded model and the released ones never lend each other parts, whatever their files are called.
    own_tree = Folders.standard(EMBEDDED, environment={}, working_dir=EMBEDDED) if embedded else folders
    if embedded:
        chosen += _encoders_beside(path, config)
        chosen_vae += _models_beside(path)

    def tree(*categories: str) -> Iterator[Source]:
        for file in own_tree.files(*categories):
            if file.embedded == embedded and file.path != path:
                yield from _opened(file.path)

    found = {kind: _first(kind, [*chosen, own], lambda: tree("text_encoders", "checkpoints")) for kind in ENCODERS}
    encoders = {kind: make_part(at, chosen_device, chosen_dtype, of_encoders) for kind, at in found.items() if at}
    _check_fit(encoders, config, mmdit)
    vae_at = _first("vae", [*chosen_vae, own], lambda: tree("vae", "checkpoints"))
    if vae_at is None:
        raise ModelNotFoundError(
            f"'{path.name}' has no VAE inside and there is none in {_places(folders, 'vae')}. "
            "Put SD3's VAE there, take a model file with the VAE inside, or pass --vae."
        )
    if not encoders:
        raise ModelNotFoundError(
            f"'{path.name}' has no text encoders inside and there are none in {_places(folders, 'text_encoders')}. "
            "Run 'octavo pull text-encoders', or put clip_l, clip_g and t5xxl there."
        )
    missing = [CALLED[kind] for kind in ENCODERS if kind not in encoders]
    warnings = (
        [f"{' and '.join(missing)} not found: the model draws without, less true to the prompt."] if missing else []
    )
    parts = [mmdit, *encoders.values()]
    if fast and not any(part.fp8_linears for part in parts):
        warnings.append(
            f"'{path.name}' has no FP8 weights, so that fast arithmetic has nothing to do; --force-fp8 makes them."
        )
    if supports_fp8_compute and chosen_device.type != "cuda":
        warnings.append(f"--supports-fp8-compute is about CUDA devices; on '{chosen_device}' it changes nothing.")
    name = path.name if path.is_dir() else path.stem
    vae_part = make_part(vae_at, chosen_device, chosen_dtype, Arithmetic())
    preset = preset_for(config, located.file)
    return Components(
        name=name,
        mmdit=mmdit,
        vae=cast("Part[VAE]", vae_part),
        encoders=list(encoders.values()),
        text=text_encoders_of(
            encoders,
            folders,
            context_width=config.context_width,
            pooled_width=config.pooled_width,
        ),
        preset=preset,
        placing=placing_of([mmdit, *encoders.values(), vae_part], preset, vram) if planned else None,
        embedded=embedded,
        warnings=warnings,
        tiled_vae=tiled_vae,
        retry_bf16=retry_bf16,
        loras=loras or Loras(folders),
        controlnets=ControlNets(
            folders,
            chosen_device,
            chosen_dtype,
            arithmetic,
            make_part=make_part,
            paths=loras is None or loras.paths,
        ),
    )


def placing_of(parts: Sequence[Part[Any]], preset: Preset, vram: str | int | Budget | None) -> Placing | None:
    """The memory plan for a model's parts, at first for the pictures that suit it; None where there is none to make.

    Args:
        parts: the MMDiT first.
        vram: as of `load`.
    """
    budget = budget_of(vram, parts[0].device)
    if budget is None:
        return None
    rows = 1 if preset.guidance_scale == 1 else 2
    work = Work(width=preset.width, height=preset.height, steps=preset.steps, rows=rows, prompts=rows)
    return Placing(parts, budget, work=work)


def format_called(wanted: bool | str) -> Fp8Format | None:
    """The format to force: e4m3fn where only a yes is given; None for a no."""
    if isinstance(wanted, bool):
        return E4M3FN if wanted else None
    known = {fmt.name: fmt for fmt in FORMATS.values()}
    if wanted not in known:
        raise RequestError(f"There is no FP8 format '{wanted}'. Use {' or '.join(known)}.{did_you_mean(wanted, known)}")
    return known[wanted]


def _opened(path: Path) -> Iterator[Source]:
    """The source at `path`; none if it is damaged, for that must not stop a search among many."""
    try:
        yield open_source(path)
    except (CheckpointError, ModelNotFoundError):
        return


def _encoders_beside(path: Path, config: MMDiTConfig) -> list[Source]:
    """Encoders in the tree that a model of the embedded one's kind lies in, as far as they fit: it was trained with."""
    found = []
    for file in sorted((path.parent.parent / "text_encoders").glob("*.safetensors")):
        for source in _opened(file):
            located = source.find(*ENCODERS)
            if located is not None and _width(located) in (config.context_width, config.pooled_width // 2):
                found.append(source)
    return found


def _models_beside(path: Path) -> list[Source]:
    """Other models of the embedded one's kind in the same tree, one of which may lend its VAE."""
    files = [file for file in sorted((path.parent.parent / "checkpoints").glob("*.safetensors")) if file != path]
    sources = [source for file in files for source in _opened(file)]
    return [source for source in sources if any(WORDS_KEY in file.metadata for file in source.files)]


def _width(located: Located) -> int:
    """Of a text encoder's tokens; 0 for a file that does not say."""
    names = ("shared.weight", "text_model.embeddings.token_embedding.weight")
    entries = (located.file.entries.get(located.part.prefix + name) for name in names)
    return next((entry.shape[-1] for entry in entries if entry is not None and entry.shape), 0)


def _first(kind: Kind, preferred: Sequence[Source], tree: Callable[[], Iterator[Source]]) -> Located | None:
    """The part of this kind in the first of the preferred sources that has it, else the best one of the tree."""
    for source in preferred:
        if located := source.find(kind):
            return located
    candidates = [located for source in tree() if (located := source.find(kind))]
    return _best(candidates)


def _best(candidates: Sequence[Located]) -> Located | None:
    """The most precise, that is largest, of those that fit twice into free memory; else the smallest."""
    if not candidates:
        return None
    free = free_bytes(torch.device("cpu"))
    fitting = [c for c in candidates if free is None or 2 * _nbytes(c) < free]
    return max(fitting, key=_nbytes) if fitting else min(candidates, key=_nbytes)


def _nbytes(located: Located) -> int:
    return sum(located.file.entries[name].nbytes for name in located.part.names)


def _check_fit(encoders: Mapping[Kind, Part[nn.Module]], config: MMDiTConfig, mmdit: Part[MMDiT]) -> None:
    """Refuse encoders whose widths the model does not take."""
    clips: tuple[Kind, ...] = ("clip_l", "clip_g")
    widths = {kind: _pooled_width(encoders[kind]) for kind in clips if kind in encoders}
    if (len(widths) == 2 and sum(widths.values()) != config.pooled_width) or sum(widths.values()) > config.pooled_width:
        files = " and ".join(f"'{encoders[kind].path.name}'" for kind in widths)
        raise WrongModelError(
            f"{files} give {sum(widths.values())} pooled channels, '{mmdit.path.name}' takes {config.pooled_width}: "
            "they belong to different models. Use the encoders that come with the model."
        )
    if (t5 := encoders.get("t5")) and cast(T5Config, t5.config).width != config.context_width:
        raise WrongModelError(
            f"'{t5.path.name}' is {cast(T5Config, t5.config).width} wide, '{mmdit.path.name}' takes "
            f"{config.context_width}: they belong to different models. SD3 and SD3.5 use T5 v1.1 XXL."
        )


def _pooled_width(part: Part[nn.Module]) -> int:
    config = cast(ClipConfig, part.config)
    return config.projection or config.width


def text_encoders_of(
    encoders: Mapping[Kind, Part[nn.Module]], folders: Folders, *, context_width: int, pooled_width: int
) -> TextEncoders:
    """The encoders with their tokenizers. As in SD3, T5's texts are at least as long as CLIP's table of positions."""
    clip_l, clip_g, t5 = (encoders.get(kind) for kind in ENCODERS)
    positions = 77
    for clip in (clip_l, clip_g):
        positions = cast(ClipConfig, clip.config).positions if clip else positions
    kits = Tokenizers(
        clip_l=None if clip_l is None else _clip_kit(EncoderTokenizer.clip_l, clip_l, positions),
        clip_g=None if clip_g is None else _clip_kit(EncoderTokenizer.clip_g, clip_g, positions),
        t5=None if t5 is None else EncoderTokenizer.t5(_vocabulary(t5), minimum=positions, width=context_width),
    )
    return TextEncoders(
        tokenizers=kits,
        clip_l=cast("Callable[[], ClipTextEncoder] | None", clip_l),
        clip_g=cast("Callable[[], ClipTextEncoder] | None", clip_g),
        t5=cast("Callable[[], T5Encoder] | None", t5),
        context_width=context_width,
        pooled_width=pooled_width,
        positions=positions,
        embeddings=_embeddings(folders),
    )


def _clip_kit(make: Callable[..., EncoderTokenizer], part: Part[nn.Module], positions: int) -> EncoderTokenizer:
    return make(_vocabulary(part), positions=positions, width=cast(ClipConfig, part.config).width)


def _vocabulary(part: Part[nn.Module]) -> Vocabulary:
    """The vocabulary beside the encoder's file; else the released one, which fits by its size; else a diffusers one."""
    rows = cast("ClipConfig | T5Config", part.config).vocab_size
    beside = part.path.with_name(f"{part.path.stem}.tokenizer.json")
    folder = part.path.parent
    if beside.exists():
        vocabulary = read_vocabulary(beside)
    elif isinstance(part.config, ClipConfig) and rows == clip_vocabulary().size:
        return clip_vocabulary()
    elif isinstance(part.config, T5Config) and rows >= t5_vocabulary().size:
        return t5_vocabulary()
    else:
        vocabulary = read_vocabulary(folder.parent / VOCABULARY_FOLDERS.get(folder.name, beside.name))
    if vocabulary.size > rows:
        raise WrongModelError(
            f"'{part.path}' knows {rows} tokens, the vocabulary beside it has {vocabulary.size}: they do not belong "
            "together. Fetch both from one place."
        )
    return vocabulary


def _embeddings(folders: Folders) -> Callable[[str], Mapping[str, Tensor] | None]:
    """Finds textual-inversion embeddings among the files of the tree, and nowhere else, whatever the name says."""

    @cache
    def find(name: str) -> Mapping[str, Tensor] | None:
        for file in folders.files("embeddings"):
            if name in (file.name, str(Path(file.name).with_suffix("")), Path(file.name).stem):
                with open_tensors(file.path) as tensors:
                    read = {key: tensors.read(key, torch.float32) for key in tensors.entries}
                return {key: t.view(1, -1) if t.dim() == 1 else t for key, t in read.items() if t.dim() in (1, 2)}
        return None

    return find


def _places(folders: Folders, category: str) -> str:
    return ", ".join(f"'{folder}'" for folder in folders.searched(category))
