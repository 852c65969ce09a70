"""What a path leads to: a file, an index of shards or a diffusers folder, and the parts inside.

Only headers are read. `load` goes on from here to weights, `describe` to words.
"""

from dataclasses import dataclass
from pathlib import Path

from octavo.checkpoint.folders import COMPONENTS, weights_in
from octavo.checkpoint.header import PICKLE_REMEDY, PICKLE_SUFFIXES
from octavo.checkpoint.kinds import TITLES, Kind, Part, find_parts, what_else
from octavo.checkpoint.tensors import TensorFile, open_tensors
from octavo.errors import ModelNotFoundError, UnsupportedFormatError, WrongModelError

NEEDED = "Give an SD3 or SD3.5 model here, such as sd3.5_medium.safetensors"
# What to do with a sound file of another kind than the one asked for.
BESIDES: dict[Kind, str] = {
    "lora": "it changes a model and is none itself. Keep it in models/loras",
    "controlnet": "it steers a model and is none itself. Keep it in models/controlnet",
    "embedding": "it adds words to prompts. Keep it in models/embeddings and write 'embedding:name' in a prompt",
}


@dataclass(frozen=True, slots=True)
class Located:
    """One part and the file that it is in."""

    file: TensorFile
    part: Part


class Source:
    """All parts that a path leads to; use as a context manager.

    Attributes:
        path: as given.
        parts: in the order diffusion model, text encoders, VAE.
    """

    def __init__(self, path: Path, files: tuple[TensorFile, ...]) -> None:
        self.path = path
        self.files = files
        self.parts = tuple(
            Located(file, part) for file in files for part in find_parts(file.path, file.entries, file.metadata)
        )

    def find(self, *kinds: Kind) -> Located | None:
        """The first part of one of these kinds."""
        return next((located for located in self.parts if located.part.kind in kinds), None)

    def require(self, *kinds: Kind) -> Located:
        """The first part of one of these kinds; WrongModelError, saying what the file is instead, if there is none."""
        located = self.find(*kinds)
        if located is None:
            asked = " or ".join(TITLES[kind] for kind in kinds)
            needed = NEEDED if "mmdit" in kinds else f"Give a file that holds the {asked}"
            raise WrongModelError(f"'{self.path}' {self._what_it_is(asked)}. {needed}.")
        return located

    def _what_it_is(self, asked: str) -> str:
        for located in self.parts:
            if (kind := located.part.kind) in BESIDES:
                return f"is a {TITLES[kind]}: {BESIDES[kind]}"
        if self.parts:
            held = " and ".join(TITLES[located.part.kind] for located in self.parts)
            return f"holds {held}, but no {asked}"
        names = [name for file in self.files for name in file.entries]
        if what := what_else(names):
            return f"is {what}, which Octavo does not run"
        example = f", such as '{min(names)}'" if names else ""
        return f"holds nothing that Octavo knows, but {len(names)} other tensors{example}"

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_source(path: Path) -> Source:
    """Open the file or folder at `path`.

    Raises:
        ModelNotFoundError: there is nothing, or a folder without weights.
        CheckpointError: a file is damaged or of a format that is not read.
    """
    if not path.is_dir():
        return Source(path, (open_tensors(path),))
    weights = [found for name in COMPONENTS if (found := weights_in(path / name)) is not None]
    if not weights and (own := weights_in(path)) is not None:
        weights = [own]
    if not weights:
        inside = (*path.glob("*"), *path.glob("*/*"))
        pickles = sorted(file.name for file in inside if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise UnsupportedFormatError(f"'{path}' has its weights only as pickles ('{pickles[0]}'). {PICKLE_REMEDY}")
        raise ModelNotFoundError(
            f"The folder '{path}' holds no weights: expected a diffusers model with folders such as 'transformer', "
            "or a .safetensors file. Give the file itself, or finish the download."
        )
    return Source(path, tuple(open_tensors(file) for file in weights))
