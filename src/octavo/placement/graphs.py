"""A model's work as CUDA graphs: recorded once for inputs of one shape, and then started by one call.

A step of the MMDiT is thousands of kernels, and Python takes longer to start them than a fast GPU to run them. A graph
holds them with their arguments, so that a replay costs the host next to nothing and waits for nothing. What a graph
holds are addresses, hence the rules here: inputs are copied into tensors that never move, results are handed on as
copies, and what the addresses lead to must be what it was (`Captured._stamp`).

    capture(mmdit)                                 # once, after loading
    velocity = through(mmdit)(x, context, table)   # at every step; where nothing is captured this is mmdit(...)

Graphs are kept by bucket: the shapes, strides and dtypes of all tensors, whatever else the arguments say (blocks left
out, how long packed texts are), the LoRAs that act, and the parts of the schedule that calibrated scales are for. How
many, and when a bucket is worth one, are `Limits`. All that touches CUDA is behind `Seam`.
"""

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from octavo.devices import out_of_memory
from octavo.fp8 import Fp8Linear
from octavo.fp8.steps import groups_of
from octavo.models.adapter import Adapter, acting
from octavo.placement.arguments import Spec, rebuild, tensors_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a graph is worth its memory."""

    after: int = 2  # calls of a bucket until it is captured: the last of them is; one that comes once is not worth it
    graphs: int = 16  # of one model; those used longest ago leave first
    nbytes: int = 4 << 30  # of device memory that the graphs of one model hold together
    spare: int = 512 << 20  # bytes of device memory; with fewer free nothing is captured


LIMITS = Limits()
MOST_REASONS = 32  # that are told of one model


class Recording(Protocol):
    """Work that was recorded on fixed addresses."""

    first: Any  # what the work gave when it was warmed up; its owner takes it and leaves None
    outputs: Any  # what the work returned when it was captured; `replay` writes there
    nbytes: int  # of device memory that it took

    def replay(self) -> None:
        """Do the work again, on what the inputs hold now."""


class Seam(Protocol):
    """All that capturing asks of a device."""

    def refusal(self, device: torch.device) -> str | None:
        """Why nothing can be captured on `device`; None where it can."""

    def free(self, device: torch.device) -> int | None:
        """Bytes of its memory that are free; None where it does not tell."""

    def record(self, work: Callable[[], Any], device: torch.device) -> Recording:
        """Warm `work` up, and record it. It reads and writes tensors whose addresses stay."""

    def forget(self) -> None:
        """No recording is left: what they had in common may go."""


def capture(model: nn.Module, *, limits: Limits = LIMITS, seam: Seam | None = None) -> "Captured":
    """Let `through(model)` capture from now on.

    Args:
        model: on its device, its arithmetic settled.
        seam: the device's; CUDA's when not given.
    """
    from octavo.placement.cuda import CudaSeam

    captured = Captured(model, limits, CudaSeam() if seam is None else seam)
    model.captured = captured  # type: ignore[assignment]  # no module, but what torch's annotations know nothing of
    return captured


def captured_by(model: nn.Module) -> "Captured | None":
    """What captures `model`'s work; None where nothing does."""
    found = model.__dict__.get("captured")
    return found if isinstance(found, Captured) else None


def drop_beyond(model: nn.Module, room: int) -> None:
    """Drop the graphs of `model`, if any, where they hold more than `room` bytes."""
    captured = captured_by(model)
    if captured is not None and captured.nbytes > max(room, 0):
        captured.drop(f"they hold {captured.nbytes >> 20} MB, and the memory plan has {max(room, 0) >> 20} MB to spare")


