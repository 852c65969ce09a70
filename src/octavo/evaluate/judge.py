"""The judge: which picture belongs to which words, in numbers, for the embedded model's world and offline.

A small dual encoder, pictures on one side and captions on the other, trained like CLIP (`octavo.train.judge`). Its unit
features give what CLIP's give for real models: `similarity` is computed as CLIP score is, the picture features serve
FID and CMMD, and the feature maps a perceptual distance. They are the judge's numbers and compare only with each other.

It knows drawings of stages 1 to 3 and the words of their captions; a word outside its vocabulary is passed over. It
sees pictures at 64 x 64 pixels. Whether one attribute is right is said more exactly by `checker`.

B pictures or prompts, D width of the features, C channels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from octavo.errors import CorruptFileError, RequestError, WrongModelError

SIDE = 64  # pixels; every picture is resized to this
FEATURES = 64  # D
LONGEST = 18  # known words of a prompt that are read; captions are never longer
TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS = 48, 4, 2
SPOTS = 9  # masks over the last map, by which the picture encoder knows where things are
VOCABULARY_KEY = "octavo.vocabulary"  # in the file's header: the words as a JSON list


class Judge(nn.Module):
    """Both encoders; `load_judge` gives the trained one. All methods can be differentiated.

    Args:
        vocabulary: the words it knows, in lower case.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self.picture = PictureEncoder()
        self.text = TextEncoder(len(self.vocabulary))
        self._index = {word: i for i, word in enumerate(self.vocabulary, start=2)}  # 0 pads, 1 starts

    def image_features(self, pixels: Tensor) -> Tensor:
        """Features of pictures: [B, 3, H, W] uint8 of any size → [B, D] float32 of unit length.

        Raises:
            RequestError: `pixels` has another shape or dtype.
        """
        return F.normalize(self.picture(self.layer_features(pixels)), dim=1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Features of B prompts: [B, D] float32 of unit length.

        Upper and lower case are one; words outside the vocabulary and words after the first `LONGEST` known ones are
        passed over. A prompt without a known word has the features of the empty prompt.
        """
        return F.normalize(self.text(self.tokens(prompts)), dim=1)

    def similarity(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """How well each picture fits its prompt: 100 · max(cos, 0), [B] float32.

        Raises:
            RequestError: not one prompt a picture, or `pixels` is not [B, 3, H, W] uint8.

        Source: Hessel et al. 2021 (arXiv 2104.08718), in the scale of torchmetrics' CLIPScore.
        """
        if len(pixels) != len(prompts):
            raise RequestError(f"{len(pixels)} pictures and {len(prompts)} prompts: give one prompt for each picture.")
        cosine = (self.image_features(pixels) * self.text_features(prompts)).sum(dim=1)
        return 100 * cosine.clamp(min=0)

    def layer_features(self, pixels: Tensor) -> list[Tensor]:
        """The feature map of every layer of the picture encoder: [B, C, h, w] float32 each, none negative.

        Raises:
            RequestError: `pixels` is not [B, 3, H, W] uint8.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise RequestError(
                f"pictures are {pixels.dtype} {list(pixels.shape)}; the judge reads torch.uint8 [B, 3, H, W]."
            )
        return self.picture.maps(resized(pixels))

    def perceptual_distance(self, a: Tensor, b: Tensor) -> Tensor:
        """How different pictures look, as LPIPS with unit weights: [B] float32 from 0 (the same) to 2.

        Each map is scaled to unit length over its channels; the squared differences are summed over channels and
        averaged over places and layers. What 64 x 64 pixels do not show is not seen.

        Args:
            a: pictures, [B, 3, H, W] uint8.
            b: as many, of any size.

        Raises:
            RequestError: their numbers differ, or one is not [B, 3, H, W] uint8.

        Source: Zhang et al. 2018 (arXiv 1801.03924), equation 1.
        """
        if len(a) != len(b):
            raise RequestError(f"{len(a)} pictures cannot be compared one by one with {len(b)}.")
        pairs = zip(self.layer_features(a), self.layer_features(b), strict=True)
        return torch.stack(
            [(F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(dim=1).mean(dim=(1, 2)) for x, y in pairs]
        ).mean(dim=0)

    def matrices(self) -> set[str]:
        """Names of the parameters that Muon is meant for: hidden matrices, no tables and not the first layer."""
        tables = ("picture.convs.0.", "picture.spots.", "text.word.", "text.position", ".near")
        return {name for name, p in self.named_parameters() if p.ndim >= 2 and not any(t in name for t in tables)}

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Numbers of the known words, [B, 1 + longest] int64: a start token, the words, zeros up to the longest."""
        rows = []
        for prompt in prompts:
            known = [self._index[word] for word in re.findall(r"[a-z0-9]+", prompt.lower()) if word in self._index]
            rows.append(torch.tensor([1, *known[:LONGEST]]))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return ids.to(next(self.parameters()).device)


def load_judge(path: Path | None = None) -> Judge:
    """The judge of the package, or that of `path`, in float32 on the CPU; its weights ask for no gradient.

    Raises:
        CorruptFileError: the file is missing or damaged.
        WrongModelError: it holds something else.
    """
    if path is None:
        with as_file(files("octavo.embedded") / "judge.safetensors") as packaged:
            return load_judge(packaged)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(
            f"'{path}' cannot be read as a judge: {error}. `octavo train judge` makes such files."
        ) from error
    if VOCABULARY_KEY not in metadata:
        raise WrongModelError(f"'{path}' is no judge: its header has no {VOCABULARY_KEY}; see `octavo train judge`.")
    judge = Judge(json.loads(metadata[VOCABULARY_KEY]))
    try:
        judge.load_state_dict(weights)
    except RuntimeError as error:
        raise WrongModelError(
            f"'{path}' is no judge of this version: {error}. Train one: `octavo train judge`."
        ) from error
    return judge.eval().requires_grad_(False)


def save_judge(judge: Judge, path: Path) -> None:
    """Write `judge` to `path` in float16, its vocabulary in the header.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written to.
    """
    from octavo.checkpoint.save import save_safetensors

    weights = {name: tensor.half() for name, tensor in judge.state_dict().items()}
    save_safetensors(path, weights, {VOCABULARY_KEY: json.dumps(judge.vocabulary, separators=(",", ":"))})


def resized(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] uint8 → [B, 3, SIDE, SIDE] float32 in [-1, 1]; other shapes than squares are squeezed.

    Squeezed and not cropped, because captions speak of the sides and corners of the whole picture.
    """
    # A few at a time: as float32 a thousand large pictures would fill the memory.
    parts = [
        F.interpolate(part.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
        if part.shape[2:] != (SIDE, SIDE)
        else part.float()
        for part in torch.split(pixels, 32)
    ]
    return torch.cat(parts) / 127.5 - 1


# ── the encoders ──────────────────────────────────────────────────────────────────────────────────────────────────
class PictureEncoder(nn.Module):
    """Five convolutions to a map of 8 x 8 places, read through learnt masks over the places."""

    def __init__(self) -> None:
        super().__init__()
        # in, out, stride; a layer that changes neither adds to its input.
        layers = ((3, 16, 2), (16, 32, 2), (32, 32, 1), (32, 48, 2), (48, 48, 1))
        self.convs = nn.ModuleList(nn.Conv2d(c, d, 3, stride=stride, padding=1, bias=False) for c, d, stride in layers)
        self.norms = nn.ModuleList(nn.GroupNorm(4, d) for _, d, _ in layers)
        self.spots = nn.Linear((SIDE // 8) ** 2, SPOTS)
        self.hidden = nn.Linear(SPOTS * 48, FEATURES)
        self.out = nn.Linear(FEATURES, FEATURES)

    def maps(self, x: Tensor) -> list[Tensor]:
        """[B, 3, SIDE, SIDE] float32 in [-1, 1] → the map after every layer."""
        maps = []
        x = x.contiguous(memory_format=torch.channels_last)  # convolutions take two thirds of the time so, on a CPU
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = F.relu(norm(conv(x)))
            x = x + y if x.shape == y.shape else y
            maps.append(x)
        return maps

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """What `maps` gave → features [B, D], not yet of unit length."""
        seen = self.spots(maps[-1].flatten(2)).flatten(1)
        out: Tensor = self.out(F.gelu(self.hidden(seen)))
        return out


class TextEncoder(nn.Module):
    """A transformer over words, read at the start token."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.word = nn.Embedding(2 + words, TEXT_WIDTH)
        self.position = nn.Parameter(torch.randn(1 + LONGEST, TEXT_WIDTH))
        self.blocks = nn.ModuleList(TextBlock() for _ in range(TEXT_LAYERS))
        self.norm = nn.LayerNorm(TEXT_WIDTH)
        self.out = nn.Linear(TEXT_WIDTH, FEATURES)

    def forward(self, ids: Tensor) -> Tensor:
        """Token numbers [B, L] → features [B, D], not yet of unit length."""
        x = self.word(ids) + self.position[: ids.shape[1]]
        padding = torch.where(ids > 0, 0.0, float("-inf"))[:, None, None, :]
        index = torch.arange(ids.shape[1], device=ids.device)
        apart = index[:, None] - index + LONGEST  # number of each distance, from -LONGEST to LONGEST
        for block in self.blocks:
            x = block(x, padding, apart)
        out: Tensor = self.out(self.norm(x[:, 0]))
        return out


class TextBlock(nn.Module):
    """Attention and MLP, each after a norm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(TEXT_WIDTH)
        self.qkv = nn.Linear(TEXT_WIDTH, 3 * TEXT_WIDTH)
        self.near = nn.Parameter(torch.zeros(TEXT_HEADS, 2 * LONGEST + 1))  # added to attention by distance
        self.proj = nn.Linear(TEXT_WIDTH, TEXT_WIDTH)
        self.norm2 = nn.LayerNorm(TEXT_WIDTH)
        self.fc1 = nn.Linear(TEXT_WIDTH, 4 * TEXT_WIDTH)
        self.fc2 = nn.Linear(4 * TEXT_WIDTH, TEXT_WIDTH)

    def forward(self, x: Tensor, padding: Tensor, apart: Tensor) -> Tensor:
        """`x` [B, L, width]; `padding` [B, 1, 1, L] is -inf where there is no word; `apart` [L, L] as in `near`."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, TEXT_HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(
            F.scaled_dot_product_attention(q, k, v, padding + self.near[:, apart]).transpose(1, 2).flatten(2)
        )
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out
