"""All of a server that needs torch, put together. Imported in the background, see `state`."""

from octavo.engine.batch import Batcher
from octavo.engine.drawing import drawing
from octavo.engine.metrics import Metrics, fp8_layers
from octavo.graph.nodes import NODES
from octavo.graph.runner import run_graph
from octavo.pipeline.shelf import LoadSettings, Shelf
from octavo.server.settings import Settings
from octavo.server.state import Works


def load(settings: Settings, metrics: Metrics) -> Works:
    """The shelf, the batcher, and who runs what.

    Raises:
        OctavoError: no such model or device, a file that cannot be used.
    """
    loading = {**settings.loading, "text_encoders": tuple(settings.loading.get("text_encoders", ()))}
    shelf = Shelf(LoadSettings(models_dir=settings.models_dir, **loading))
    components = shelf.components(settings.model)
    batcher = Batcher(metrics=metrics, relief=shelf.free)
    metrics.watch_fp8(lambda: fp8_layers(part() for part in shelf.loaded))

    def warm_up() -> None:
        """Read the weights of the server's own model, so that the first request need not wait for them."""
        for part in (*components.encoders, components.mmdit, components.vae):
            batcher.do(part)

    return Works(
        shelf=shelf,
        batcher=batcher,
        nodes=NODES,
        runners={"generate": drawing(shelf, batcher, settings.output_dir), "graph": run_graph(shelf, batcher)},
        warm_up=warm_up,
        close=batcher.close,
    )
