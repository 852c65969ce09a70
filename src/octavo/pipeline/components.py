"""The parts of a model, loaded when first needed, and made to leave where memory is short.

Finding the files that make up a model is `assemble`'s business.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor, nn

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
from octavo.models import VAE, MMDiT, MMDiTConfig, VAEConfig
from octavo.models.rows import decode_bytes
from octavo.pipeline.decode import TILE
from octavo.pipeline.encode import TextEncoders
from octavo.pipeline.fusing import fuse_steps
from octavo.pipeline.latents import FACTOR
from octavo.pipeline.placing import Placing
from octavo.pipeline.preview import preview
from octavo.placement.graphs import captured_by
from octavo.placement.movers import mover_for
from octavo.placement.placed import place, placed_on
from octavo.placement.plan import Stay
from octavo.placement.running import Running, attend, start
from octavo.placement.work import Work
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Which layers of a part have FP8 weights, and how they multiply; see `octavo.fp8.prepare`."""

    mode: Mode = "exact"  # "fast" lets inputs be rounded to 8 or 16 bits
    backend: str | None = None  # the one to use wherever it can be
    measure: bool | None = None  # whether to time the ways; None: as suits the device
    assume_fp8_compute: bool = False  # of a GPU that does not say so
    force: Fp8Format | None = None  # quantize to this at load what the file keeps in more bits
    running: Running = field(default_factory=Running)  # how it attends, and whether it is compiled or captured

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
        stay: where its weights are, see `place`; None: all on the device, as long as they are loaded.
        modulation_streamed: whether those of adaLN pass through the device once a run.
        needs: bytes that it takes on the device while it is used.
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
        self.stay: Stay | None = None
        self.modulation_streamed, self.needs = False, self.nbytes
        self._model: M | None = None
        self._loading = Lock()
        # For those who keep parts of several models in one memory.
        self.before_loading: Callable[[], None] = lambda: None
        self.when_used: Callable[[], None] = lambda: None
        self.when_arriving: Callable[[Part[Any]], None] = lambda _part: None

    @property
    def loaded(self) -> bool:
        """Whether its weights are in memory."""
        return self._model is not None

    @property
    def away(self) -> bool:
        """Whether its weights are in the host's memory alone, until it is called."""
        placed = None if self._model is None else placed_on(self._model)
        return placed is not None and placed.away

    @property
    def in_memory(self) -> M | None:
        """The model, if its weights are in memory."""
        return self._model

    def __call__(self) -> M:
        """The model, loaded and on the device, as far as it is to be there."""
        with self._loading:
            self.when_arriving(self)
            if self._model is None:
                self.before_loading()
                self._model = self._load()
            elif (placed := placed_on(self._model)) is not None:
                placed.arrive()
            self.when_used()
            return self._model

    def place(self, stay: Stay, *, modulation_streamed: bool = False, needs: int | None = None) -> None:
        """Let its weights be where a plan says, from now on or from when they are loaded; not while it is used.

        Args:
            stay: of its blocks.
            modulation_streamed: let adaLN pass through the device once a run.
            needs: bytes that it then takes there.
        """
        with self._loading:
            self.needs = self.nbytes if needs is None else needs
            if self._model is not None:
                if (captured := captured_by(self._model)) is not None:
                    captured.drop("the weights move")
                placed = placed_on(self._model)
                if placed is not None:
                    placed.move(stay, modulation_streamed=modulation_streamed)
                elif _apart(stay, modulation_streamed):
                    placed = place(self._model, stay, mover_for(self.device), modulation_streamed=modulation_streamed)
                if placed is not None:
                    logger.info("%s (%s): %s", self.title, self.path.name, placed)
            self.stay, self.modulation_streamed = stay, modulation_streamed

    def leave(self) -> None:
        """Off the device into the host's memory, if it may leave, else only what its blocks pass through; the next call
        brings it back.
        """
        with self._loading:
            placed = None if self._model is None else placed_on(self._model)
            if placed is not None and not (self.stay is not None and self.stay.leaves):
                placed.rest()
            elif self._model is not None and placed is not None and not placed.away:
                if (captured := captured_by(self._model)) is not None:
                    captured.drop("the weights leave the device")  # and so does the memory of their graphs
                placed.leave()

    def _load(self) -> M:
        # What comes and goes has its home in the host's memory, and is never whole on the device.
        apart = self.stay is not None and _apart(self.stay, self.modulation_streamed)
        model = load_part(self._plan()[0], "cpu" if apart else self.device, self.dtype)
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
            attends = attend(model, self.device, self._arithmetic.mode, self._arithmetic.running)
            fused = fuse_steps(model, self.device, self.dtype, rows=self._rows, measure=self._arithmetic.measure)
            told = "".join(f"\n  {line}" for line in (*paths.details, *attends, *fused))
            refused = f"\n  {self.refused}" if self.refused else ""
            logger.info("%s (%s): %s%s%s", self.title, self.path.name, paths, refused, told)
        if apart and self.stay is not None:
            mover = mover_for(self.device)
            placed = place(model, self.stay, mover, modulation_streamed=self.modulation_streamed)
            trim_memory()
            logger.info("%s (%s): %s", self.title, self.path.name, placed)
        for line in start(model, self.device, self._arithmetic.mode, self._arithmetic.running):
            logger.info("%s (%s): %s", self.title, self.path.name, line)
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
        placed = None if self._model is None else placed_on(self._model)
        if placed is not None:
            placed.close()
        self._model = placed = None
        trim_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _apart(stay: Stay, modulation_streamed: bool) -> bool:
    """Whether weights come and go, so that they need a home beside the device."""
    return stay.streamed or stay.leaves or modulation_streamed


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
        controlnets: where ControlNets are found.
        placing: the plan for the device's memory; None where there is none, as on CPUs.
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
        placing: Placing | None = None,
    ) -> None:
        self.placing = placing
        self.name, self.preset, self.embedded, self.warnings = name, preset, embedded, tuple(warnings)
        self.mmdit, self.vae, self.encoders, self.text = mmdit, vae, tuple(encoders), text
        self._tiled_vae, self.retry_bf16 = tiled_vae, retry_bf16
        self._loras, self.controlnets = loras, controlnets

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
        placed = "" if self.placing is None else f"; {self.placing}"
        return f"{self.preset.name} ({self.name}) on {self.device} in {dtype}{fp8}{placed}"

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
        assert self.controlnets is not None, "made without a place to look for ControlNets"
        config = self.mmdit.config
        assert isinstance(config, MMDiTConfig)
        return self.controlnets.controls(wishes, config, self.name, self.vae, (width, height))

    def remarks(self, prompt: str) -> list[str]:
        """What the user should know of a prompt: words that no encoder knows, embeddings that are left out."""
        kits, prompt = self.text.tokenizers, spoken(split_tags(prompt)[0])
        unknown = ", ".join(f"'{word}'" for word in kits.unknown_words(prompt))
        remarks = (
            [f"The model does not know {unknown}; 'octavo info {self.name}' tells what it does."] if unknown else []
        )
        return remarks + [warning.text for warning in kits.encode(prompt, embeddings=self.text.shapes).warnings]

    def fit(self, work: Work, controls: "Sequence[Control]" = ()) -> None:
        """See that the memory plan, if there is one, serves a job; call it where device work is done.

        Raises:
            PlacementError: the memory that the user allowed does not suffice for it.
        """
        if self.placing is not None:
            nets = [control.net for control in controls if isinstance(control.net, Part)]
            self.placing.fit(work, nets)

    def smaller(self) -> bool:
        """Go over to a smaller memory plan; whether there was one."""
        return self.placing is not None and self.placing.smaller()

    def done(self, *parts: Part[Any]) -> None:
        """These are not needed until they are called again: they leave the device, if the memory plan says so."""
        if self.placing is not None:
            self.placing.done(*parts)

    @property
    def at_last(self) -> bool:
        """Whether there is no smaller memory plan to go over to."""
        return self.placing is None or self.placing.plan.smaller() is None

    def tile(self, width: int, height: int) -> int | None:
        """Side in latent pixels of the tiles that a picture of this size is decoded in; None: whole."""
        planned = None if self.placing is None or self._tiled_vae is not None else self.placing.plan.tile
        return planned or (TILE if self.wants_tiles(width, height) else None)

    def make_room_for(self, part: Part[nn.Module], *done: Part[nn.Module]) -> None:
        """Let those that are `done` leave the device, as the plan says; without one, if `part` would not fit beside."""
        if self.placing is not None:
            self.done(*done)
            return
        free = free_bytes(self.device)
        if free is not None and not part.loaded and part.nbytes + SPARE > free:
            for each in done:
                each.release()

    def wants_tiles(self, width: int, height: int) -> bool:
        """Whether a picture of this size is decoded in tiles: as asked, else if whole it would not fit."""
        if self._tiled_vae is not None:
            return self._tiled_vae
        if self.placing is not None:
            return self.placing.plan.tile is not None
        free = free_bytes(self.device)
        config = cast(VAEConfig, self.vae.config)
        return free is not None and decode_bytes(config, height, width, self.vae.dtype, self.device) > free

    def preview(self, denoised: Tensor) -> Image.Image:
        """A quick look at unfinished latents [1, 16, h, w]."""
        return preview(denoised, self.vae if self.embedded else None)
