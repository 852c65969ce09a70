"""Models by name, for those who serve many requests: each part is loaded once, and leaves when memory is short.

`octavo.load` gives one whole model. A shelf gives whole models and single parts, as ComfyUI's loaders ask for them, and
what was asked for twice is the same object. When a part is to be loaded and would not fit, those that were used longest
ago leave first. Conditioning is kept as well, so that a text that comes again is not encoded again.
"""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from octavo.checkpoint.folders import CATEGORIES, MODELS, Folders
from octavo.checkpoint.kinds import WORDS_KEY, Kind
from octavo.checkpoint.presets import Preset, preset_for
from octavo.checkpoint.source import Located, Source, open_source
from octavo.devices import pick_device, pick_dtype
from octavo.errors import RequestError, WrongModelError, did_you_mean
from octavo.models import VAE, ClipConfig, MMDiT, MMDiTConfig, T5Config
from octavo.pipeline.assemble import CALLED, EMBEDDED_MODEL, ENCODERS, format_called, load, placing_of, text_encoders_of
from octavo.pipeline.components import Arithmetic, Components, Part
from octavo.pipeline.controlnets import ControlNets
from octavo.pipeline.encode import Conditioning, TextEncoders, encode_tokens
from octavo.pipeline.loras import Loras, Stack
from octavo.pipeline.placing import budget_of
from octavo.pipeline.preview import preview
from octavo.pipeline.request import Lora
from octavo.pipeline.room import Room
from octavo.pipeline.text_cache import TextCache
from octavo.placement.running import Running
from octavo.text.tokenizers import TokenizedPrompt

logger = logging.getLogger(__name__)

# ComfyUI's `weight_dtype`: how a diffusion model is loaded. `fast` lets inputs be rounded, too.
WEIGHT_DTYPES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"force": "e4m3fn"},
    "fp8_e4m3fn_fast": {"force": "e4m3fn", "fast": True},
    "fp8_e5m2": {"force": "e5m2"},
}
Texts = tuple[str, str | None, str | None]  # for all encoders; what CLIP-G and T5 read instead
RELEASED = (4096, 2048)  # widths of context and pooled text that SD3 and SD3.5 take


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A diffusion model, ready to be sampled from."""

    part: Part[MMDiT]
    name: str
    preset: Preset
    embedded: bool
    vae: "Vae | None" = None  # for previews of the embedded model

    @property
    def config(self) -> MMDiTConfig:
        return cast(MMDiTConfig, self.part.config)

    def preview(self, denoised: Tensor) -> Image.Image:
        """A quick look at unfinished latents [1, 16, h, w]."""
        return preview(denoised, self.vae.part if self.embedded and self.vae else None)

    def check(self, conditioning: Conditioning) -> None:
        """Refuse a text that was encoded for another model.

        Raises:
            WrongModelError: its widths are not those that the model takes.
        """
        widths = conditioning.context.shape[-1], conditioning.pooled.shape[-1]
        takes = self.config.context_width, self.config.pooled_width
        if widths != takes:
            raise WrongModelError(
                f"The text was encoded to widths {widths[0]} and {widths[1]}, '{self.name}' takes {takes[0]} and "
                f"{takes[1]}: use the text encoders that come with the model."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Text encoders that work together; what ComfyUI calls a CLIP."""

    encoders: TextEncoders
    parts: tuple[Part[nn.Module], ...]
    name: str
    clip_skip: int = 2

    def skipping(self, clip_skip: int) -> "Clip":
        """The same, reading another of CLIP's last layers."""
        return replace(self, clip_skip=clip_skip)


