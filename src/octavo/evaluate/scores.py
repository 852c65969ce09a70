"""What a column's pictures score: one by one, and as a set.

Picture by picture, against the reference's of the same number where both began with the same noise: PSNR, SSIM, the
perceptual distance and the error of the final latents. Each alone: the score of its prompt, whether the checker finds
everything right, the share of words that can be read. As a set: FID and CMMD, against a reference set and against the
reference's pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.evaluate.checker import ATTRIBUTES, judge, load_classifier, read
from octavo.evaluate.drawn import Drawn
from octavo.evaluate.features import FeatureNetwork, PerceptualDistance, features_of, read_pixels
from octavo.evaluate.metrics import (
    MOST_DECIBELS,
    FidTo,
    cmmd,
    cosine_score,
    decibels,
    fid,
    psnr,
    resampled,
    spread,
    squared_error,
    ssim,
)
from octavo.evaluate.prompt_set import Prompt, reference_scenes
from octavo.evaluate.typography import TextReader, share_read
from octavo.pipeline.image import FORMATS, open_image
from octavo.train.drawing import draw, to_bytes

RESAMPLES = 100  # of the bootstrap
RESAMPLES_OF_WIDE_FEATURES = 20  # where one FID takes seconds, above this many features:
WIDE = 256


@dataclass(frozen=True, slots=True)
class ReferenceSet:
    """Pictures that FID and CMMD are counted against."""

    name: str
    features: Tensor  # [N, D]

    @classmethod
    def drawings(cls, network: FeatureNetwork, count: int, size: int) -> ReferenceSet:
        """What the embedded model ought to draw: scenes like the examination's, by other draws, as code draws them."""
        scenes = reference_scenes(count)
        pictures = (
            torch.from_numpy(picture.copy()).movedim(-1, 0)
            for start in range(0, count, 64)
            for picture in to_bytes(draw(scenes[start : start + 64], size))
        )
        return cls(f"{count} drawings of scenes like those asked for, by other draws", features_of(network, pictures))

    @classmethod
    def folder(cls, network: FeatureNetwork, folder: Path) -> ReferenceSet:
        """The pictures of a folder.

        Raises:
            RequestError: a picture cannot be read, or there are too few.
        """
        from octavo.errors import RequestError

        files = sorted(path for path in folder.glob("*") if path.suffix.lower() in FORMATS)
        if len(files) < 2:
            raise RequestError(f"{folder} holds {len(files)} pictures; a reference set needs at least two.")
        return cls(f"{len(files)} pictures of {folder.name}", features_of(network, map(read_pixels, files)))


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one column."""

    by_picture: Mapping[int, Mapping[str, float | bool]]  # by number
    overall: Mapping[str, float]  # see docs/evaluate.md for every name


@dataclass(kw_only=True)
class Scorer:
    """Scores columns against the first of them.

    Attributes:
        prompts: in the order of their numbers.
        reference: the column that others are compared with.
        network: for the prompts' score, FID and CMMD.
        distance: how different two pictures look.
        reader: of words in pictures; None leaves typography to the checker.
        reference_set: for FID and CMMD; None where there is none.
    """

    prompts: Sequence[Prompt]
    reference: Drawn
    network: FeatureNetwork
    distance: PerceptualDistance
    reader: TextReader | None
    reference_set: ReferenceSet | None
    watch: Callable[[str, str, int, int], None]
    _features: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    _resampled: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @cached_property
    def _classifier(self) -> Any:
        return load_classifier()

    @cached_property
    def _texts(self) -> Tensor:
        return self.network.text_features([prompt.text for prompt in self.prompts])

    def score(self, drawn: Drawn) -> Scores:
        """All scores of a column."""
        numbers = sorted(number for number in drawn.paths if number <= len(self.prompts))
        by_picture: dict[int, dict[str, float | bool]] = {}
        errors: list[float] = []
        compared = drawn.same_seed and self.reference.same_seed and drawn is not self.reference
        for done, number in enumerate(numbers):
            self.watch(drawn.name, "score", done, len(numbers))
            pixels = read_pixels(drawn.paths[number])
            values: dict[str, float | bool] = {}
            if compared and number in self.reference.paths:
                wanted = read_pixels(self.reference.paths[number])
                if wanted.shape == pixels.shape:
                    errors.append(squared_error(pixels, wanted))
                    values |= self._apart(pixels, wanted)
            if (record := drawn.records.get(number)) and record.latent_error is not None:
                values["latent_error"] = record.latent_error
            by_picture[number] = values | self._alone(drawn.paths[number], pixels, self.prompts[number - 1])
        _, features = self._features_of(drawn)
        for number, value in zip(numbers, cosine_score(features, self._texts[[n - 1 for n in numbers]]), strict=True):
            by_picture[number]["score"] = float(value)
        self.watch(drawn.name, "score", len(numbers), len(numbers))
        return Scores(by_picture, _overall(by_picture, errors) | self._as_a_set(drawn))

    def _apart(self, pixels: Tensor, wanted: Tensor) -> dict[str, float | bool]:
        return {
            "psnr": psnr(pixels, wanted),
            "ssim": ssim(pixels, wanted),
            "distance": float(self.distance(pixels[None], wanted[None])),
        }

    def _alone(self, path: Path, pixels: Tensor, prompt: Prompt) -> dict[str, float | bool]:
        """What can be said of a picture without another: the checker's verdict, or the words that can be read."""
        if prompt.scene is not None:
            reading = read(np.ascontiguousarray(pixels.movedim(0, -1).numpy()), self._classifier)
            verdict = judge(prompt.scene, reading)
            values: dict[str, float | bool] = {f"right_{name}": verdict[name] for name in (*ATTRIBUTES, "all")}
            word = values.pop("right_word")
            return values | ({"typography": float(word)} if prompt.words else {})
        if self.reader is None or not prompt.words:
            return {}
        return {"typography": share_read(prompt.words, self.reader(open_image(path)))}

    def _features_of(self, drawn: Drawn) -> tuple[list[int], Tensor]:
        """Numbers and features [N, D] of a column's pictures, computed once."""
        if drawn.name not in self._features:
            numbers = sorted(number for number in drawn.paths if number <= len(self.prompts))
            pictures = (read_pixels(drawn.paths[number]) for number in numbers)
            self._features[drawn.name] = numbers, features_of(self.network, pictures)
        return self._features[drawn.name]

    def _as_a_set(self, drawn: Drawn) -> dict[str, float]:
        _, features = self._features_of(drawn)
        _, of_reference = self._features_of(self.reference)
        values: dict[str, float] = {}
        if len(features) < 2 or len(of_reference) < 2:
            return values
        if drawn is self.reference:
            if len(features) > 3:
                values["fid_of_halves"] = fid(features[::2], features[1::2])
        else:
            values["fid_to_reference"] = fid(of_reference, features)
            values["cmmd_to_reference"] = cmmd(of_reference, features)
        if self.reference_set is not None:
            values["fid"] = self._fid(features)
            values["cmmd"] = cmmd(self.reference_set.features, features)
            if drawn is not self.reference:
                values |= self._fid_rise(drawn)
        return values

    def _fid_rise(self, drawn: Drawn) -> dict[str, float]:
        """FID over the reference's, minus 1, over the prompts that both have, and how far chance may move that."""
        numbers, features = self._features_of(drawn)
        there, of_reference = self._features_of(self.reference)
        common = sorted({*numbers} & {*there})
        if len(common) < 2:
            return {}
        a = features[[numbers.index(n) for n in common]]
        b = of_reference[[there.index(n) for n in common]]
        theirs = self._fid(b)
        if not theirs:
            return {}
        key = tuple(common)
        if key not in self._resampled:
            self._resampled[key] = self._by_chance(b)
        low, high = spread(self._by_chance(a) / self._resampled[key] - 1)
        return {"fid_rise": self._fid(a) / theirs - 1, "fid_rise_low": low, "fid_rise_high": high}

    def _by_chance(self, features: Tensor) -> Tensor:
        resamples = RESAMPLES if features.shape[1] <= WIDE else RESAMPLES_OF_WIDE_FEATURES
        return resampled(lambda rows: self._fid(features[rows]), len(features), resamples=resamples)

    @cached_property
    def _fid(self) -> FidTo:
        assert self.reference_set is not None
        return FidTo(self.reference_set.features)


