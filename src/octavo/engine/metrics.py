"""What a server counts, in Prometheus' format.

    metrics = Metrics()
    metrics.request("comfyui", "accepted")
    with metrics.time("encode"): ...
    metrics.render()                       # the text of GET /metrics

Counting is cheap and safe from every thread. What can be looked up (queue, memory, FP8 layers) is not counted but asked
for when the text is made. Each `Metrics` has a registry of its own, so that two servers in one process do not mix.
A server counts before torch is imported, so torch is not imported here: where it is not there yet, nothing is asked.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from time import perf_counter
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector

from octavo._version import __version__

if TYPE_CHECKING:
    from torch import nn

Stage = str
"""What a request spends its time on: encode, denoise, decode; "wait" is from its acceptance until work on it starts."""

Numbers = Callable[[], Mapping[str, int]]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_TURN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_RUNS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """All numbers of one server."""

    CONTENT_TYPE = CONTENT_TYPE_LATEST  # of what `render` gives

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._queue: Numbers = dict
        self._fp8: Numbers = dict
        to = self._registry
        self._requests = Counter(
            "octavo_requests", "Requests by API and what became of them", ["api", "state"], registry=to
        )
        self._steps = Counter("octavo_steps", "Questions of samplers that were answered", registry=to)
        self._forecast = Counter(
            "octavo_evaluations_forecast",
            "Evaluations that a speed level forecast, which no turn was needed for",
            registry=to,
        )
        self._tokens = Counter("octavo_tokens", "Tokens that went through the model, over all rows", registry=to)
        self._batch = Histogram("octavo_batch_size", "Runs that shared one turn", buckets=_RUNS, registry=to)
        self._turns = Histogram(
            "octavo_turn_seconds", "Time of one turn of the running batch", buckets=_TURN_SECONDS, registry=to
        )
        self._stages = Histogram(
            "octavo_stage_seconds", "Time of a request by stage", ["stage"], buckets=_SECONDS, registry=to
        )
        self._loads = Counter("octavo_model_loads", "Models read from files", ["model"], registry=to)
        self._short = Counter("octavo_out_of_memory", "Times that memory did not suffice", registry=to)
        self._registry.register(self)
        ProcessCollector(registry=to)

    def request(self, api: str, state: str) -> None:
        """Count a request.

        Args:
            api: which door it came through: octavo, comfyui, a1111, openai.
            state: accepted, refused, done, failed, cancelled or set_aside.
        """
        self._requests.labels(api, state).inc()

    def turn(self, questions: int, tokens: int, seconds: float) -> None:
        """Count one turn of the running batch: so many questions answered, at the cost of so many tokens."""
        self._steps.inc(questions)
        self._batch.observe(questions)
        self._tokens.inc(tokens)
        self._turns.observe(seconds)

    def forecast(self, evaluations: int) -> None:
        """Count evaluations that were forecast instead of asking the model."""
        self._forecast.inc(evaluations)

    def seconds(self, stage: str, seconds: float) -> None:
        """Count what a request spent on a stage."""
        self._stages.labels(stage).observe(seconds)

    @contextmanager
    def time(self, stage: Stage) -> Iterator[None]:
        """Count the time of a block, whether or not it ends in an error."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds(stage, perf_counter() - start)

    def load(self, model: str) -> None:
        """Count that a model was read from its file."""
        self._loads.labels(model).inc()

    def out_of_memory(self) -> None:
        """Count that the device had too little memory for something, whatever became of it."""
        self._short.inc()

    def watch_queue(self, jobs: Numbers) -> None:
        """Have `jobs` asked how many there are by state, such as {"queued": 3, "running": 2}."""
        self._queue = jobs

    def watch_fp8(self, layers: Numbers) -> None:
        """Have `layers` asked how many linear layers there are by path, see `fp8_layers`."""
        self._fp8 = layers

    def render(self) -> bytes:
        """Everything as Prometheus reads it."""
        text: bytes = generate_latest(self._registry)
        return text

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What is asked for, not counted; called by `render`."""
        yield _gauge("octavo_queue_depth", "Jobs by state", "state", self._queue())
        yield _gauge("octavo_fp8_layers", "FP8 linear layers in memory by how they multiply", "path", self._fp8())
        memory = GaugeMetricFamily("octavo_device_bytes", "Memory of a device", labels=["device", "kind"])
        for (device, kind), nbytes in device_bytes().items():
            memory.add_metric([device, kind], nbytes)
        yield memory
        about = GaugeMetricFamily("octavo_info", "The versions that run", labels=["version", "torch"])
        about.add_metric([__version__, version("torch")], 1)
        yield about


def device_bytes() -> dict[tuple[str, str], int]:
    """Bytes by (device, kind): of each GPU allocated, reserved and free, of the CPU free.

    Nothing before torch is imported.
    """
    torch = sys.modules.get("torch")
    if torch is None or "octavo.devices" not in sys.modules:
        return {}
    free_bytes = sys.modules["octavo.devices"].free_bytes
    found: dict[tuple[str, str], int] = {}
    if (free := free_bytes(torch.device("cpu"))) is not None:
        found["cpu", "free"] = free
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            found[str(device), "allocated"] = torch.cuda.memory_allocated(device)
            found[str(device), "reserved"] = torch.cuda.memory_reserved(device)
            found[str(device), "free"] = torch.cuda.mem_get_info(device)[0]
    return found


def fp8_layers(models: "Iterable[nn.Module]") -> dict[str, int]:
    """How many FP8 linear layers these models have, by the path that they multiply on."""
    from octavo.fp8.prepare import paths

    counts: dict[str, int] = {}
    for model in models:
        for path, count in paths(model).layers.items():
            counts[path] = counts.get(path, 0) + count
    return counts


def _gauge(name: str, about: str, label: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, about, labels=[label])
    for key, value in values.items():
        gauge.add_metric([key], value)
    return gauge
