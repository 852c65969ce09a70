"""All of a server that needs torch, put together. Imported in the background, see `state`."""

from octavo.engine.batch import Batcher
from octavo.engine.drawing import drawing
from octavo.engine.metrics import fp8_layers
from octavo.graph.nodes import NODES
from octavo.graph.runner import Workshop, graph_runner
from octavo.pipeline.shelf import LoadSettings, Shelf
from octavo.pipeline.speed import speed_called
from octavo.placement.threads import is_large, take_threads
from octavo.server.state import State, Works


def load(state: State) -> Works:
    """The shelf, the batcher, and who runs what.

    Raises:
        OctavoError: no such model or device, a file that cannot be used.
    """
    settings, metrics = state.settings, state.metrics
    loading = {**settings.loading, "text_encoders": tuple(settings.loading.get("text_encoders", ()))}
    shelf = Shelf(LoadSettings(models_dir=settings.models_dir, **loading))
    components = shelf.components(settings.model)
    shelf.when_loaded = lambda part: metrics.load(f"{part.path.stem} ({part.kind})")
    # Before the device's thread begins, for it keeps the number that it finds then.
    take_threads(settings.threads, shelf.device, measure=is_large(components.mmdit.skeleton))
    # Under a budget that the owner has named, no turn is larger than what was planned for.
    placing = components.placing
    most = None if placing is None or not placing.budget.named else placing.tokens
    batcher = Batcher(max_tokens=most, metrics=metrics, relief=shelf.free, smaller=shelf.smaller)
    metrics.watch_fp8(lambda: fp8_layers(model for part in shelf.loaded if (model := part.in_memory) is not None))

    def warm_up() -> None:
        """Read the weights of the server's own model, so that the first request need not wait for them."""
        for part in (*components.encoders, components.mmdit, components.vae):
            batcher.do(part)
        batcher.do(lambda: components.done(*components.encoders, components.vae))

    workshop = Workshop(
        shelf=shelf,
        input_dir=settings.inputs,
        output_dir=settings.output_dir,
        temp_dir=settings.temp_dir,
        solve=batcher.solve,
        on_device=batcher.do,
        max_pixels=settings.max_pixels,
        speed=speed_called(settings.speed),
    )
    draw = drawing(shelf, batcher, settings.output_dir, model=settings.model, metrics=metrics, watched=state.watched)
    return Works(
        shelf=shelf,
        batcher=batcher,
        nodes=NODES,
        workshop=workshop,
        runners={"generate": draw, "graph": graph_runner(workshop, watched=state.watched)},
        warm_up=warm_up,
        close=batcher.close,
    )
