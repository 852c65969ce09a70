"""What the work costs in operations and bytes moved, from the models' configurations.

A multiplication and an addition are two operations. Sums over tokens and blocks as in the models' own code; proven
against torch's counter of operations and against a trace of all that passes through memory.

b rows, n image tokens, t text tokens, D width, L blocks.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from octavo.models.clip import ClipConfig
from octavo.models.controlnet import ControlNetConfig
from octavo.models.mmdit import MMDiTConfig
from octavo.models.t5 import T5Config
from octavo.models.vae import VAEConfig
from octavo.placement.cards import Card
from octavo.placement.shapes import PartShape
from octavo.placement.work import Work

# Shares of the rate of large products that other work reaches: attention with heads of 64 channels, convolutions.
ATTENTION, CONVOLUTION = 0.6, 0.5
# Likewise attention in eight bits, of the FP8 rate. Nobody has measured ours; on Hopper, whose units make 3.9e12
# exponentials a second (Shah et al. 2024, arXiv 2407.08608), these alone take as long as 1.0e15 operations of a head of
# 64, and after the products, at 1.58e15, leave 0.39. Where both overlap it is more: 0.6 is published for wider heads.
ATTENTION_8BIT = 0.4

Passes = Literal["plain", "16 bits", "8 bits"]
"""What stands between the products of a block: operations one by one in 16 bits; fused steps that end in 16 bits, as
weights in 16 bits have them; or that end in 8 bits, what no step makes being rounded in one pass."""


class PassBytes(NamedTuple):
    """Bytes a token and channel that passes over activations of 16 bits read and write; proven in the tests."""

    stream: int  # of a block
    dual: int  # more of the image's, where it has a second attention
    last: int  # of the text in the last block, which ends in its keys and values


PASSES: Mapping[Passes, PassBytes] = {
    "plain": PassBytes(64, 22, 16),
    # Norm 4, heads 12, residual with norm 8, GELU by torch 16, residual 6; a second norm 2, heads 12, residual 6.
    "16 bits": PassBytes(46, 20, 16),
    # Norm 3, heads 12, rounding for the projection 3, residual with norm 7, GELU 12, residual 6; 1 + 12 + 3 + 6.
    "8 bits": PassBytes(43, 22, 15),
}


class Cost(NamedTuple):
    """Of one piece of work."""

    products: float = 0.0  # operations of linear layers
    attention: float = 0.0  # operations
    convolutions: float = 0.0  # operations
    weights: float = 0.0  # bytes of weights that are read
    moved: float = 0.0  # bytes that passes over activations read and write

    def __add__(self, other: tuple[object, ...]) -> "Cost":
        assert isinstance(other, Cost)
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> "Cost":
        """The same, so many times."""
        return Cost(*(count * each for each in self))

    def seconds(self, card: Card, *, fp8: bool, attention_8bit: bool = False) -> float:
        """How long `card` takes for it.

        Args:
            fp8: whether linear layers have FP8 weights and round their inputs, where the card can.
            attention_8bit: whether attention is in eight bits (`--fast`), where the card has FP8 units.
        """
        rate = card.fp8 if fp8 and card.fp8 else card.bf16
        products = max(self.products / rate, self.weights / card.bandwidth)
        attending = ATTENTION_8BIT * card.fp8 if attention_8bit and card.fp8 else ATTENTION * card.bf16
        attention = self.attention / attending
        convolutions = self.convolutions / (CONVOLUTION * card.bf16)
        return products + attention + convolutions + self.moved / card.bandwidth


def mmdit_block(config: MMDiTConfig, index: int, work: Work, part: PartShape, *, passes: Passes) -> Cost:
    """Block number `index` of a step."""
    b, n, t, D = work.rows, work.image_tokens(config), work.tokens, config.width
    dual, last = index in config.dual_attention, index == config.depth - 1
    # qkv 3, proj 1, and the MLP's two, in squares of the width.
    stream = 4 + 2 * config.mlp_ratio
    squares = n * (stream + 4 * dual) + t * (3 if last else stream)
    attention = 4 * b * D * ((n + t) ** 2 + (n * n if dual else 0))
    nbytes = PASSES[passes]
    moved = b * D * (n * (nbytes.stream + nbytes.dual * dual) + t * (nbytes.last if last else nbytes.stream))
    return Cost(
        products=2.0 * b * D * D * squares, attention=float(attention), weights=part.units[index], moved=float(moved)
    )


def mmdit_ends(config: MMDiTConfig, work: Work) -> Cost:
    """What a step does before the first block and after the last: embedding, final layer, guidance."""
    b, n, D = work.rows, work.image_tokens(config), config.width
    patch = config.patch_size**2 * config.in_channels
    products = 2.0 * b * D * (work.tokens * config.context_width + 2 * n * patch)
    return Cost(products=products, moved=float(b * n * (10 * D + 40 * patch)))


def modulation(part: PartShape, nbytes: int, work: Work, *, itemsize: int) -> Cost:
    """One adaLN layer of `nbytes` for all steps of one prompt."""
    weights = nbytes / (1 if part.fp8 > 0.5 else itemsize)
    return Cost(products=2.0 * work.steps * weights, weights=float(nbytes))


def controlnet_block(config: ControlNetConfig, work: Work, nbytes: int) -> Cost:
    """One block with its output layer."""
    b, D = work.rows, config.width
    n = work.image_tokens(config.block())
    t = work.tokens if config.joint else 0
    products = 2.0 * b * D * D * ((4 + 2 * config.mlp_ratio) * (n + t) + n)
    return Cost(
        products=products, attention=4.0 * b * D * (n + t) ** 2, weights=float(nbytes), moved=64.0 * b * D * (n + t)
    )


def encoder_layer(config: ClipConfig | T5Config, nbytes: int, work: Work) -> Cost:
    """One layer of a text encoder, for one prompt."""
    if isinstance(config, T5Config):
        length = max(77, work.tokens - 77)
        inner = config.heads * config.head_width
        weights = 4 * config.width * inner + 3 * config.width * config.mlp_width
    else:
        length, inner = config.positions, config.width
        weights = 4 * config.width**2 + 2 * config.width * config.mlp_width
    return Cost(products=2.0 * length * weights, attention=4.0 * length**2 * inner, weights=float(nbytes), moved=0.0)


class Convolution(NamedTuple):
    """One of a VAE's."""

    channels_in: int
    channels_out: int
    side: int  # of the kernel
    height: int
    width: int

    @property
    def operations(self) -> int:
        return 2 * self.side**2 * self.channels_in * self.channels_out * self.height * self.width


