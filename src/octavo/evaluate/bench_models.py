"""Models of the released shapes with random weights, made where they run: what a benchmark draws without any file.

`RandomFile` is a file that is not there. Its names and shapes are a released model's, so that everything from finding
out what it is to FP8, streaming and graphs goes the way of real files; only its numbers are made on the device, when
they are asked for, from one drawn tile: values hardly matter to time, as long as they are not zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import octavo
from octavo.checkpoint.delivery import Delivery
from octavo.checkpoint.folders import Folders
from octavo.checkpoint.force import forced_specs
from octavo.checkpoint.header import Entry, Header
from octavo.checkpoint.kinds import Kind
from octavo.checkpoint.plan import MODELS
from octavo.checkpoint.presets import preset_for
from octavo.checkpoint.save import Writer
from octavo.checkpoint.source import Source
from octavo.checkpoint.tensors import TensorFile
from octavo.devices import free_bytes
from octavo.errors import OutOfMemoryError
from octavo.fp8 import E4M3FN, Mode, quantize
from octavo.fp8.scale import Scaled
from octavo.models import VAE, ClipConfig, MMDiT, MMDiTConfig, T5Config
from octavo.models.vae import VAEConfig
from octavo.pipeline.assemble import placing_of, text_encoders_of
from octavo.pipeline.components import SPARE, Arithmetic, Components, Part
from octavo.placement.running import Running

TILE = 1 << 22  # numbers drawn; an odd width shifts them from row to row
EMBEDDED = "embedded"
RELEASED: Mapping[str, Callable[[], MMDiTConfig]] = {"large": MMDiTConfig.large, "medium": MMDiTConfig.medium}

# What belongs to each of them.
BESIDE: Mapping[Kind, Callable[[], Any]] = {
    "clip_l": ClipConfig.clip_l, "clip_g": ClipConfig.clip_g, "t5": T5Config.xxl, "vae": VAEConfig,
}  # fmt: skip


class RandomFile(TensorFile):
    """Tensors in bfloat16 by name and shape, whose numbers are made in the place that they are read into."""

    def __init__(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        path, position = Path(name), 0
        entries = dict[str, Entry]()
        for key, shape in shapes.items():
            nbytes = 2 * math.prod(shape)
            entries[key] = Entry(path, key, "BF16", shape, position, nbytes)
            position += nbytes
        super().__init__(path, (Header(path, {}, entries),))

    def read_into(self, name: str, out: Tensor, *, rows: tuple[int, int] | None = None, check: bool = True) -> None:  # noqa: ARG002
        """Fill `out` with numbers such as a trained model has; they are finite, so there is nothing to check."""
        fill(name, self.entries[name].shape, out)

    def deliver(
        self,
        delivery: Delivery,  # noqa: ARG002
        name: str,
        out: Tensor,
        *,
        rows: tuple[int, int] | None = None,
        check: bool = True,
    ) -> None:
        """`read_into`: there is nothing to wait for."""
        self.read_into(name, out, rows=rows, check=check)


def fill(name: str, shape: tuple[int, ...], out: Tensor) -> None:
    """Numbers such that activations keep their size: norms scale by 1, matrices by 1/√inputs, biases hardly count."""
    if len(shape) == 1 and name.endswith(".weight"):
        out.fill_(1.0)
        return
    gain = 0.02 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
    flat = out.view(-1)
    tile = _tile(out.device)[: flat.numel()].mul(gain).to(out.dtype)
    for start in range(0, flat.numel(), TILE):
        part = flat[start : start + TILE]
        part.copy_(tile[: part.numel()])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What torch makes meanwhile has this dtype unless it is told otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def _tile(device: torch.device) -> Tensor:
    return torch.randn(TILE, generator=torch.Generator().manual_seed(0)).to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which model a benchmark runs, where and how.

    Attributes:
        model: "embedded"; "large" or "medium", of random weights; else a name or path as `octavo.load` takes it.
        fp8: quantize its linear layers at load; as the file has them otherwise.
        fast, compile, vram: as `octavo.load` takes them.
    """

    model: str
    device: torch.device
    dtype: torch.dtype
    fp8: bool = True
    fast: bool = False
    compile: bool = False
    vram: str | None = None

    @property
    def random(self) -> bool:
        """Whether there is no file behind it."""
        return self.model in RELEASED

    @property
    def name(self) -> str:
        """For the names of lines."""
        return Path(self.model).stem


def open_model(wanted: Wanted) -> Components:
    """The model with all its parts, none of them loaded yet.

    Raises:
        ModelNotFoundError, CheckpointError, RequestError: as `octavo.load`.
    """
    if wanted.random:
        return _random(wanted)
    return octavo.load(
        None if wanted.model == EMBEDDED else wanted.model,
        device=str(wanted.device),
        dtype=str(wanted.dtype).removeprefix("torch."),
        fast=wanted.fast,
        compile=wanted.compile,
        vram=wanted.vram,
        force_fp8=wanted.fp8,
        force_fp8_text_encoders=wanted.fp8,
    )


