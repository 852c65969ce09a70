"""Where in an MMDiT a factor put into one weight can be taken out of the next, leaving its function as it is.

`equalize` uses the seams to even outliers out before quantizing (`recipe.equalize`); the stress twin of `evaluate` uses
them to put some in. Rescaling changes biases and weights only, so no step of a run grows dearer.

Source: Xiao et al. 2022, SmoothQuant (arXiv 2211.10438), for the norms; here adaLN takes the factors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.models.mmdit import FinalLayer, JointBlock, StreamBlock


@dataclass(frozen=True, slots=True)
class Rows:
    """Some output channels of a linear layer."""

    linear: nn.Linear
    start: int
    stop: int
    plus_one: bool = False  # what is used is 1 + its output

    def norms(self) -> Tensor:
        """Of each row of the weight, float32."""
        norms: Tensor = self.linear.weight[self.start : self.stop].float().norm(dim=1)
        return norms

    def multiply(self, s: Tensor) -> None:
        part = slice(self.start, self.stop)
        self.linear.weight[part] *= s[:, None].to(self.linear.weight)
        self.linear.bias[part] *= s.to(self.linear.bias)
        if self.plus_one:
            self.linear.bias[part] += (s - 1).to(self.linear.bias)


@dataclass(frozen=True, slots=True)
class Seam:
    """One vector of factors s [C] that a model does not notice: times `rows`, over `over_rows` and `over_columns`."""

    rows: tuple[Rows, ...]
    over_rows: tuple[Rows, ...] = ()
    over_columns: tuple[nn.Linear, ...] = ()

    @property
    def channels(self) -> int:
        return self.rows[0].stop - self.rows[0].start

    @torch.no_grad()
    def apply(self, s: Tensor) -> None:
        """Rescale the layers, in place."""
        for rows in self.rows:
            rows.multiply(s)
        for rows in self.over_rows:
            rows.multiply(1 / s)
        for linear in self.over_columns:
            linear.weight /= s.to(linear.weight)


def block_seams(block: JointBlock) -> Iterator[Seam]:
    """All seams of a joint block but those of its heads. Layers must be plain, not quantized."""
    # The joint attention mixes both streams' values, so these share their factors.
    streams = (block.x_block, block.context_block)
    yield Seam(
        rows=tuple(_values(stream.attn.qkv) for stream in streams),
        over_columns=tuple(stream.attn.proj for stream in streams if not stream.ends_here),
    )
    for stream in streams:
        yield from _stream_seams(stream)


def stream_seams(block: StreamBlock) -> Iterator[Seam]:
    """All seams of a block of image tokens alone, as ControlNets have them."""
    yield Seam(rows=(_values(block.attn.qkv),), over_columns=(block.attn.proj,))
    yield from _stream_seams(block)


def final_seams(final: FinalLayer) -> Iterator[Seam]:
    """The seam of the final layer."""
    yield _modulated(_linear(final.adaLN_modulation[1]), (0, 1), final.linear)


def head_rows(block: JointBlock) -> Iterator[Rows]:
    """Queries and keys of a block with qk-norm: whole heads can be rescaled and nothing need be taken out again."""
    for stream in (block.x_block, block.context_block):
        for attention in [stream.attn, *([stream.attn2] if hasattr(stream, "attn2") else [])]:
            if not isinstance(attention.ln_q, nn.Identity):
                width = attention.qkv.in_features
                yield Rows(attention.qkv, 0, width)
                yield Rows(attention.qkv, width, 2 * width)


@torch.no_grad()
def equalize(seams: Iterator[Seam], squares: Mapping[nn.Module, Tensor]) -> dict[nn.Module, Tensor]:
    """Even out channels that stand out.

    A seam before a layer's columns meets in the middle between the sizes of the inputs and of the columns; a gate's
    seam in the middle between the rows on both its sides. Factors have the geometric mean 1.

    Args:
        seams: of one block, in order.
        squares: by linear layer, the mean squares [K] of its inputs as they are now; a seam whose layers are not all
            known is left alone.

    Returns:
        By linear layer whose inputs changed, the factors [K] that they changed by.
    """
    changed: dict[nn.Module, Tensor] = {}
    for seam in seams:
        if seam.over_columns:
            if not all(linear in squares for linear in seam.over_columns):
                continue
            inputs = torch.stack([squares[linear].float() for linear in seam.over_columns]).amax(0).sqrt()
            columns = torch.stack([linear.weight.float().norm(dim=0) for linear in seam.over_columns]).amax(0)
            s = (columns.clamp_min(1e-12) / inputs.clamp_min(1e-12).to(columns)).sqrt()
        else:
            after = torch.stack([rows.norms() for rows in seam.over_rows]).amax(0)
            before = torch.stack([rows.norms() for rows in seam.rows]).amax(0)
            s = (after.clamp_min(1e-12) / before.clamp_min(1e-12)).sqrt()
        s = (s / s.log().mean().exp()).clamp(2.0**-10, 2.0**10)
        seam.apply(s)
        for linear in seam.over_columns:
            changed[linear] = s
    return changed


def _stream_seams(stream: StreamBlock) -> Iterator[Seam]:
    ada = _linear(stream.adaLN_modulation[1])
    yield _modulated(ada, (0, 1), stream.attn.qkv)
    if not stream.ends_here:
        yield _gated(ada, 2, stream.attn.proj)
        yield _modulated(ada, (3, 4), stream.mlp.fc1)
        yield _gated(ada, 5, stream.mlp.fc2)
    if hasattr(stream, "attn2"):
        yield Seam(rows=(_values(stream.attn2.qkv),), over_columns=(stream.attn2.proj,))
        yield _modulated(ada, (6, 7), stream.attn2.qkv)
        yield _gated(ada, 8, stream.attn2.proj)


def _modulated(ada: nn.Linear, chunks: tuple[int, int], after: nn.Linear) -> Seam:
    """shift + (1 + scale) · norm(x) takes the factor, `after` gives it back."""
    shift, scale = chunks
    return Seam(rows=(_chunk(ada, shift), _chunk(ada, scale, plus_one=True)), over_columns=(after,))


def _gated(ada: nn.Linear, chunk: int, before: nn.Linear) -> Seam:
    """gate · before(x): the gate takes the factor, `before` gives it back."""
    return Seam(rows=(_chunk(ada, chunk),), over_rows=(Rows(before, 0, before.out_features),))


def _chunk(ada: nn.Linear, chunk: int, *, plus_one: bool = False) -> Rows:
    width = ada.in_features
    return Rows(ada, chunk * width, (chunk + 1) * width, plus_one)


def _values(qkv: nn.Linear) -> Rows:
    return Rows(qkv, 2 * qkv.in_features, 3 * qkv.in_features)


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear), f"a {type(module).__name__} cannot be rescaled; quantize afterwards"
    return module
