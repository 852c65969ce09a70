"""The parts of a model, loaded when first needed, and made to leave where memory is short.

Finding the files that make up a model is `assemble`'s business.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from octavo.checkpoint.detect import Config
from octavo.checkpoint.force import force_fp8
from octavo.checkpoint.kinds import TITLES
from octavo.checkpoint.load import load_part
from octavo.checkpoint.plan import Plan, plan_part
from octavo.checkpoint.presets import Preset
from octavo.checkpoint.source import Located
from octavo.devices import free_bytes, trim_memory
from octavo.fp8 import BACKENDS, Fp8Format, LinearSpec, Mode, find_backend, prepare, refused
from octavo.fp8.needs import TYPICAL_ROWS
from octavo.models import VAE, MMDiT, MMDiTConfig
from octavo.pipeline.decode import decode, to_uint8
from octavo.pipeline.encode import TextEncoders
from octavo.pipeline.fusing import fuse_steps
from octavo.pipeline.latents import FACTOR
from octavo.text.lora_tags import split_tags, spoken

if TYPE_CHECKING:
    from octavo.pipeline.control import Control
    from octavo.pipeline.control_request import ControlImage
    from octavo.pipeline.controlnets import ControlNets
    from octavo.pipeline.loras import Loras, Stack
    from octavo.pipeline.request import Lora

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module, covariant=True)

# Rows of inputs, where ways to multiply are timed.
PROMPT_ROWS = 77  # tokens
STEP_ROWS = 56  # of modulation: 28 steps, two prompts

SPARE = 512 << 20  # bytes that stay free beside a part, for its work
DECODE_BYTES_PER_PIXEL = 2600  # of the released VAE at its widest, in float32: five maps of 128 channels


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Which layers of a part have FP8 weights, and how they multiply; see `octavo.fp8.prepare`."""

    mode: Mode = "exact"  # "fast" lets inputs be rounded to 8 or 16 bits
    backend: str | None = None  # the one to use wherever it can be
    measure: bool | None = None  # whether to time the ways; None: as suits the device
    assume_fp8_compute: bool = False  # of a GPU that does not say so
    force: Fp8Format | None = None  # quantize to this at load what the file keeps in more bits

    def __post_init__(self) -> None:
        if self.backend is not None:
            find_backend(BACKENDS, self.backend)


