"""The models tree: where model files lie, and how a file is found by the name that a user gives.

The layout is ComfyUI's: a root holds `checkpoints`, `diffusion_models` (or `unet`), `text_encoders` (or `clip`),
`vae`, `loras`, `controlnet`, `embeddings`; whole diffusers folders lie in `diffusers` or among the checkpoints. Other
roots are named in an `extra_model_paths.yaml`, in ComfyUI's format. The model embedded in the package comes last.

Only names are looked at here; what the files are is for `library`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from octavo.checkpoint.header import PICKLE_SUFFIXES
from octavo.errors import ModelNotFoundError, RequestError, did_you_mean

ENVIRONMENT = "OCTAVO_MODELS"
EXTRA_PATHS = "extra_model_paths.yaml"
EMBEDDED = Path(__file__).parent.parent / "embedded" / "models"

# By category the names of its folder, the preferred first.
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "checkpoints": ("checkpoints",),
    "diffusion_models": ("diffusion_models", "unet"),
    "text_encoders": ("text_encoders", "clip"),
    "vae": ("vae",),
    "loras": ("loras",),
    "controlnet": ("controlnet",),
    "embeddings": ("embeddings",),
    "diffusers": ("diffusers",),
}
MODELS = ("checkpoints", "diffusion_models", "diffusers")  # where a diffusion model may lie
# Found too, so that the error can say why they are not read.
UNREADABLE = frozenset({".gguf", *PICKLE_SUFFIXES})
SUFFIXES = frozenset({".safetensors", ".sft", *UNREADABLE})


# Folders of a diffusers model, in the order in which parts are listed.
COMPONENTS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
# What a component's weights are called, the preferred first.
WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = ("", ".fp16", ".bf16")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file, or a diffusers folder, in the tree."""

    category: str
    name: str  # from the category's folder on, with slashes
    path: Path

    @property
    def embedded(self) -> bool:
        return self.path.is_relative_to(EMBEDDED)


class Folders:
    """Places to search, by category, in order."""

    def __init__(self, places: Mapping[str, Sequence[Path]]) -> None:
        self.places = {category: tuple(dict.fromkeys(places.get(category, ()))) for category in CATEGORIES}

    @classmethod
    def standard(
        cls,
        models_dir: Path | str | None = None,
        *,
        extra: Iterable[Path] = (),
        environment: Mapping[str, str] = os.environ,
        working_dir: Path = Path(),
    ) -> "Folders":
        """The places that every command searches.

        Args:
            models_dir: a root, or several separated as in $PATH; without it $OCTAVO_MODELS, without that `./models`.
            extra: more files in the format of extra_model_paths.yaml, beside those found next to the roots.
            environment: where $OCTAVO_MODELS is looked up.
            working_dir: where `./models` is.

        Raises:
            RequestError: an extra_model_paths.yaml cannot be understood.
        """
        named = environment.get(ENVIRONMENT, "") if models_dir is None else os.fspath(models_dir)
        roots = [Path(root).expanduser() for root in named.split(os.pathsep) if root] or [working_dir / "models"]
        # ComfyUI keeps the file beside its models folder.
        beside = [folder / EXTRA_PATHS for root in roots for folder in (root, root.parent)]
        files = [*extra, *(file for file in (*beside, working_dir / EXTRA_PATHS) if file.is_file())]

        first: list[tuple[str, Path]] = []
        rest: list[tuple[str, Path]] = []
        for file in dict.fromkeys(file.absolute() for file in files):
            for is_default, category, folder in _extra_places(file):
                (first if is_default else rest).append((category, folder))
        own, embedded = (
            [(category, root / name) for root in of for category, names in CATEGORIES.items() for name in names]
            for of in (roots, [EMBEDDED])
        )
        places: dict[str, list[Path]] = {}
        for category, folder in (*first, *own, *rest, *embedded):
            places.setdefault(category, []).append(folder)
        return cls(places)

    def files(self, *categories: str) -> list[ModelFile]:
        """All files of these categories (all, if none is given): by place, then by name; one for each name."""
        found: dict[tuple[str, str], ModelFile] = {}
        for category in categories or CATEGORIES:
            for folder in self.places[category]:
                for path in _walk(folder):
                    name = path.relative_to(folder).as_posix()
                    found.setdefault((category, name), ModelFile(category, name, path))
        return list(found.values())

    def find(self, name: str, *categories: str) -> Path:
        """The file or diffusers folder that the user calls `name`.

        Args:
            name: a path; or a name in the tree, with or without folder and extension, in any case, `-` for `_`.
            categories: where to look, in this order of preference; everywhere if none is given.

        Raises:
            ModelNotFoundError: no such file, or several; says the nearest name, or what to download and where to.
        """
        path = Path(name).expanduser()
        if path.is_file() or is_diffusers_folder(path):
            return path
        files = self.files(*categories)
        for spelled in (str, _loosely):
            for form in (_whole, _without_suffix, _last, _stem):
                matches = [file for file in files if spelled(form(file.name)) == spelled(name)]
                if len({file.path.parent for file in matches}) > 1 and form in (_last, _stem):
                    several = ", ".join(f"'{file.name}'" for file in matches)
                    raise ModelNotFoundError(f"'{name}' could be {several}. Give the name with its folder.")
                if matches:
                    return min(matches, key=lambda file: file.path.suffix in UNREADABLE).path
        if path.is_dir():
            return path
        raise ModelNotFoundError(self._nothing_called(name, files, categories))

    def _nothing_called(self, name: str, files: Sequence[ModelFile], categories: Sequence[str]) -> str:
        where = ", ".join(f"'{folder}'" for folder in self.searched(*categories))
        known = [file.name for file in files] + [_stem(file.name) for file in files]
        suggestion = did_you_mean(name, known)
        if suggestion or any(not file.embedded for file in files):
            return f"There is no model '{name}'.{suggestion} 'octavo models' lists what is in {where}."
        return (
            f"There is no model '{name}', nor any other. Looked in {where}. Download one with "
            f"'octavo pull sd3.5-medium', or put a .safetensors file there; ${ENVIRONMENT} names another models folder."
        )

    def searched(self, *categories: str) -> list[Path]:
        """The preferred place of each root for these categories, without the embedded one; for messages."""
        places = [folder for category in categories or ("checkpoints",) for folder in self.places[category]]
        preferred = {names[0] for names in CATEGORIES.values()}
        mine = [folder for folder in places if not folder.is_relative_to(EMBEDDED)]
        return [folder for folder in dict.fromkeys(mine) if folder.is_dir() or folder.name in preferred]