def require_room(parts: Iterable[Part[Any]]) -> None:
    """Refuse to load what a CPU's machine has no memory for; on a GPU the memory plan sees to it.

    Raises:
        OutOfMemoryError: says how much is needed and free.
    """
    parts = list(parts)
    needed = sum(part.nbytes for part in parts if not part.loaded)
    free = free_bytes(parts[0].device) if parts[0].device.type == "cpu" else None
    if free is not None and needed + SPARE > free:
        raise OutOfMemoryError(
            f"The weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free. "
            "Take a smaller model, or free some memory."
        )


def random_source(kind: Kind, config: Any, name: str = "random") -> Source:
    """A source that holds one random part of this configuration."""
    with torch.device("meta"):
        state = MODELS[kind](config).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    path = f"{name}-{kind}.safetensors"
    return Source(Path(path), (RandomFile(path, shapes),))


def _random(wanted: Wanted) -> Components:
    mode: Mode = "fast" if wanted.fast else "fp8"
    running = Running(compile=wanted.compile)
    arithmetic = Arithmetic(mode=mode, force=E4M3FN if wanted.fp8 else None, running=running)
    make = partial(_part, wanted=wanted)
    mmdit = make("mmdit", RELEASED[wanted.model](), arithmetic)
    encoders: dict[Kind, Part[nn.Module]] = {}
    encoders |= {kind: make(kind, beside(), arithmetic) for kind, beside in BESIDE.items() if kind != "vae"}
    vae = make("vae", BESIDE["vae"](), Arithmetic())
    config = cast(MMDiTConfig, mmdit.config)
    # Guidance as of the model's card; skip-layer guidance, which takes a third pass, is left to `--model NAME`.
    preset = replace(preset_for(config, RandomFile(mmdit.path.name, {})), skip_layer_guidance=None)
    return Components(
        name=f"random-{wanted.model}",
        mmdit=cast("Part[MMDiT]", mmdit),
        vae=cast("Part[VAE]", vae),
        encoders=list(encoders.values()),
        text=text_encoders_of(
            encoders,
            Folders.standard(None),
            context_width=config.context_width,
            pooled_width=config.pooled_width,
        ),
        preset=preset,
        placing=placing_of([mmdit, *encoders.values(), vae], preset, wanted.vram),
    )


def _part(kind: Kind, config: Any, arithmetic: Arithmetic, *, wanted: Wanted) -> Part[nn.Module]:
    located = random_source(kind, config, f"random-{wanted.model}").require(kind)
    return Part(located, wanted.device, wanted.dtype, arithmetic)


# By part, where an all-in-one file keeps it.
PREFIXES: Mapping[Kind, str] = {
    "mmdit": "model.diffusion_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
    "vae": "first_stage_model.",
}


def write_random(model: str, path: Path) -> None:
    """Write a random all-in-one model of a released shape: FP8 by row, what else there is in bfloat16.

    For benchmarks of loading. 15.1 GB for "large", 9.6 GB for "medium".

    Raises:
        CheckpointError: the disk has no room for it.
    """
    parts: Mapping[Kind, Any] = {"mmdit": RELEASED[model](), **{kind: make() for kind, make in BESIDE.items()}}
    layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]()
    for kind, config in parts.items():
        with torch.device("meta"):
            skeleton = MODELS[kind](config)
        linears = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
        quantized = {f"{name}.weight" for name in forced_specs(linears, kind)} if kind != "vae" else set()
        for name, tensor in skeleton.state_dict().items():
            key, shape = PREFIXES[kind] + name, tuple(tensor.shape)
            layout[key] = (E4M3FN.dtype if name in quantized else torch.bfloat16, shape)
            if name in quantized:
                layout[f"{key}_scale"] = (torch.float32, (shape[0], 1))
    codes = quantize(_tile(torch.device("cpu")))
    with Writer(path, layout) as writer:
        for key, (dtype, shape) in layout.items():
            writer.write_chunks(key, _numbers(key, dtype, shape, codes))


def _numbers(key: str, dtype: torch.dtype, shape: tuple[int, ...], codes: Scaled) -> Iterator[Tensor]:
    """A tensor of such a file, in pieces."""
    count = math.prod(shape)
    if dtype == E4M3FN.dtype:
        for start in range(0, count, TILE):
            yield codes.q[: min(TILE, count - start)]
    elif key.endswith("_scale"):
        # Of a matrix [rows, columns], whose columns only its own shape tells: all linears here are at most a few
        # thousand wide, and a common gain keeps activations finite.
        yield (codes.scale / 64).expand(count).clone()
    else:
        whole = torch.empty(shape, dtype=dtype)
        fill(key, shape, whole)
        yield whole