@dataclass(frozen=True, slots=True, eq=False)
class Vae:
    """A VAE and where it is from."""

    part: Part[VAE]
    name: str
    embedded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How everything on a shelf is loaded; the keywords of `octavo.load`."""

    models_dir: Path | str | None = None
    text_encoders: tuple[str, ...] = ()  # to prefer, for whole models
    vae: str | None = None  # likewise
    device: str | None = None
    dtype: str | None = None
    tiled_vae: bool | None = None
    fast: bool = False
    force_fp8: bool | str = False
    force_fp8_text_encoders: bool | str = False
    supports_fp8_compute: bool = False
    backend: str | None = None
    measure: bool | None = None
    retry_bf16: bool = False
    attention: str | None = None
    compile: bool | str = False
    graphs: bool | None = None
    vram: str | int | None = None  # of all models together
    text_cache_bytes: int = field(default=256 << 20)

    @property
    def keywords(self) -> dict[str, Any]:
        """As `octavo.load` takes them."""
        names = (name for name in self.__dataclass_fields__ if name != "text_cache_bytes")
        return {name: getattr(self, name) for name in names}


class Shelf:
    """Models by name. All methods may be called by any thread; weights are read by whoever first calls a part.

    Attributes:
        settings: how it loads.
        folders: where it looks for files.
        device, dtype: where and in which numbers its models work.
        loras: LoRA files by name.
        controlnets: ControlNets by name.
    """

    def __init__(self, settings: LoadSettings | None = None) -> None:
        self.settings = settings or LoadSettings()
        models_dir = self.settings.models_dir
        self.folders = Folders.standard(None if models_dir is None else Path(models_dir))
        self.device = pick_device(self.settings.device)
        self.dtype = pick_dtype(self.settings.dtype, self.device)
        self._room: Room[Hashable] = Room(self.device, budget_of(self.settings.vram, self.device))
        self.texts = TextCache(self.settings.text_cache_bytes)
        running = Running(attention=self.settings.attention, compile=self.settings.compile, graphs=self.settings.graphs)
        if why := running.refusal(self.device, self.dtype):  # now, rather than at the first request
            raise RequestError(f"{why}.")
        self._arithmetic = Arithmetic(
            mode="fast" if self.settings.fast else "fp8",
            backend=self.settings.backend,
            measure=self.settings.measure,
            assume_fp8_compute=self.settings.supports_fp8_compute,
            force=format_called(self.settings.force_fp8),
            running=running,
        )
        self._of_encoders = replace(self._arithmetic, force=format_called(self.settings.force_fp8_text_encoders))
        # Names come over the network: nothing outside of the tree can be named.
        self.loras = Loras(self.folders, paths=False)
        self.controlnets = ControlNets(
            self.folders, self.device, self.dtype, self._arithmetic, make_part=self._part, paths=False
        )
        self._made: dict[Hashable, Any] = {}
        self.when_loaded: Callable[[Part[nn.Module]], None] = lambda _part: None
        self._lock = RLock()

    # Whole models

    def components(self, name: str | None = None) -> Components:
        """A whole model, as `octavo.load` finds it; None for the embedded one.

        Raises:
            As `octavo.load`.
        """
        path = EMBEDDED_MODEL if name is None else self.folders.find(name, *MODELS)
        keywords = self.settings.keywords | {"make_part": self._part, "loras": self.loras, "vram": self._room.budget}

        def make() -> Components:
            components = load(path, **keywords)
            if components.placing is not None:
                self._room.follow(components.placing, [components.mmdit, components.vae, *components.encoders])
            return components

        return cast(Components, self._once(("components", _stamp(path)), make))

    def checkpoint(self, name: str) -> tuple[Model, Clip | None, Vae | None]:
        """What a checkpoint holds; where it has no text encoders or VAE inside, those of the models tree that fit.

        Raises:
            ModelNotFoundError, CheckpointError: as `octavo.load`.
        """
        path = self.folders.find(name, "checkpoints", "diffusion_models", "diffusers")
        components = self.components(str(path))
        return cast(
            "tuple[Model, Clip | None, Vae | None]",
            self._once(("checkpoint", _stamp(path)), lambda: _taken_apart(components)),
        )

    # Single parts

    def diffusion_model(self, name: str, weight_dtype: str = "default") -> Model:
        """A diffusion model without the rest.

        Args:
            name: in `diffusion_models` or among the checkpoints.
            weight_dtype: one of `WEIGHT_DTYPES`, as ComfyUI names them.
        """
        if weight_dtype not in WEIGHT_DTYPES:
            raise RequestError(
                f"There is no weight_dtype '{weight_dtype}'. Use {', '.join(WEIGHT_DTYPES)}."
                + did_you_mean(weight_dtype, WEIGHT_DTYPES)
            )
        path = self.folders.find(name, "diffusion_models", "checkpoints", "diffusers")
        return cast(Model, self._once(("model", _stamp(path), weight_dtype), lambda: self._model(path, weight_dtype)))

    def _model(self, path: Path, weight_dtype: str) -> Model:
        wish = WEIGHT_DTYPES[weight_dtype]
        arithmetic = self._arithmetic
        if "force" in wish:
            arithmetic = replace(arithmetic, force=format_called(wish["force"]))
        if wish.get("fast"):
            arithmetic = replace(arithmetic, mode="fast")
        with open_source(path) as own:
            located = own.require("mmdit")
            part = cast("Part[MMDiT]", self._part(located, self.device, self.dtype, arithmetic))
            preset = preset_for(cast(MMDiTConfig, part.config), located.file)
            embedded = _is_embedded(own)
        placing = placing_of([part], preset, self._room.budget)
        if placing is not None:
            self._room.follow(placing, [part])
        vae = None
        if embedded:
            vae = Vae(self.components(None).vae, EMBEDDED_MODEL.stem, True)
        return Model(part, path.stem, preset, embedded, vae)

    def clip(self, names: Sequence[str], kind: str = "sd3") -> Clip:
        """The text encoders in these files, told apart by what is in them.

        Args:
            names: one to three files in `text_encoders` or among the checkpoints.
            kind: of the model that they are for; only "sd3" is known.

        Raises:
            RequestError: another kind.
            WrongModelError: a file without text encoder, or two of one kind.
        """
        if kind != "sd3":
            raise RequestError(f"Text encoders of type '{kind}' are for models that Octavo does not run; use sd3.")
        paths = [self.folders.find(name, "text_encoders", "checkpoints") for name in names]
        return cast(Clip, self._once(("clip", *map(_stamp, paths)), lambda: self._clip(paths)))

    def _clip(self, paths: Sequence[Path]) -> Clip:
        found: dict[Kind, Part[nn.Module]] = {}
        widths = None
        for path in dict.fromkeys(paths):
            with open_source(path) as source:
                inside = [located for kind in ENCODERS if (located := source.find(kind))]
                if not inside:
                    source.require(*ENCODERS)
                for located in inside:
                    kind = located.part.kind
                    if kind in found:
                        raise WrongModelError(
                            f"'{path.name}' and '{found[kind].path.name}' both hold {CALLED[kind]}; give each "
                            "encoder once."
                        )
                    found[kind] = self._room.lone(self._part(located, self.device, self.dtype, self._of_encoders))
                if any(WORDS_KEY in file.metadata for file in source.files):
                    config = cast(MMDiTConfig, self.components(None).mmdit.config)
                    widths = config.context_width, config.pooled_width
        context_width, pooled_width = widths or _widths(found)
        encoders = text_encoders_of(found, self.folders, context_width=context_width, pooled_width=pooled_width)
        return Clip(encoders, tuple(found.values()), " + ".join(path.stem for path in paths))

    def vae(self, name: str) -> Vae:
        """A VAE, from `vae` or from inside a checkpoint."""
        path = self.folders.find(name, "vae", "checkpoints")

        def make() -> Vae:
            with open_source(path) as source:
                part = self._room.lone(self._part(source.require("vae"), self.device, self.dtype, Arithmetic()))
                return Vae(cast("Part[VAE]", part), path.stem, _is_embedded(source))

        return cast(Vae, self._once(("vae", _stamp(path)), make))

    # Texts

    def encode(
        self,
        clip: Clip | TextEncoders,
        prompt: str,
        *,
        prompt_clip_g: str | None = None,
        prompt_t5: str | None = None,
        clip_skip: int | None = None,
        skip_empty: bool = False,
    ) -> Conditioning:
        """A text as the model is told it, from the cache where it was encoded before.

        Args:
            clip: encodes it. Loads encoders, so call this where device work is done.
            prompt: for all encoders that are not given their own.
            prompt_clip_g, prompt_t5: what CLIP-G and T5 read instead.
            clip_skip: which of CLIP's last layers is read; as `clip` says if None.
            skip_empty: leave out T5 where its text is empty, and both CLIPs where both of theirs are, as if they were
                missing.

        Returns:
            float32 conditioning on the encoders' device.
        """
        texts = (prompt, prompt_clip_g, prompt_t5)
        return self._encoded(clip, [texts], clip_skip=clip_skip, skip_empty=skip_empty)[0]

    def encode_all(
        self, clip: Clip | TextEncoders, prompts: Sequence[str], *, clip_skip: int | None = None
    ) -> list[Conditioning]:
        """`encode` for several texts: those that were not encoded before pass through the encoders together."""
        return self._encoded(clip, [(prompt, None, None) for prompt in prompts], clip_skip=clip_skip)

    def _encoded(
        self, clip: Clip | TextEncoders, asked: Sequence[Texts], *, clip_skip: int | None, skip_empty: bool = False
    ) -> list[Conditioning]:
        encoders = clip.encoders if isinstance(clip, Clip) else clip
        layer = clip_skip or (clip.clip_skip if isinstance(clip, Clip) else 2)

        def make(missing: Sequence[tuple[Texts, int, bool]]) -> list[Conditioning]:
            tokens = [_tokens(encoders, texts, skip_empty=skip_empty) for texts, _, _ in missing]
            return encode_tokens(encoders, tokens, clip_skip=layer)

        return self.texts.get(encoders, [(texts, layer, skip_empty) for texts in asked], make)

    # LoRAs

    def stack(self, lora: Lora, model: Model | None, clip: Clip | None) -> Stack:
        """What a LoRA of the tree does to a model and to text encoders.

        Raises:
            ModelNotFoundError: there is no such file.
            CheckpointError: it does not fit them.
        """
        parts = [] if model is None else [cast("Part[nn.Module]", model.part)]
        return self.loras.stack([lora], [*parts, *(() if clip is None else clip.parts)])

    # What is there, and memory

    def names(self, category: str) -> list[str]:
        """The files of a category, as ComfyUI's lists show them."""
        if category not in CATEGORIES:
            raise RequestError(f"There is no folder of models '{category}'; there are {', '.join(CATEGORIES)}.")
        return [file.name for file in self.folders.files(category)]

    @property
    def loaded(self) -> list[Part[nn.Module]]:
        """Parts whose weights are in memory, the one used longest ago first."""
        return self._room.loaded

    def free(self, *keep: Part[nn.Module]) -> int:
        """Release all parts but those to keep, and the texts; returns how many bytes of weights these were.

        Call it where device work is done, for no other work may be using them.
        """
        self.texts.clear()
        self.loras.release()
        return self._room.free(*keep)

    def smaller(self) -> bool:
        """Go over to a smaller memory plan, of a model that is in use; whether there was one."""
        return self._room.smaller()

    def _part(
        self, located: Located, device: torch.device, dtype: torch.dtype, arithmetic: Arithmetic
    ) -> Part[nn.Module]:
        """The part, made at most once for each way of loading it."""
        key = (_stamp(located.file.path), located.part.kind, arithmetic)
        with self._lock:
            part = self._room.find(key)
            if part is None:
                made: Part[nn.Module] = Part(located, device, dtype, arithmetic)
                self._room.add(key, made, lambda: self.when_loaded(made))
                part = made
            return part

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]