def through(model: nn.Module, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """What to call instead of `model`, or of one of its bound methods.

    Its arguments may be tensors, what is made of tensors (`Modulation`, `Packed`), and plain values, which become part
    of the bucket: numbers that change at each step have to be tensors. Its results are the caller's to keep.
    """
    captured = captured_by(model)
    plain = model if function is None else function
    return plain if captured is None else partial(captured, model, plain)


@dataclass(slots=True, eq=False)
class _Graph:
    """One bucket's recording, with all that its addresses must keep alive."""

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    gives: Spec  # how results are made of outputs
    recording: Recording
    held: object
    adapters: Sequence[Adapter]


class Captured:
    """Graphs of one model; made by `capture`. It holds no reference to the model, whose end is the graphs' end.

    Attributes:
        replays, plain: calls answered by a graph, those that captured it included, and without one.
        reasons: why calls were answered without a graph, the first time that each was met, in order.
    """

    def __init__(self, model: nn.Module, limits: Limits, seam: Seam) -> None:
        self.limits, self.seam = limits, seam
        self.replays = self.plain = 0
        self.reasons: list[str] = []
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._failed: set[Hashable] = set()
        # Tables of modulation are made before the steps that are captured: what makes them may stream, say.
        parts = [module for name, module in model.named_modules() if ".adaLN_modulation" not in name]
        self._modules = weakref.WeakSet(parts)
        self._linears = [weakref.ref(part) for part in parts if isinstance(part, nn.Linear | Fp8Linear)]
        self._takes_ops = [weakref.ref(part) for part in parts if hasattr(part, "ops")]
        self._stamped: list[object] | None = None
        self._unhooked: int | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._graphs)

    def __deepcopy__(self, _memo: object) -> None:
        """A copied model is another one, of which nothing is captured."""
        return

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that its graphs hold."""
        return sum(graph.recording.nbytes for graph in self._graphs.values())

    def __str__(self) -> str:
        why = f"; not captured: {'; '.join(self.reasons)}" if self.reasons else ""
        return f"{len(self)} CUDA graphs in {self.nbytes >> 20} MB, {self.replays} replays{why}"

    def __call__(self, model: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`, by a graph where there is one."""
        if isinstance(function, nn.Module) and function is not model:
            raise TypeError("through(model, …) takes the model itself or its methods")
        with self._lock:
            inputs: list[Tensor] = []
            spec = tensors_in((args, tuple(sorted(kwargs.items()))), inputs)
            reason = self._refusal(model, inputs)
            if reason is None:
                groups, indexes = groups_of(model)
                applied = acting(model)
                key = (
                    getattr(function, "__name__", "forward"),
                    spec,
                    tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs),
                    tuple((id(adapter), strength) for adapter, strength in applied),
                    groups,
                )
                graph = self._known(key)
                if graph is not None:
                    for static, given in zip(graph.inputs, inputs, strict=True):
                        static.copy_(given, non_blocking=True)
                    graph.recording.replay()
                    self.replays += 1
                    return rebuild(graph.gives, (x.clone() for x in graph.outputs))
                if self._is_time(key, inputs):
                    graph = self._record(key, function, spec, inputs, (indexes, applied))
                    if graph is not None:
                        self.replays += 1
                        # What the run before the capture gave, so that a capture costs no evaluation.
                        result, graph.recording.first = graph.recording.first, None
                        return result
            else:
                self._say(reason)
            self.plain += 1
        return function(*args, **kwargs)

    def drop(self, why: str) -> None:
        """Forget all graphs: what they hold is no longer what the model does."""
        if self._graphs:
            logger.info("%d CUDA graphs are dropped: %s.", len(self._graphs), why)
        self._graphs.clear()
        self._seen.clear()
        self._failed.clear()
        self.seam.forget()

    def _known(self, key: Hashable) -> _Graph | None:
        """The graph of a bucket, if it was captured."""
        # A LoRA that gave its tensors back and comes again has others.
        for old in [k for k, graph in self._graphs.items() if not all(adapter.ready for adapter in graph.adapters)]:
            del self._graphs[old]
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
        return graph

    def _is_time(self, key: Hashable, inputs: Sequence[Tensor]) -> bool:
        """Whether a bucket that has no graph is to be captured by this call."""
        self._seen[key] = self._seen.pop(key, 0) + 1
        while len(self._seen) > 8 * self.limits.graphs:
            self._seen.popitem(last=False)
        if self._seen[key] < self.limits.after or key in self._failed:
            return False
        free = self.seam.free(inputs[0].device)
        if free is not None and free < self.limits.spare:
            self._say(f"less than {self.limits.spare >> 20} MB of device memory are free")
            return False
        return True

    def _record(
        self,
        key: Hashable,
        function: Callable[..., Any],
        spec: Spec,
        inputs: Sequence[Tensor],
        held: tuple[object, Sequence[tuple[Adapter, float]]],
    ) -> _Graph | None:
        # Outside of inference mode: tensors that are made there may not be written to elsewhere.
        with torch.inference_mode(False), torch.no_grad():
            static = [torch.empty_like(x).copy_(x) for x in inputs]
        args, kwargs = rebuild(spec, iter(static))
        adapters = [adapter for adapter, _ in held[1]]
        try:
            recording = self.seam.record(lambda: function(*args, **dict(kwargs)), inputs[0].device)
        except RuntimeError as error:
            # Capturing saves time alone, so what prevents it must not cost the picture; but it is said aloud.
            self._failed.add(key)
            # What ends a capture hides what spoilt it.
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            why = "memory does not suffice" if out_of_memory(first) else str(first).strip().partition("\n")[0]
            self._say(f"capturing inputs of {_shapes(inputs)} failed: {why}", logging.WARNING)
            return None
        outputs: list[Tensor] = []
        gives = tensors_in(recording.outputs, outputs)
        graph = _Graph(static, outputs, gives, recording, (held, [adapter.ready for adapter in adapters]), adapters)
        self._graphs[key] = graph
        while len(self._graphs) > 1 and (len(self._graphs) > self.limits.graphs or self.nbytes > self.limits.nbytes):
            self._graphs.popitem(last=False)
        logger.info("CUDA graph captured for inputs of %s: %d MB.", _shapes(inputs), recording.nbytes >> 20)
        return graph

    def _refusal(self, model: nn.Module, inputs: Sequence[Tensor]) -> str | None:
        """Why this call cannot be answered by a graph; drops those that are out of date."""
        if not inputs:
            return "a call without tensors"
        device = inputs[0].device
        if (why := self.seam.refusal(device)) is not None:
            return why
        if any(x.device != device for x in inputs):
            return "inputs are on several devices"
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return "gradients are recorded"
        if (why := self._hooked()) is not None:
            return why
        stamp = self._stamp(model)
        if self._stamped is None or len(stamp) != len(self._stamped) or not all(map(_same, stamp, self._stamped)):
            self.drop("the model's weights or arithmetic have changed")
            self._stamped = stamp
        return None

    def _hooked(self) -> str | None:
        """Which hook a replay would not call, and so must not replace."""
        # Hooks are numbered in order, all modules' together: without new ones, what had none has none.
        newest = RemovableHandle.next_id
        if self._unhooked == newest:
            return None
        for module in self._modules:
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if not getattr(hook, "capturable", False):
                    return f"a hook watches or moves its layers ({getattr(hook, '__module__', None) or 'unknown'})"
        self._unhooked = newest
        return None

    def _stamp(self, model: nn.Module) -> list[object]:
        """What the graphs' addresses and kernels were derived from."""
        stamp: list[object] = [model.training]
        for ref in self._linears:
            linear = ref()
            if isinstance(linear, Fp8Linear):
                stamp += [linear.choice, linear.twin, linear.lora_down, linear.lora_up, linear.input_scale]
                stamp.append(linear.scale.data_ptr())
                stamp.append(None if linear.given_up else linear.q.data_ptr())
            elif linear is not None:
                stamp.append(linear.weight.data_ptr())
        stamp.extend(module.__dict__.get("ops") for ref in self._takes_ops if (module := ref()) is not None)
        return stamp

    def _say(self, reason: str, level: int = logging.INFO) -> None:
        if reason not in self.reasons and len(self.reasons) < MOST_REASONS:
            self.reasons.append(reason)
            logger.log(level, "Not captured as a CUDA graph: %s.", reason)


def _same(a: object, b: object) -> bool:
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)


def _shapes(inputs: Sequence[Tensor]) -> str:
    return ", ".join("×".join(map(str, x.shape)) for x in inputs[:3])
