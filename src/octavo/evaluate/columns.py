"""What stands side by side in a comparison: Octavo's models, diffusers pipelines, folders of pictures made elsewhere.

On the command line a column is

    sd3.5_medium                            a model, by path or by name
    best=out/best.safetensors@plain-w8a8    under a name of its own, multiplied by a backend that is named
    sd3.5_medium@force-fp8+fast             quantized at load, in the fast mode
    diffusers:FOLDER                        any diffusers pipeline
    FOLDER                                  pictures made elsewhere, in the order of the prompts
"""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from octavo.errors import MissingExtraError, ModelNotFoundError, RequestError
from octavo.fp8.linear import Fp8Linear
from octavo.fp8.prepare import paths
from octavo.pipeline.assemble import load
from octavo.pipeline.components import Components
from octavo.pipeline.image import FORMATS
from octavo.pipeline.request import GenerateRequest

DIFFUSERS = "diffusers:"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelColumn:
    """A model that Octavo draws with. Same seeds as the reference's, so that pictures can be compared one by one.

    Attributes:
        name: in the report.
        load: gives the model; called when its turn comes.
        how: what was asked of the arithmetic, as it stands behind the @.
        keep: whether the model is the caller's, and so is not given up after its turn.
    """

    name: str
    load: Callable[[], Components]
    how: str = ""
    keep: bool = False

    @classmethod
    def of(cls, name: str, components: Components) -> ModelColumn:
        """A model that is in memory already, whatever was done to it there."""
        return cls(name=name, load=lambda: components, keep=True)

    @contextmanager
    def opened(self) -> Iterator[Components]:
        """The model; its memory is given back afterwards, unless it is the caller's."""
        components = self.load()
        try:
            yield components
        finally:
            if not self.keep:
                for part in (components.mmdit, components.vae, *components.encoders):
                    part.release()
                gc.collect()  # what is left in cycles would count as the next column's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderColumn:
    """Pictures that something else made: of the same prompts, but not from the same noise."""

    name: str
    folder: Path

    def pictures(self, prompts: Sequence[str]) -> dict[int, Path]:
        """The pictures by the number of their prompt, which counts from 1.

        Where the folder has a prompts.txt, its first line belongs to the first picture, and so on. Else, where all
        names end in a number, these are the prompts' numbers (from 0 on, if there is a 0); else the order of names is
        that of the prompts.

        Raises:
            RequestError: no pictures, more than there are prompts, or a prompts.txt of other prompts.
        """
        try:
            files = sorted(path for path in self.folder.iterdir() if path.suffix.lower() in FORMATS)
        except OSError as error:
            raise RequestError(f"Cannot read the pictures of {self.folder}: {error.strerror or error}.") from error
        if not files:
            raise RequestError(f"There are no pictures in {self.folder} (looked for {', '.join(FORMATS)}).")
        numbered = _numbers(files)
        listed = self.folder / "prompts.txt"
        if listed.exists():
            numbered = self._by_text(numbered, listed.read_text("utf-8").splitlines(), prompts)
        if beyond := [path.name for number, path in numbered.items() if not 1 <= number <= len(prompts)]:
            raise RequestError(
                f"{self.folder} has pictures beyond the {len(prompts)} prompts, such as {beyond[0]}. Give the prompts "
                "they were made from with --prompts, or number the files by prompt, from 1 on."
            )
        return numbered

    def _by_text(self, numbered: Mapping[int, Path], lines: Sequence[str], prompts: Sequence[str]) -> dict[int, Path]:
        """Pictures of another list of prompts, by where the same prompts stand in ours."""
        places: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts, 1):
            places.setdefault(" ".join(prompt.split()), []).append(number)
        result: dict[int, Path] = {}
        for number, path in sorted(numbered.items()):
            text = " ".join(lines[number - 1].split()) if 0 < number <= len(lines) else ""
            if place := places.get(text):
                result[place.pop(0)] = path
        if not result:
            raise RequestError(
                f"None of the prompts in {self.folder / 'prompts.txt'} is among the {len(prompts)} of this comparison."
            )
        return result


@dataclass(slots=True, kw_only=True)
class DiffusersColumn:
    """A pipeline of diffusers, for models that are not Octavo's."""

    name: str
    path: str
    device: str | None = None
    dtype: str | None = None
    _pipeline: Any = field(default=None, repr=False)

    def pipeline(self) -> Any:
        """The pipeline, loaded.

        Raises:
            MissingExtraError: diffusers is not installed.
            ModelNotFoundError: there is no such pipeline.
        """
        if self._pipeline is not None:
            return self._pipeline
        try:
            from diffusers import DiffusionPipeline
        except ImportError as missing:
            raise MissingExtraError("diffusers is not installed; run: pip install 'octavo[bench]'") from missing
        from octavo.devices import pick_device, pick_dtype

        device = pick_device(self.device)
        try:
            read: Any = DiffusionPipeline.from_pretrained  # untyped where it is installed
            pipeline = read(self.path, dtype=pick_dtype(self.dtype, device))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelNotFoundError(f"diffusers cannot load '{self.path}': {reason}") from error
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline.to(device)
        return self._pipeline

    def draw(self, request: GenerateRequest) -> Image.Image:
        """One picture; what the request leaves open is the pipeline's choice."""
        given = {
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "width": request.width,
            "height": request.height,
            "negative_prompt": request.negative_prompt or None,
        }
        picture = self.pipeline()(
            request.prompt,
            generator=torch.Generator("cpu").manual_seed(request.seed or 0),
            **{key: value for key, value in given.items() if value is not None},
        ).images[0]
        assert isinstance(picture, Image.Image)
        return picture

    def release(self) -> None:
        """Give its memory back."""
        self._pipeline = None