def _overall(by_picture: Mapping[int, Mapping[str, float | bool]], errors: Sequence[float]) -> dict[str, float]:
    """Means over pictures; of PSNR also the median, the worst twentieth's bound, and that of the mean squared error."""
    names = dict.fromkeys(name for values in by_picture.values() for name in values)
    overall: dict[str, float] = {"pictures": len(by_picture)}
    for name in names:
        overall[name] = mean(float(values[name]) for values in by_picture.values() if name in values)
    if errors:
        all_psnr = [float(values["psnr"]) for values in by_picture.values() if "psnr" in values]
        overall["psnr_median"] = median(all_psnr)
        overall["psnr_worst"] = sorted(all_psnr)[len(all_psnr) // 20]
        overall["psnr_pooled"] = decibels(mean(errors))
        overall["equal_pictures"] = sum(value >= MOST_DECIBELS for value in all_psnr)
    return overall


def performance(drawn: Drawn) -> dict[str, float]:
    """Seconds a picture, evaluations a second, peak memory; empty for pictures made elsewhere.

    The first picture after loading is left out of the times where there are others: it reads the weights.
    """
    records = list(drawn.records.values())
    if not records:
        return {}
    warm = [record for record in records if not record.cold] or records
    values = {"seconds": median(record.seconds for record in warm)}
    rates = [record.evaluations / record.denoise_seconds for record in warm if record.denoise_seconds > 0]
    if rates:
        values["evaluations_per_second"] = median(rates)
    values["host_bytes"] = max(record.host_bytes for record in records)
    on_device = [record.device_bytes for record in records if record.device_bytes is not None]
    return values | ({"device_bytes": max(on_device)} if on_device else {})