def is_diffusers_folder(path: Path) -> bool:
    """Whether `path` is the root of a diffusers model."""
    return (path / "model_index.json").is_file()


def weights_in(folder: Path) -> Path | None:
    """The file or index with the weights of one diffusers component; None if there is none."""
    for variant in VARIANTS:
        for stem in WEIGHT_STEMS:
            for name in (f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"):
                if (folder / name).is_file():
                    return folder / name
    return None


def _walk(folder: Path) -> Iterator[Path]:
    """Model files and diffusers folders below `folder`, by name; hidden folders and loops of links are left out."""
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if is_diffusers_folder(Path(root)):
            folders.clear()
            if Path(root) != folder:
                yield Path(root)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(root, name)


def _extra_places(file: Path) -> Iterator[tuple[bool, str, Path]]:
    """What an extra_model_paths.yaml adds: whether it comes first, category, folder."""
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # YAML errors come on several lines
        raise RequestError(f"'{file}' cannot be read: {reason}. Correct it or take it away.") from error
    for title, section in _mapping(file, "the file", sections).items():
        fields = _mapping(file, f"'{title}'", section)
        base = file.parent / _expanded(str(fields.get("base_path") or ""))
        for key, value in fields.items():
            category = next((name for name, folders in CATEGORIES.items() if key in folders), None)
            if category is not None and value is not None:
                lines = value if isinstance(value, list) else str(value).splitlines()
                for line in filter(None, (str(line).strip() for line in lines)):
                    yield fields.get("is_default") is True, category, base / _expanded(line)


def _mapping(file: Path, what: str, value: Any) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(
            f"'{file}': {what} should name folders as 'checkpoints: path', but is {value!r:.60}. "
            "Correct it as in ComfyUI's extra_model_paths.yaml.example."
        )
    return value


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def _whole(name: str) -> str:
    return name


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _without_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in SUFFIXES else name


def _stem(name: str) -> str:
    return _without_suffix(_last(name))


def _loosely(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_").replace("\\", "/")