Column = ModelColumn | FolderColumn | DiffusersColumn


def parse_column(text: str, **options: Any) -> Column:
    """A column as it is written on the command line, see above.

    Args:
        text: `NAME=` if it shall have one, then what draws.
        options: for `octavo.load`, and device and dtype for diffusers.

    Raises:
        RequestError: an unknown way to multiply; a model that is not there is found out when it is loaded.
    """
    given, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        given, rest = "", text
    if rest.startswith(DIFFUSERS):
        pipeline = rest.removeprefix(DIFFUSERS)
        return DiffusersColumn(
            name=given or Path(pipeline).name,
            path=pipeline,
            device=options.get("device"),
            dtype=options.get("dtype"),
        )
    path = Path(rest).expanduser()
    if path.is_dir() and not (path / "model_index.json").exists() and any(path.glob("*.[pjwPJW][npeNPE]*")):
        return FolderColumn(name=given or path.name, folder=path)
    model, at, how = (rest, "", "") if path.exists() else rest.rpartition("@")
    if not at:
        model, how = rest, ""
    chosen = {**options, **_arithmetic(how)}
    known = None if model == "embedded" else model
    # A name such as sd3.5_large has no suffix, whatever pathlib thinks.
    default = Path(model).name.removesuffix(".safetensors") + (f"@{how}" if how else "")
    return ModelColumn(name=given or default, load=lambda: load(known, **chosen), how=how)


def _arithmetic(how: str) -> dict[str, Any]:
    """What stands behind the @: `fast`, `force-fp8`, or the name of a backend; several joined by +."""
    options: dict[str, Any] = {}
    for word in filter(None, how.split("+")):
        if word in ("fast", "force-fp8"):
            options[word.replace("-", "_")] = True
        elif "backend" in options:
            raise RequestError(f"@{how} names two backends; give one.")
        else:
            options["backend"] = word
    return options


def _numbers(files: Sequence[Path]) -> dict[int, Path]:
    found = [re.search(r"(\d+)$", path.stem) for path in files]
    numbers = [int(match[1]) for match in found if match]
    if len(set(numbers)) < len(files):
        return dict(enumerate(files, 1))
    first = 0 if 0 in numbers else 1
    return {number + 1 - first: path for number, path in zip(numbers, files, strict=True)}


# ── what is known of a model ──────────────────────────────────────────────────────────────────────────────────────
def model_facts(components: Components) -> dict[str, Any]:
    """What a report says of a model: how it multiplies and what it weighs. Loads the MMDiT."""
    mmdit = components.mmdit()
    in_fp8, in_all = fp8_weights(mmdit)
    return {
        "headline": components.headline,
        "arithmetic": str(paths(mmdit)),
        "fp8_share": in_fp8 / max(1, in_all),
        "weight_bytes": weight_bytes(mmdit),
        "file": components.mmdit.path.name,
    }


def fp8_weights(model: nn.Module) -> tuple[int, int]:
    """Weights of linear layers that are in FP8, and of all linear layers; biases are not counted."""
    in_fp8 = in_all = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | Fp8Linear):
            count = module.in_features * module.out_features
            in_all += count
            in_fp8 += count if isinstance(module, Fp8Linear) else 0
    return in_fp8, in_all


def weight_bytes(model: nn.Module) -> int:
    """Bytes that a model's parameters and buffers take in memory."""
    return sum(tensor.nbytes for tensor in model.state_dict().values() if tensor.device.type != "meta")


def identity(column: ModelColumn, components: Components) -> dict[str, Any]:
    """What a model's pictures depend on, as plain data: told by its files, or by its weights where it is in memory."""
    facts: dict[str, Any] = {
        "arithmetic": column.how,
        "device": components.device.type,
        "dtype": str(components.dtype).removeprefix("torch."),
    }
    if column.keep:
        mmdit = components.mmdit()
        return {**facts, "arithmetic": str(paths(mmdit)), "weights": _digest(mmdit)}
    files = {part.path for part in (components.mmdit, components.vae, *components.encoders)}
    return {**facts, "files": {path.name: _stamp(path) for path in sorted(files)}}


def _digest(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type != "meta":
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _stamp(path: Path) -> str:
    if path.is_dir():
        return "; ".join(f"{file.name} {_stamp(file)}" for file in sorted(path.glob("*.safetensors")))
    status = path.stat()
    return f"{status.st_size} bytes of {status.st_mtime_ns}"
