"""Networks that see: pictures and texts to features, for CLIP score, FID, CMMD and a perceptual distance.

A CLIP model comes through transformers from a folder or the hub. Without one, and for the embedded model, its judge
answers; every number says by its network's name whose it is, for scores of different networks cannot be compared.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from octavo.errors import MissingExtraError, ModelNotFoundError
from octavo.evaluate.judge import load_judge
from octavo.pipeline.image import open_image

BATCH = 16  # pictures a call


class FeatureNetwork(Protocol):
    """What gives features of pictures and texts. D features."""

    name: str  # for the report

    def image_features(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] → float32 [B, D] of unit length."""
        ...

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Texts → float32 [B, D] of unit length."""
        ...


class PerceptualDistance(Protocol):
    """What tells how different two pictures look."""

    name: str  # for the report

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] twice → [B], 0 where they are equal."""
        ...


class JudgeNetwork:
    """The embedded model's judge, see `judge`: it knows the embedded model's world and no other."""

    name = "the embedded model's judge"

    def __init__(self, path: Path | None = None) -> None:
        self.judge = load_judge(path)

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.judge.image_features(pixels)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        return self.judge.text_features(list(texts))

    def distance(self) -> PerceptualDistance:
        """Distance of the judge's feature maps, counted as LPIPS counts, but without weights fitted to people."""
        judge = self.judge

        class Distance:
            name = "perceptual distance (judge)"

            def __call__(self, a: Tensor, b: Tensor) -> Tensor:
                return judge.perceptual_distance(a, b)

        return Distance()


class ClipNetwork:
    """A CLIP model of transformers: `openai/clip-vit-large-patch14`, or a folder with such a model.

    Args:
        source: folder, or name on the hub.
        device: where it runs.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelNotFoundError: there is no such folder, or it cannot be fetched.
    """

    # Of OpenAI's training; folders that differ say so in preprocessor_config.json.
    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import CLIPModel, CLIPTokenizer
        except ImportError as missing:
            raise MissingExtraError("transformers is not installed; run: pip install 'octavo[eval]'") from missing
        try:
            model: Any = CLIPModel.from_pretrained(source)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelNotFoundError(
                f"There is no CLIP model '{source}': {reason} Give a folder with a transformers CLIPModel, or a name "
                "on the hub such as openai/clip-vit-large-patch14."
            ) from error
        self.name = f"CLIP {source}"
        self.device = torch.device(device)
        self.model = model.eval().to(device)
        self.side = int(self.model.config.vision_config.image_size)
        self.mean, self.std = _normalization(Path(source), self.MEAN, self.STD)

    @torch.inference_mode()
    def image_features(self, pixels: Tensor) -> Tensor:
        # As CLIP's own preprocessing: the shorter side to the model's, by bicubic interpolation, then the middle.
        scale = self.side / min(pixels.shape[-2:])
        size = [max(self.side, round(side * scale)) for side in pixels.shape[-2:]]
        x = F.interpolate(pixels.float() / 255, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - self.side) // 2 for side in size)
        x = x[:, :, top : top + self.side, left : left + self.side]
        x = (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
        seen = self.model.vision_model(pixel_values=x.to(self.device)).pooler_output
        return F.normalize(self.model.visual_projection(seen).float(), dim=-1).cpu()

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        limit = int(self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
        )
        read = self.model.text_model(
            input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
        ).pooler_output
        return F.normalize(self.model.text_projection(read).float(), dim=-1).cpu()


def _normalization(
    folder: Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of colours from a folder's preprocessor_config.json, where it has one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        config = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        return tuple(map(float, config["image_mean"])), tuple(map(float, config["image_std"]))
    return mean, std


def read_pixels(path: Path) -> Tensor:
    """A picture file as uint8 [3, H, W].

    Raises:
        RequestError: it cannot be read.
    """
    return pixels_of(open_image(path))


def pixels_of(image: Image.Image) -> Tensor:
    """A picture as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)


@torch.inference_mode()
def features_of(network: FeatureNetwork, pictures: Iterable[Tensor]) -> Tensor:
    """Features [N, D] of pictures uint8 [3, H, W], read as they come; pictures of one size share a call."""
    features: list[Tensor] = []
    batch: list[Tensor] = []
    for pixels in pictures:
        if batch and (len(batch) == BATCH or batch[0].shape != pixels.shape):
            features.append(network.image_features(torch.stack(batch)))
            batch = []
        batch.append(pixels)
    if batch:
        features.append(network.image_features(torch.stack(batch)))
    return torch.cat(features) if features else torch.empty(0, 0)