def decoder_convolutions(config: VAEConfig, height: int, width: int) -> Iterator[Convolution]:
    """Those of the decoder for latents of this size, in order."""
    top = config.channels[-1]
    yield Convolution(config.latent_channels, top, 3, height, width)
    for _ in range(4):
        yield Convolution(top, top, 3, height, width)  # the middle's two residual blocks
        yield Convolution(top, top, 1, height, width)  # its attention's q, k, v and output
    channels = top
    for level in reversed(range(len(config.channels))):
        own = config.channels[level]
        for block in range(config.layers_per_block + 1):
            before = channels if block == 0 else own
            yield Convolution(before, own, 3, height, width)
            yield Convolution(own, own, 3, height, width)
            if before != own:
                yield Convolution(before, own, 1, height, width)
        channels = own
        if level:
            height, width = 2 * height, 2 * width
            yield Convolution(own, own, 3, height, width)
    yield Convolution(channels, 3, 3, height, width)


def vae_decode(config: VAEConfig, part: PartShape, work: Work) -> Cost:
    """One picture's decoding, whole or in exact chunks; tiles add what their overlap repeats."""
    height, width = work.latents
    convolutions = list(decoder_convolutions(config, height, width))
    # Each reads its input once more for the norm, twice for norm and SiLU as passes of their own, and writes twice.
    moved = sum(2.0 * 2 * c.height * c.width * (2 * c.channels_in + c.channels_out) for c in convolutions)
    return Cost(
        convolutions=float(sum(c.operations for c in convolutions)),
        attention=4.0 * (height * width) ** 2 * config.channels[-1],
        weights=float(part.nbytes),
        moved=moved,
    )
