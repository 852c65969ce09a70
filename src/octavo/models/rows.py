"""The VAE layer by layer, each layer some rows of the picture at a time: little memory, and on a CPU little time.

The definition is `vae.Encoder.forward` and `vae.Decoder.forward`; the results differ from theirs by rounding alone.
What is whole at any time is one layer's input and its output. All that lies between, norm and SiLU, borders, the
doubled input of an upsampling, is made for a few rows, used and overwritten. Where a picture is cut depends on its size
and on the kind of device, never on what memory is free: its pixels are the same on a full machine as on an empty one,
and the same in a batch as alone.

H rows, W columns, C channels. A map is one picture's activations [H, W, C], contiguous: channels come last.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.models.winograd import FEWEST, IN, Scratch, Winograd

if TYPE_CHECKING:
    from octavo.models.vae import AttnBlock, Decoder, Encoder, Level, Mid, ResnetBlock, VAEConfig

SMALLEST = 1 << 22  # numbers of a picture's largest map; with fewer it goes through the VAE whole
# Numbers of a layer that are worked on at once: on a CPU as many as its caches take, elsewhere enough to keep a GPU
# busy. Constants, since the order of a sum hangs on them.
AT_ONCE_CPU, AT_ONCE = 1 << 19, 1 << 24


def decode(decoder: "Decoder", z: Tensor) -> Tensor:
    """`Decoder.forward`, one picture of the batch after the other."""
    return torch.cat([_decode(decoder, picture) for picture in z])


def encode(encoder: "Encoder", pixels: Tensor) -> Tensor:
    """`Encoder.forward`, one picture of the batch after the other."""
    return torch.cat([_encode(encoder, picture) for picture in pixels])


def by_rows(config: "VAEConfig", height: int, width: int) -> bool:
    """Whether a picture of so many pixels is large enough to go through the VAE by rows; nothing else decides it."""
    whole = height % config.factor == width % config.factor == 0
    return whole and height * width * max(config.channels[:2]) >= SMALLEST


def decode_bytes(config: "VAEConfig", height: int, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Most bytes that decoding to so many pixels holds beside the weights, a library's own workspace aside.

    It is a layer's input and output, and the rows that are worked on. The largest pair belongs to the first block at
    full size: of the released VAE (256 + 128) · height · width numbers, 0.75 GiB for 1024x1024 in bfloat16.
    """
    layers = []
    for i, channels in enumerate(config.channels):
        before = config.channels[min(i + 1, len(config.channels) - 1)]
        layers.append((height >> i, width >> i, before + channels, max(before, channels)))
        if i:  # to twice the size
            layers.append((height >> i, width >> i, 5 * channels, 4 * channels))
    return _bytes(config, layers, dtype, device)


