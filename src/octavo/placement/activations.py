"""How many bytes the work needs beside the weights, at its widest: bounds from the models' configurations.

Each bound counts the tensors that are alive together at the widest place of the model's code, and is proven there:
tests run the models, follow every allocation, and hold the most that lived against the bound. What libraries take for
themselves meanwhile is `WORKSPACE`.

b rows, n image tokens, t text tokens, D width; sizes in numbers unless they are said to be bytes.
"""

import torch

from octavo.models.clip import ClipConfig
from octavo.models.controlnet import ControlNetConfig
from octavo.models.mmdit import MMDiTConfig
from octavo.models.rows import by_rows, decode_bytes
from octavo.models.t5 import T5Config
from octavo.models.vae import VAEConfig
from octavo.placement.work import Work

WORKSPACE = 64 << 20  # bytes: cuBLAS takes 32 MiB on Hopper, cuDNN a few, torch's allocator rounds up


def mmdit_step(config: MMDiTConfig, work: Work, *, itemsize: int, fp8: bool) -> int:
    """Bytes of one call of the MMDiT, its inputs and output left out.

    The widest place is one of three. The second layer of the image's MLP: the tokens before the block, after its
    attention and what this layer makes of them (3 D), what they attended to (D, once more for a second attention), the
    branch that was added (D), the hidden tokens before and after GELU (2 · 4 D). The same layer of the text, where
    there is more text than image. Attention: what enters the block (D), what the layer of queries, keys and values
    gave, those with their heads (2 · 3 D), and what they attend to, by head and joined again (2 D).

    Args:
        fp8: whether inputs of linear layers are rounded to FP8, which takes a copy of a byte a number.
    """
    b, n, t, D = work.rows, work.image_tokens(config), work.tokens, config.width
    hidden, second = config.mlp_ratio, 1 if config.dual_attention else 0
    mlp = max((5 + second + 2 * hidden) * n + 2 * t, (3 + second) * n + (5 + 2 * hidden) * t)
    wide = itemsize * b * D * max(mlp, (9 + second) * n + 9 * t)
    rounded = b * max(n, t) * (hidden * D + 4) if fp8 else 0
    return wide + rounded


def mmdit_table(config: MMDiTConfig, *, itemsize: int) -> int:
    """Bytes of one row of modulation: one prompt at one level."""
    image = sum(9 if i in config.dual_attention else 6 for i in range(config.depth))
    text = 6 * (config.depth - 1) + 2
    return itemsize * config.width * (image + text + 2)


def modulation(config: MMDiTConfig, work: Work, *, itemsize: int) -> int:
    """Bytes while the last prompt's tables are made: those of all others, and its own twice, for they are joined."""
    return (work.prompts + 1) * work.steps * mmdit_table(config, itemsize=itemsize) + 8 * work.steps * config.width * 4


def tables(config: MMDiTConfig, work: Work, *, itemsize: int) -> int:
    """Bytes of modulation while denoising: all prompts' tables, and the rows of the current step once more."""
    return (work.prompts * work.steps + work.rows) * mmdit_table(config, itemsize=itemsize)


def conditioning(config: MMDiTConfig, work: Work, *, itemsize: int) -> int:
    """Bytes that hold prompts, latents and the sampler's memory: float32 as encoded, and in the model's dtype."""
    height, width = work.latents
    text = (work.prompts * (4 + itemsize) + work.rows * itemsize) * work.tokens * config.context_width
    return text + 12 * 4 * work.rows * config.in_channels * height * width


def controlnet_step(config: ControlNetConfig, work: Work, *, itemsize: int, fp8: bool) -> int:
    """Bytes of a ControlNet's call, all of its residuals, which stay for the MMDiT's call, among them."""
    shape = config.block()
    residuals = config.depth * work.rows * work.image_tokens(shape) * config.width * itemsize
    return residuals + mmdit_step(shape, work, itemsize=itemsize, fp8=fp8)


def encoder(config: ClipConfig | T5Config, work: Work, *, itemsize: int) -> int:
    """Bytes while all prompts are encoded, layer by layer: the residual stream a few times and the wider of attention
    and MLP for the one at work; of each other what enters the layer, what left it, and what CLIP keeps of an earlier
    one. A prompt with weights has an empty one beside it, as long as itself.
    """
    if isinstance(config, T5Config):
        length = max(77, work.tokens - 77)
        inner = config.heads * config.head_width
        widest = max(4 * inner, 3 * config.mlp_width)
    else:
        length = config.positions
        widest = max(4 * config.width, 3 * config.mlp_width)
    # Position biases, and logits where a kernel writes them out in float32.
    square = config.heads * length * length * (2 * itemsize + 8)
    if isinstance(config, T5Config):  # biases for each length
        square += (work.prompts - 1) * config.heads * length * length * itemsize
    others = 3 * (2 * work.prompts - 1) * config.width
    return itemsize * length * (5 * config.width + others + widest) + square + 16 * length * length


def vae_decode(config: VAEConfig, work: Work, *, itemsize: int, tile: int | None = None) -> int:
    """Bytes of decoding one picture, the picture in float32 included.

    Large pictures go through the VAE by rows, see `models.rows`. Of small ones the widest place is the first norm of
    the level nearest the pixels: its input of twice the channels, normalised, and through SiLU.

    Args:
        tile: side in latent pixels; None for the whole.
    """
    height, width = (config.factor * side for side in work.latents)
    side = None if tile is None else config.factor * tile
    if side is not None and side < max(height, width):
        rows, columns = min(side, height), min(side, width)
        # The picture and the weights of its blend, and a tile's pixels a few times over, in float32.
        return _decode(config, rows, columns, itemsize) + 4 * (2 * 3 + 1) * height * width + 4 * 12 * rows * columns
    return _decode(config, height, width, itemsize) + 2 * 4 * 3 * height * width


def _decode(config: VAEConfig, height: int, width: int, itemsize: int) -> int:
    """Of so many pixels at once."""
    if by_rows(config, height, width):
        dtype = torch.bfloat16 if itemsize == 2 else torch.float32
        return decode_bytes(config, height, width, dtype, torch.device("cuda"))
    widest = max(config.channels[0], config.channels[min(1, len(config.channels) - 1)])
    return 3 * widest * height * width * itemsize
