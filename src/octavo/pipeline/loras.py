"""LoRAs by name, each file read once for the model that it is used with.

What a name means is `Loras.find`'s business, what is in the file `checkpoint.lora`'s, and how it acts
`models.adapter`'s. A `Stack` is what a request's LoRAs come to, by the part of the model that they act on.
"""

import logging
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock

from torch import nn

from octavo.checkpoint.folders import Folders
from octavo.checkpoint.kinds import Kind
from octavo.checkpoint.lora import read_lora
from octavo.errors import ModelNotFoundError, did_you_mean
from octavo.models.adapter import Adapter, Applied
from octavo.pipeline.components import Part
from octavo.pipeline.request import Lora

logger = logging.getLogger(__name__)

CATEGORY = "loras"
MOST = 16  # files that stay read

Adapters = Mapping[Kind, Adapter]
Stack = Mapping[Kind, Applied]


class Loras:
    """The LoRA files of a models tree. Any thread may use it.

    Attributes:
        folders: where files are looked for.
        paths: whether a path of any file may be given too; never for names that come over a network.
    """

    def __init__(self, folders: Folders, *, paths: bool = True, most: int = MOST) -> None:
        self.folders, self.paths = folders, paths
        self._most = most
        self._read: OrderedDict[Hashable, Adapters] = OrderedDict()
        self._lock = Lock()

    def names(self) -> list[str]:
        """What may be named: the files of the tree."""
        return [file.name for file in self.folders.files(CATEGORY)]

    def find(self, name: str) -> Path:
        """The file that is called `name`, with or without its folder and suffix, in any case.

        Raises:
            ModelNotFoundError: there is none; says which there are.
        """
        if self.paths and Path(name).expanduser().is_file():
            return Path(name).expanduser()
        files = self.folders.files(CATEGORY)
        for form in (str, _without_suffix, _stem):
            for fold in (str, str.casefold):
                for file in files:
                    if fold(form(file.name)) == fold(_without_suffix(name) if form is not str else name):
                        return file.path
        known = [file.name for file in files]
        there = f"There are: {', '.join(known)}." if known else "There is none yet: put LoRA files in models/loras."
        raise ModelNotFoundError(f"There is no LoRA '{name[:200]}'.{did_you_mean(name, map(_stem, known))} {there}")

    def read(self, name: str, parts: Sequence[Part[nn.Module]]) -> Adapters:
        """What a file does to these parts; only headers of theirs are needed.

        Raises:
            ModelNotFoundError: there is no such file.
            CheckpointError: as `read_lora`.
        """
        path = self.find(name)
        stat = path.stat()
        key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size, tuple(parts))
        adapters: Adapters
        with self._lock:
            if key in self._read:
                self._read.move_to_end(key)
                return self._read[key]
        adapters = read_lora(path, {part.kind: part.skeleton for part in parts})
        with self._lock:
            # Another thread may have been quicker; one file must be one adapter, so that its users share calls.
            adapters = self._read.setdefault(key, adapters)
            while len(self._read) > self._most:
                _release(self._read.popitem(last=False)[1])
        return adapters

    def stack(self, loras: Iterable[Lora], parts: Sequence[Part[nn.Module]]) -> Stack:
        """What several LoRAs do to these parts together, in order; those of strength 0 are left out.

        Raises:
            As `read`.
        """
        stack: dict[Kind, Applied] = {}
        for lora in loras:
            for kind, adapter in self.read(lora.name, parts).items():
                strength = lora.strength if kind == "mmdit" else lora.in_text
                if strength:
                    stack[kind] = (*stack.get(kind, ()), (adapter, float(strength)))
        return stack

    def release(self) -> None:
        """Forget what was read; those who still use an adapter keep it."""
        with self._lock:
            for adapters in self._read.values():
                _release(adapters)
            self._read.clear()


def _release(adapters: Adapters) -> None:
    for adapter in adapters.values():
        adapter.release()


def _stem(name: str) -> str:
    return _without_suffix(name).rpartition("/")[2]


def _without_suffix(name: str) -> str:
    return name.removesuffix(".safetensors").removesuffix(".sft")
