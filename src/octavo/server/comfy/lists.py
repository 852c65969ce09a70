"""What there is to choose from in a workflow, on this server."""

from typing import TYPE_CHECKING

from octavo.graph.lists import FileLists

if TYPE_CHECKING:
    from octavo.server.state import State


def lists_of(state: "State") -> FileLists:
    """The models of the shelf and the pictures in the input folder, as they are now."""
    settings = state.settings
    return FileLists(
        shelf=state.shelf, input_dir=settings.inputs, output_dir=settings.output_dir, temp_dir=settings.temp_dir
    )
