"""ControlNets by name or by what they follow, each loaded once; and their pictures, from files.

Files lie in `models/controlnet`. A type, such as canny, means the first of them that follows such pictures and fits the
model; a name means that file.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import cast

import torch
from torch import Tensor, nn

from octavo.checkpoint.folders import Folders
from octavo.checkpoint.source import Located, open_source
from octavo.errors import CheckpointError, ModelNotFoundError, RequestError
from octavo.models import VAE, ControlNet, ControlNetConfig, MMDiTConfig
from octavo.pipeline.components import Arithmetic, Part
from octavo.pipeline.control import Control
from octavo.pipeline.control_request import ControlImage
from octavo.pipeline.edges import canny
from octavo.pipeline.hints import ControlPicture
from octavo.pipeline.image import open_image
from octavo.pipeline.latents import fitted, pixels_of

logger = logging.getLogger(__name__)

CATEGORY = "controlnet"
ASPECT = 0.02  # by how much a control picture's shape may differ from what is drawn without a word

MakePart = Callable[[Located, torch.device, torch.dtype, Arithmetic], Part[nn.Module]]


class ControlNets:
    """The ControlNet files of a models tree. Any thread may use it.

    Attributes:
        folders: where files are looked for.
        paths: whether a path of any file may be given too; never for names that come over a network.
    """

    def __init__(
        self,
        folders: Folders,
        device: torch.device,
        dtype: torch.dtype,
        arithmetic: Arithmetic,
        *,
        make_part: MakePart = Part,
        paths: bool = True,
    ) -> None:
        self.folders, self.paths = folders, paths
        self._device, self._dtype, self._arithmetic, self._make = device, dtype, arithmetic, make_part
        self._parts: dict[tuple[str, int, int], Part[ControlNet]] = {}
        self._lock = Lock()

    def names(self) -> list[str]:
        """What may be named: the files of the tree."""
        return [file.name for file in self.folders.files(CATEGORY)]

    def part(self, name: str) -> Part[ControlNet]:
        """The net in the file called `name`, as `Folders.find` finds it.

        Raises:
            ModelNotFoundError: there is no such file.
            CheckpointError: it is damaged, or holds no ControlNet.
        """
        if not self.paths and name not in self.names():
            raise ModelNotFoundError(f"There is no ControlNet '{name[:200]}'. There are: {', '.join(self.names())}.")
        try:
            return self._at(self.folders.find(name, CATEGORY))
        except ModelNotFoundError as error:
            known = ", ".join(self.names())
            raise ModelNotFoundError(f"{error} ControlNets that are there: {known}.") from error

    def following(self, kind: str, model: MMDiTConfig, called: str) -> Part[ControlNet]:
        """The first net that follows pictures of this kind and fits the model.

        Args:
            kind: blur, canny or depth.
            model: what it is to steer.
            called: the model's name, for messages.

        Raises:
            ModelNotFoundError: there is none; says what to download and where to put it.
        """
        others = []
        for part in self._all():
            config = config_of(part)
            if config.control_type == kind and (config.width, config.pooled_width) == (model.width, model.pooled_width):
                return part
            others.append(part.path.name)
        where = ", ".join(f"'{folder}'" for folder in self.folders.searched(CATEGORY))
        if model.width == MMDiTConfig.large().width:
            todo = f"Run 'octavo pull controlnet-{kind}', or put sd3.5_large_controlnet_{kind}.safetensors there."
        else:
            todo = "Put one that was made for it there, or name it: --control model=FILE,image=PICTURE."
        there = f" There are {', '.join(others)}, which are for other models or other pictures." if others else ""
        raise ModelNotFoundError(
            f"There is no ControlNet for {kind} pictures in {where} that fits {called}.{there} {todo}"
        )

    def _all(self) -> Iterator[Part[ControlNet]]:
        for file in self.folders.files(CATEGORY):
            try:
                yield self._at(file.path)
            except CheckpointError as error:  # a damaged file must not stop a search among many
                logger.info("%s", error)

    def _at(self, path: Path) -> Part[ControlNet]:
        stat = path.stat()
        key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
        with self._lock:
            if key not in self._parts:
                with open_source(path) as source:
                    made = self._make(source.require("controlnet"), self._device, self._dtype, self._arithmetic)
                self._parts[key] = cast("Part[ControlNet]", made)
            return self._parts[key]

    def controls(
        self,
        wishes: Sequence[ControlImage],
        model: MMDiTConfig,
        called: str,
        vae: Callable[[], VAE],
        size: tuple[int, int],
    ) -> tuple[Control, ...]:
        """What a request's controls come to.

        Args:
            wishes: the request's.
            model, called: what is steered, and its name.
            vae: encodes the pictures.
            size: width and height of what is drawn, in pixels.

        Raises:
            ModelNotFoundError: there is no such net.
            CheckpointError: its file is damaged.
            WrongModelError: it was made for another model.
            RequestError: a picture that cannot be read, or has no edges.
        """
        return tuple(self._control(wish, model, called, vae, size) for wish in wishes)

    def _control(
        self, wish: ControlImage, model: MMDiTConfig, called: str, vae: Callable[[], VAE], size: tuple[int, int]
    ) -> Control:
        if wish.model is not None:
            part = self.part(wish.model)
        else:
            assert wish.type is not None, "a control says its type or its model"
            part = self.following(wish.type, model, called)
        config = config_of(part)
        if wish.type is not None and config.control_type not in (None, wish.type):
            raise RequestError(
                f"The ControlNet '{part.path.name}' follows {config.control_type} pictures, not {wish.type}: "
                "leave the type out, or take another file."
            )
        picture = ControlPicture(control_pixels(wish, size), config, vae)
        control = Control(
            net=part,
            config=config,
            name=part.path.name,
            hint=picture,
            strength=wish.strength,
            start=wish.start,
            end=wish.end,
        )
        control.check(model)
        return control


def config_of(part: Part[ControlNet]) -> ControlNetConfig:
    """The net's shape."""
    assert isinstance(part.config, ControlNetConfig)
    return part.config


def control_pixels(wish: ControlImage, size: tuple[int, int]) -> Tensor:
    """The picture that a net is to follow, [1, 3, H, W] in [0, 1].

    Args:
        wish: says which, and whether its edges are to be found.
        size: width and height.

    Raises:
        RequestError: it cannot be read, or has no edges.
    """
    image = open_image(wish.image)
    width, height = size
    if abs(image.width * height / (image.height * width) - 1) > ASPECT:
        logger.warning(
            "The control picture %s is %dx%d, the picture drawn %dx%d: what does not fit is cut off at the sides.",
            Path(wish.image).name,
            image.width,
            image.height,
            width,
            height,
        )
    pixels = (pixels_of(fitted(image, width, height)) + 1) / 2
    if wish.invert:
        pixels = 1 - pixels
    if wish.preprocess == "canny":
        pixels = canny(pixels, wish.low, wish.high).expand(-1, 3, -1, -1)
        if not pixels.any():
            raise RequestError(
                f"{Path(wish.image).name} has no edges at the thresholds {wish.low} and {wish.high}: lower them, as in "
                f"--control type=canny,preprocess=canny,image={Path(wish.image).name},low=0.1,high=0.3."
            )
    return pixels