def _tokens(encoders: TextEncoders, texts: Texts, *, skip_empty: bool) -> TokenizedPrompt:
    """A text as the encoders read it; what is noteworthy about it is logged."""
    prompt, prompt_clip_g, prompt_t5 = texts
    tokens = encoders.tokenizers.encode(
        prompt, prompt_clip_g=prompt_clip_g, prompt_t5=prompt_t5, embeddings=encoders.shapes
    )
    for warning in tokens.warnings:
        logger.warning("%s", warning.text)
    if not skip_empty:
        return tokens
    of_l, of_g, of_t5 = (bool(prompt if text is None else text) for text in texts)
    # CLIP-L and CLIP-G stand side by side: one of them reads an empty text rather than nothing.
    clips = of_l or of_g
    return replace(
        tokens,
        clip_l=tokens.clip_l if clips else None,
        clip_g=tokens.clip_g if clips else None,
        t5=tokens.t5 if of_t5 else None,
    )


def _stamp(path: Path) -> Hashable:
    """Names a file as it is now: one that is replaced is another."""
    stat = path.stat()
    return str(path.resolve()), stat.st_mtime_ns, stat.st_size


def _is_embedded(source: Source) -> bool:
    return any(WORDS_KEY in file.metadata for file in source.files)


def _taken_apart(components: Components) -> tuple[Model, Clip | None, Vae | None]:
    vae = Vae(components.vae, components.name, components.embedded)
    clip = Clip(components.text, components.encoders, components.name) if components.encoders else None
    model = Model(components.mmdit, components.name, components.preset, components.embedded, vae)
    return model, clip, vae


def _widths(found: Mapping[Kind, Part[nn.Module]]) -> tuple[int, int]:
    """Widths of context and pooled text that go with these encoders: T5's, and both CLIPs' together."""
    context_width, pooled_width = RELEASED
    if t5 := found.get("t5"):
        context_width = cast(T5Config, t5.config).width
    clips = [cast(ClipConfig, part.config) for kind, part in found.items() if kind != "t5"]
    if len(clips) == 2:
        pooled_width = sum(config.projection or config.width for config in clips)
    return context_width, pooled_width