def encode_bytes(config: "VAEConfig", height: int, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """The same of encoding: of the released VAE 2 · 128 · height · width numbers, and the rows."""
    layers = []
    for i, channels in enumerate(config.channels):
        before = config.channels[max(i - 1, 0)]
        layers.append((height >> i, width >> i, max(before + channels, 2 * channels), max(before, channels)))
    return _bytes(config, layers, dtype, device)


def _bytes(
    config: "VAEConfig", layers: list[tuple[int, int, int, int]], dtype: torch.dtype, device: torch.device
) -> int:
    """For layers of so many rows, columns, channels of input and output together, and channels worked on at once."""
    height, width, widest = layers[-1][0], layers[-1][1], max(config.channels)
    # In the middle: the map, its norm, queries, keys, values and what they give.
    maps = max(6 * widest * height * width, *(rows * columns * both for rows, columns, both, _ in layers))
    row = max(columns * channels for _, columns, _, channels in layers)
    if device.type == "cpu":
        # Rows with their border, squares and products in and out of their transforms; and the weight's.
        return maps * dtype.itemsize + (12 * max(AT_ONCE_CPU, 4 * row) + (IN * widest) ** 2) * 4
    # Rows with their border, doubled, convolved, and what is added to them.
    return (maps + 5 * max(AT_ONCE, 4 * row)) * dtype.itemsize


def _decode(decoder: "Decoder", z: Tensor) -> Tensor:
    walk = Walk(z)
    walk.convolve(decoder.conv_in)
    walk.mid(decoder.mid)
    for level in reversed(decoder.up):
        walk.level(cast("Level", level))
    walk.convolve(decoder.conv_out, norm=decoder.norm_out)
    return walk.picture()


def _encode(encoder: "Encoder", pixels: Tensor) -> Tensor:
    walk = Walk(pixels)
    walk.convolve(encoder.conv_in)
    for level in encoder.down:
        walk.level(cast("Level", level))
    walk.mid(encoder.mid)
    walk.convolve(encoder.conv_out, norm=encoder.norm_out)
    return walk.picture()


class Walk:
    """One picture on its way. Only this object holds its map, so that a layer's input is freed with its last use."""

    def __init__(self, picture: Tensor) -> None:
        """Start with a picture [C, H, W]."""
        self.x = picture.permute(1, 2, 0).contiguous()
        self._scratch = Scratch()

    def picture(self) -> Tensor:
        """[1, C, H, W]."""
        return self.x.permute(2, 0, 1)[None].contiguous()

    def level(self, level: "Level") -> None:
        """Residual blocks, then perhaps a change of resolution."""
        for block in level.block:
            self.residual(cast("ResnetBlock", block))
        if not isinstance(level.downsample, nn.Identity):
            self.convolve(cast(nn.Conv2d, level.downsample.conv), change="half")
        if not isinstance(level.upsample, nn.Identity):
            self.convolve(cast(nn.Conv2d, level.upsample.conv), change="double")

    def mid(self, mid: "Mid") -> None:
        """Residual, attention, residual."""
        self.residual(mid.block_1)
        self.attend(mid.attn_1)
        self.residual(mid.block_2)

    def residual(self, block: "ResnetBlock") -> None:
        """Two convolutions beside a shortcut: two maps at once, since the second one overwrites its own input."""
        x, self.x = self.x, self._convolved(block.conv1, block.norm1)
        self._convolved(block.conv2, block.norm2, out=self.x, plus=_shortcut(x, block.nin_shortcut))

    def convolve(self, conv: nn.Conv2d, *, norm: nn.GroupNorm | None = None, change: str = "") -> None:
        """One convolution, after norm and SiLU where there is a norm; `change` is "", "double" or "half"."""
        self.x = self._convolved(conv, norm, change=change)

    def attend(self, block: "AttnBlock") -> None:
        """Attention of all pixels, some rows of its logits at a time; it is added to the map."""
        pixels = self.x.view(-1, self.x.shape[-1])
        normed = _scale_and_shift(self.x, block.norm).of(pixels).to(pixels.dtype)
        q, k, v = (_pointwise(normed, conv) for conv in (block.q, block.k, block.v))
        del normed
        attended = torch.empty_like(q)
        rows = max(1, _at_once(q) // len(q))
        for top in range(0, len(q), rows):
            attended[top : top + rows] = _attention(q[top : top + rows], k, v)
        pixels += _pointwise(attended, block.proj_out)

    def _convolved(
        self,
        conv: nn.Conv2d,
        norm: nn.GroupNorm | None,
        *,
        change: str = "",
        out: Tensor | None = None,
        plus: Callable[[slice], Tensor] | None = None,
    ) -> Tensor:
        """`conv` of the map, of its norm and SiLU where there is a norm.

        Args:
            out: filled; may be the map itself. A new one if None.
            plus: gives what is added to some rows of the result.
        """
        x = self.x
        (H, W, C), K = x.shape, len(conv.weight)
        up, down = (2 if change == "double" else 1), (2 if change == "half" else 1)
        if out is None:
            out = x.new_empty(H * up // down, W * up // down, K)
        prepared = None if norm is None else _scale_and_shift(x, norm)
        kernel = kernel_of(conv, x, change, self._scratch)
        step = rows_at_once(_at_once(x), W * max(C, K * up * up), H)
        # The border stays zero: what is filled below ends one column before it.
        room = x.new_zeros(step + 2, _whole(W, kernel.step) + 2, C)
        for top in range(0, H, step):
            bottom = min(top + step, H)
            if top:  # the last two rows are the first ones now; of x they may be overwritten
                room[:2] = room[step:]
            first, last = top + bool(top), min(bottom + 1, H)
            _fill(room[first - top + 1 : last - top + 1, 1 : W + 1], x[first:last], prepared)
            rows = _whole(bottom - top, kernel.step)
            room[last - top + 1 : rows + 2] = 0
            made = slice(top * up // down, bottom * up // down)
            kernel(room[: rows + 2], out[made], None if plus is None else plus(made))
        return out


class Kernel(Protocol):
    """A 3x3 convolution that takes some rows with a border of one on all sides, and fills the rows they give."""

    step: int  # rows, and columns, that it takes are a multiple of this

    def __call__(self, x: Tensor, out: Tensor, plus: Tensor | None) -> None: ...


class Direct:
    """torch's convolution of channels that come last."""

    def __init__(self, conv: nn.Conv2d, change: str) -> None:
        self.step = 2 if change == "half" else 1
        self._weight = conv.weight.contiguous(memory_format=torch.channels_last)
        self._bias, self._change = conv.bias, change

    def __call__(self, x: Tensor, out: Tensor, plus: Tensor | None) -> None:
        picture = x.permute(2, 0, 1)[None]
        if self._change == "half":  # a border on the right and below alone, see `vae.Downsample`
            y = F.conv2d(picture[:, :, 1:, 1:], self._weight, self._bias, stride=2)
        elif self._change == "double":
            y = F.conv2d(F.interpolate(picture, scale_factor=2.0, mode="nearest"), self._weight, self._bias)
            y = y[:, :, 1:-1, 1:-1]
        else:
            y = F.conv2d(picture, self._weight, self._bias)
        rows = y[0].permute(1, 2, 0)[: out.shape[0], : out.shape[1]]
        if plus is None:
            out.copy_(rows)
        else:
            torch.add(rows, plus, out=out)


def kernel_of(conv: nn.Conv2d, x: Tensor, change: str, scratch: Scratch) -> Kernel:
    """Winograd's where it saves time: in float32 on a CPU, with channels enough, and not in steps of two."""
    if (
        change != "half"
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and min(conv.weight.shape[:2]) >= FEWEST
    ):
        return Winograd(conv, scratch, doubled=change == "double")
    return Direct(conv, change)


def rows_at_once(numbers: int, row: int, height: int) -> int:
    """How many rows of `row` numbers are worked on at once: a multiple of four."""
    return min(max(4, numbers // row // 4 * 4), _whole(height, 4))


class ScaleAndShift(NamedTuple):
    """What a group norm does to each channel once its statistics are known: [C] each, in float32 or wider."""

    scale: Tensor
    shift: Tensor

    def of(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


def _scale_and_shift(x: Tensor, norm: nn.GroupNorm) -> ScaleAndShift:
    """Statistics of the whole map, part by part in order, as mean and mean square of the differences from it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    C = x.shape[-1]
    means, variances, shares = [], [], []
    for part in torch.split(x.view(-1, C), max(1, _at_once(x) // C)):
        part = part.to(wide)
        mean = part.mean(0)
        means.append(mean)
        variances.append((part - mean).square_().mean(0))
        shares.append(part.numel() / x.numel())
    share = torch.tensor(shares, dtype=wide, device=x.device)[:, None]
    mean, variance = _merged(torch.stack(means), torch.stack(variances), share)
    each = C // norm.num_groups
    alike = torch.full((each, 1), 1 / each, dtype=wide, device=x.device)
    mean, variance = _merged(mean.view(-1, each).t(), variance.view(-1, each).t(), alike)
    scale = norm.weight.to(wide) * (variance + norm.eps).rsqrt().repeat_interleave(each)
    return ScaleAndShift(scale, norm.bias.to(wide) - mean.repeat_interleave(each) * scale)


def _merged(means: Tensor, variances: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of parts [P, n] together, each part a `share` [P, 1] of the whole."""
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def _fill(room: Tensor, x: Tensor, norm: ScaleAndShift | None) -> None:
    """Rows of a map, after norm and SiLU where there is a norm."""
    if norm is None:
        room.copy_(x)
    elif room.dtype == norm.scale.dtype:
        torch.addcmul(norm.shift, x, norm.scale, out=room)
        F.silu(room, inplace=True)
    else:  # rounded once, in the end
        room.copy_(F.silu(norm.of(x), inplace=True))


def _shortcut(x: Tensor, shortcut: nn.Module) -> Callable[[slice], Tensor]:
    if isinstance(shortcut, nn.Identity):
        return lambda rows: x[rows]
    return lambda rows: _pointwise(x[rows], cast(nn.Conv2d, shortcut))


def _pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution of what has its channels last."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What some pixels [n, C] take from all [L, C]."""
    if q.device.type == "cpu" and q.dtype == torch.float32:
        # torch's kernel for CPUs works on blocks of 32 queries, too few for heads as wide as this one.
        return torch.mm(torch.mm(q * q.shape[-1] ** -0.5, k.t()).softmax(-1), v)
    return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]


def _at_once(x: Tensor) -> int:
    return AT_ONCE_CPU if x.device.type == "cpu" else AT_ONCE


def _whole(count: int, step: int) -> int:
    return -(-count // step) * step
