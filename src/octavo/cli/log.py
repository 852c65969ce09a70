"""What Octavo logs, shown to those who ask for it by --verbose."""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class ToConsole(logging.Handler):
    """Prints each record as a dim line."""

    def __init__(self, console: "Console") -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), style="dim", markup=False)


def show_log(console: "Console") -> None:
    """Print what is logged from now on to `console`, and to no other one."""
    logger = logging.getLogger("octavo")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, ToConsole)]
    logger.addHandler(ToConsole(console))
    logger.setLevel(logging.INFO)