class Part(Generic[M]):
    """One model of a file. Its shape is known and checked at once; its weights are read when it is first called.

    Attributes:
        path: of its file.
        config: its configuration.
        kind: what it is.
        nbytes: of its weights when loaded.
        linears: how many linear layers it has.
        fp8_linears: how many of them keep FP8 weights.
        skeleton: the model without its weights, on the meta device.
        forced_linears: how many of those are quantized at load.
        refused: why none of those can use the backend that was asked for, so that each takes what suits it; None
            where one can, or none was asked for.
    """

    def __init__(
        self, located: Located, device: torch.device, dtype: torch.dtype, arithmetic: Arithmetic | None = None
    ) -> None:
        self._located, self._arithmetic = located, arithmetic or Arithmetic()
        try:
            plan, self.forced_linears = self._plan()
        finally:
            located.file.close()  # opens by itself when read again
        self.path: Path = located.file.path
        self.kind = located.part.kind
        self.title = TITLES[self.kind]
        self.config: Config = plan.config
        self.skeleton = plan.model
        self.device, self.dtype = device, dtype
        self.refused: str | None = None
        if self._arithmetic.backend is not None:
            backend = find_backend(BACKENDS, self._arithmetic.backend)
            assume = self._arithmetic.assume_fp8_compute
            self.refused = refused(plan.model, device, dtype, backend, assume_fp8_compute=assume)
        self.linears, self.fp8_linears = len(plan.linears), len(plan.fp8_linears) + self.forced_linears
        self.nbytes = sum(
            tensor.numel() * (1 if tensor.dtype.itemsize == 1 else dtype.itemsize)
            for tensor in plan.model.state_dict().values()
        )
        self._model: M | None = None
        self._loading = Lock()
        # For those who keep parts of several models in one memory.
        self.before_loading: Callable[[], None] = lambda: None
        self.when_used: Callable[[], None] = lambda: None

    @property
    def loaded(self) -> bool:
        """Whether its weights are in memory."""
        return self._model is not None

    @property
    def in_memory(self) -> M | None:
        """The model, if its weights are in memory."""
        return self._model

    def __call__(self) -> M:
        """The model, loaded."""
        with self._loading:
            if self._model is None:
                self.before_loading()
                self._model = self._load()
            self.when_used()
            return self._model

    def _load(self) -> M:
        model = load_part(self._plan()[0], self.device, self.dtype)
        self._located.file.close()
        backend = None if self.refused else self._arithmetic.backend
        paths = prepare(
            model,
            self.device,
            self.dtype,
            mode=self._arithmetic.mode,
            backend=backend,
            measure=self._arithmetic.measure,
            rows=self._rows,
            assume_fp8_compute=self._arithmetic.assume_fp8_compute,
        )
        if paths.linears:
            fused = fuse_steps(model, self.device, self.dtype, rows=self._rows, measure=self._arithmetic.measure)
            told = "".join(f"\n  {line}" for line in (*paths.details, *fused))
            refused = f"\n  {self.refused}" if self.refused else ""
            logger.info("%s (%s): %s%s%s", self.title, self.path.name, paths, refused, told)
        return cast(M, model)

    def _plan(self) -> tuple[Plan, int]:
        """How to load it, and how many layers are quantized meanwhile."""
        plan, fmt = plan_part(self._located), self._arithmetic.force
        return plan, 0 if fmt is None else len(force_fp8(plan, LinearSpec(format=fmt, granularity="row")))

    def _rows(self, layer: str) -> int:
        """How many rows the input of a layer usually has."""
        if self.kind not in ("mmdit", "controlnet"):
            return PROMPT_ROWS
        once_a_step = "adaLN_modulation" in layer or layer.startswith(("t_embedder", "y_embedder"))
        return STEP_ROWS if once_a_step else TYPICAL_ROWS

    def release(self) -> None:
        """Give its memory back; the next call loads it again."""
        self._model = None
        trim_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Components:
    """A model ready to draw; made by `octavo.load`.

    Attributes:
        name: of the model's file or folder; `octavo.load` finds it again by this.
        mmdit, vae, encoders: its parts; call one to have it loaded.
        text: what turns prompts into conditioning.
        preset: settings that suit the model.
        embedded: whether it is the small model of the package.
        warnings: what the user should know before drawing with it.
        retry_bf16: whether an FP8 layer that gives NaN or infinity goes on in bfloat16 rather than ending the run.
    """

    def __init__(
        self,
        *,
        name: str,
        mmdit: Part[MMDiT],
        vae: Part[VAE],
        encoders: Sequence[Part[nn.Module]],
        text: TextEncoders,
        preset: Preset,
        embedded: bool = False,
        warnings: Sequence[str] = (),
        tiled_vae: bool | None = None,
        retry_bf16: bool = False,
        loras: "Loras | None" = None,
        controlnets: "ControlNets | None" = None,
    ) -> None:
        self.name, self.preset, self.embedded, self.warnings = name, preset, embedded, tuple(warnings)
        self.mmdit, self.vae, self.encoders, self.text = mmdit, vae, tuple(encoders), text
        self._tiled_vae, self.retry_bf16 = tiled_vae, retry_bf16
        self._loras, self._controlnets = loras, controlnets

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.mmdit.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the work is done, FP8 weights aside."""
        return self.mmdit.dtype

    @property
    def max_side(self) -> int:
        """Longest side of a picture in pixels: as far as the table of positions goes."""
        config = self.mmdit.config
        assert isinstance(config, MMDiTConfig)
        return config.pos_embed_size * config.patch_size * FACTOR

    @property
    def headline(self) -> str:
        """One line for people: what draws, where and how."""
        fp8 = f", {self.mmdit.fp8_linears} of {self.mmdit.linears} linears in FP8" if self.mmdit.fp8_linears else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.preset.name} ({self.name}) on {self.device} in {dtype}{fp8}"

    def stack(self, loras: "Sequence[Lora]") -> "Stack":
        """What these LoRAs do to the model and to its text encoders.

        Raises:
            ModelNotFoundError: there is no such file.
            CheckpointError: a file that does not fit the model.
        """
        if not loras:
            return {}
        assert self._loras is not None, "made without a place to look for LoRAs"
        return self._loras.stack(loras, (self.mmdit, *self.encoders))

    def controls(self, wishes: "Sequence[ControlImage]", width: int, height: int) -> "tuple[Control, ...]":
        """What is to be followed in a picture of this size; loads nothing but the pictures.

        Raises:
            As `ControlNets.controls`.
        """
        if not wishes:
            return ()
        assert self._controlnets is not None, "made without a place to look for ControlNets"
        config = self.mmdit.config
        assert isinstance(config, MMDiTConfig)
        return self._controlnets.controls(wishes, config, self.name, self.vae, (width, height))

    def remarks(self, prompt: str) -> list[str]:
        """What the user should know of a prompt: words that no encoder knows, embeddings that are left out."""
        kits, prompt = self.text.tokenizers, spoken(split_tags(prompt)[0])
        unknown = ", ".join(f"'{word}'" for word in kits.unknown_words(prompt))
        remarks = (
            [f"The model does not know {unknown}; 'octavo info {self.name}' tells what it does."] if unknown else []
        )
        return remarks + [warning.text for warning in kits.encode(prompt, embeddings=self.text.shapes).warnings]

    def make_room_for(self, part: Part[nn.Module], *done: Part[nn.Module]) -> None:
        """Release those that are `done` if `part` would not fit beside them."""
        free = free_bytes(self.device)
        if free is not None and not part.loaded and part.nbytes + SPARE > free:
            for each in done:
                each.release()

    def wants_tiles(self, width: int, height: int) -> bool:
        """Whether a picture of this size is decoded in tiles: as asked, else if whole it would not fit."""
        if self._tiled_vae is not None:
            return self._tiled_vae
        free = free_bytes(self.device)
        return free is not None and width * height * DECODE_BYTES_PER_PIXEL > free

    def preview(self, denoised: Tensor) -> Image.Image:
        """A quick look at unfinished latents [1, 16, h, w]."""
        return preview(denoised, self.vae if self.embedded else None)


def preview(denoised: Tensor, vae: Part[VAE] | None) -> Image.Image:
    """A quick look at unfinished latents [1, 16, h, w]: by the VAE where it is small, else by the channels' colours."""
    if vae is not None:
        # Half its size is a quarter of the work, and as much as an unfinished picture has to show.
        pixels = to_uint8(decode(vae(), avg_pool2d(denoised, 2, ceil_mode=True)))
    else:
        factors = torch.tensor(LATENT_TO_RGB, dtype=torch.float32)
        rgb = denoised.float().cpu().movedim(1, -1) @ factors + torch.tensor(LATENT_TO_RGB_BIAS)
        pixels = to_uint8(rgb.movedim(-1, 1))
    return Image.fromarray(pixels[0].cpu().numpy())


# Least-squares colours of the released VAE's latent channels, as ComfyUI uses them for its previews of SD3.
LATENT_TO_RGB = (
    (-0.0922, -0.0175, 0.0749), (0.0311, 0.0633, 0.0954), (0.1994, 0.0927, 0.0458), (0.0856, 0.0339, 0.0902),
    (0.0587, 0.0272, -0.0496), (-0.0006, 0.1104, 0.0309), (0.0978, 0.0306, 0.0427), (-0.0042, 0.1038, 0.1358),
    (-0.0194, 0.0020, 0.0669), (-0.0488, 0.0130, -0.0268), (0.0922, 0.0988, 0.0951), (-0.0278, 0.0524, -0.0542),
    (0.0332, 0.0456, 0.0895), (-0.0069, -0.0030, -0.0810), (-0.0596, -0.0465, -0.0293), (-0.1448, -0.1463, -0.1189),
)  # fmt: skip
LATENT_TO_RGB_BIAS = (0.2394, 0.2135, 0.1925)
