"""Texts without the folders of this machine: where its files lie is no business of those who ask over a network.

Errors name files by their paths, for whoever starts the server has to find them. On the way to a client a path within
the folders that the server knows is cut to what the client can name: `models/checkpoints/x.safetensors`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.checkpoint.folders import CATEGORIES, EMBEDDED, Folders
from octavo.errors import JobError, OctavoError, RequestError
from octavo.server.settings import Settings


class Places:
    """The folders of one server, and what they are called instead."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._roots: list[tuple[str, str]] | None = None

    def hidden(self, text: str) -> str:
        """`text` with its paths cut."""
        if os.sep not in text:
            return text
        if self._roots is None:
            self._roots = list(self._found())
        for root, called in self._roots:
            text = text.replace(root + os.sep, called and f"{called}/").replace(root, called or Path(root).name)
        return text

    def within(self, data: Any) -> Any:
        """Plain data with all its texts `hidden`."""
        if isinstance(data, str):
            return self.hidden(data)
        if isinstance(data, Mapping):
            return {key: self.within(value) for key, value in data.items()}
        return [self.within(value) for value in data] if isinstance(data, list | tuple) else data

    def clean(self, error: OctavoError) -> None:
        """Have an error's text, and what a failed node tells, without paths; in place."""
        error.args = tuple(self.within(value) for value in error.args)
        if isinstance(error, JobError) and error.details is not None:
            error.details = self.within(error.details)

    def _found(self) -> list[tuple[str, str]]:
        settings = self._settings
        named = [
            (settings.uploads, ""),
            (settings.inputs, "input"),
            (settings.output_dir, "output"),
            (settings.data_dir, "data"),
            (EMBEDDED, "models"),
        ]
        try:
            places = Folders.standard(settings.models_dir).places
        except RequestError:  # of a file that cannot be read, which whoever started the server is told
            places = {}
        known = {name for names in CATEGORIES.values() for name in names}
        for folder in (folder for folders in places.values() for folder in folders):
            # A category's own folder keeps its name; one of another program's tree is all that is told of it.
            named += [(folder.parent, "models")] if folder.name in known else [(folder, folder.name)]
        if settings.model is not None and Path(settings.model).is_absolute():
            named.append((Path(settings.model).parent, ""))
        forms = [(form, called) for path, called in named for form in (path.absolute(), path.absolute().resolve())]
        roots = {str(form): called for form, called in reversed(forms)}
        # The longest first, so that what lies within another folder is called by its own; "/" is left alone.
        return sorted(((r, c) for r, c in roots.items() if len(r) > 1), key=lambda pair: -len(pair[0]))
