"""Ways to attend, as data, and the choice among them: by measured times, among those whose error is allowed.

    use_ops(model, PlainOps(Attending(device, mode="fast")))

An `AttentionBackend` names a function, its `needs` and its `error`: how far it is from attention in float32 on what the
blocks of a trained model really attend to, in bfloat16 (measured by `benchmarks/attention.py`; that of our own kernels
is their definitions'). Those that round to fewer bits than q, k and v have serve in mode "fast", or when they are asked
for by name. On a CPU the definition is taken, as ever.

B batch, L queries, M keys, H heads, E width of a head.
"""

import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.devices import out_of_memory
from octavo.errors import RequestError, did_you_mean
from octavo.fp8.attention import FP8, INT8, INT8_FP8, Rounded, attention_8bit
from octavo.fp8.backends import UnusableError
from octavo.fp8.needs import Capability, ComputeDtype, Mode, OnDevice, OnlyByName, Package, dtype_name
from octavo.fp8.timing import Timings
from octavo.models.attention import Attend, attention

logger = logging.getLogger(__name__)

Inputs = tuple[Tensor, Tensor, Tensor]  # queries, keys and values
HALVES = (torch.bfloat16, torch.float16)
REPEATS = 5
FILE = "attention-times.json"  # in the cache folder, see `fp8.timing`
WORTH = 0.97  # of the fastest exact way's time: what rounds has to take less, or it costs quality and wins nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All that a choice depends on."""

    batch: int = 2
    queries: int = 4429  # tokens of a picture of 1024×1024 with 333 of text
    keys: int = 4429
    heads: int = 38
    width: int = 64  # of a head
    dtype: torch.dtype
    device: str  # its type: cpu, cuda, mps
    capability: tuple[int, int] | None = None  # CUDA's, where the device has one
    mode: Mode = "exact"
    by_name: bool = False  # the user asked for this one backend, and so permits what it rounds

    def on(self, device: torch.device) -> "Case":
        """The same on a device of this machine."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return replace(self, device=device.type, capability=capability)


class Need(Protocol):
    """A condition on cases or on the machine, as those of `fp8.needs`."""

    def unmet(self, case: Case, /) -> str | None:
        """Why it is not met, as the end of a sentence about the backend; None where it is."""


@dataclass(frozen=True, slots=True)
class RoundsHeads:
    """Leave to round queries, keys or weights to fewer bits than their dtype has."""

    to: str

    def __str__(self) -> str:
        return "mode 'fast'"

    def unmet(self, case: Case) -> str | None:
        """Only where asked for by name or in mode "fast"."""
        return None if case.by_name or case.mode == "fast" else f"rounds to {self.to}: only in mode 'fast'"


@dataclass(frozen=True, slots=True)
class HeadWidth:
    """Heads of one of these widths."""

    widths: tuple[int, ...]

    def __str__(self) -> str:
        return f"heads of {' or '.join(map(str, self.widths))}"

    def unmet(self, case: Case) -> str | None:
        """Why the case's heads are not."""
        return None if case.width in self.widths else f"takes {self}, not of {case.width}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBackend:
    """One way to attend."""

    name: str
    run: Attend
    about: str  # what it does, in a few words
    needs: tuple[Need, ...] = ()
    error: float | None = None  # against float32, relative, median of blocks; None where nobody measured it yet

    @property
    def rounds(self) -> bool:
        """Whether it is less exact than 16 bits are."""
        return any(isinstance(need, RoundsHeads) for need in self.needs)

    def refusal(self, case: Case) -> str | None:
        """Why it cannot serve `case`; None where it can."""
        return next((reason for need in self.needs if (reason := need.unmet(case)) is not None), None)


def _torch(backend: SDPBackend) -> Attend:
    """torch's attention by one of its kernels alone; raises RuntimeError where that does not take the inputs."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).flatten(2)

    return run


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found,unused-ignore]

    out: Any = flash_attn_func(q, k, v, causal=False)
    joined: Tensor = (out[0] if isinstance(out, tuple) else out).flatten(2)  # older ones give the logits' sums, too
    return joined


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn  # type: ignore[import-not-found,unused-ignore]

    out: Tensor = sageattn(q, k, v, tensor_layout="NHD", is_causal=False)
    return out.flatten(2)


def _triton(rounded: Rounded) -> Attend:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from octavo.fp8.kernels.attention import attend

        return attend(q, k, v, rounded=rounded)

    return run


def _plain(rounded: Rounded) -> Attend:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_8bit(q, k, v, rounded=rounded)

    return run


CUDA, IN_16_BITS, OF_64 = OnDevice("cuda"), ComputeDtype(HALVES), HeadWidth((32, 64, 128))
SDPA = AttentionBackend(name="sdpa", about="the definition: torch chooses", run=attention, error=0.0021)
ATTENTION_BACKENDS: Sequence[AttentionBackend] = (
    SDPA,
    AttentionBackend(
        name="sdpa-cudnn",
        about="torch, by cuDNN",
        run=_torch(SDPBackend.CUDNN_ATTENTION),
        needs=(CUDA, Capability(8, 0), IN_16_BITS),
    ),
    AttentionBackend(
        name="sdpa-flash",
        about="torch, by FlashAttention 2",
        run=_torch(SDPBackend.FLASH_ATTENTION),
        needs=(CUDA, Capability(8, 0), IN_16_BITS),
    ),
    AttentionBackend(
        name="sdpa-efficient",
        about="torch, by xFormers' kernel",
        run=_torch(SDPBackend.EFFICIENT_ATTENTION),
        needs=(CUDA,),
    ),
    AttentionBackend(
        name="fa3",
        about="FlashAttention 3",
        run=_fa3,
        needs=(CUDA, Capability(9, 0), IN_16_BITS, Package("flash_attn_interface")),
    ),
    AttentionBackend(
        name="sage",
        about="SageAttention: INT8, and FP8 where the GPU has it",
        run=_sage,
        needs=(CUDA, Capability(8, 0), IN_16_BITS, RoundsHeads("INT8"), Package("sageattention")),
    ),
    AttentionBackend(
        name="triton-fp8",
        about="our own: all of it in e4m3fn",
        run=_triton(FP8),
        error=0.021,
        needs=(CUDA, Capability(8, 9), IN_16_BITS, OF_64, RoundsHeads("e4m3fn"), Package("triton")),
    ),
    AttentionBackend(
        name="triton-int8-fp8",
        about="our own: q and k in INT8, weights and v in e4m3fn",
        run=_triton(INT8_FP8),
        error=0.016,
        needs=(CUDA, Capability(8, 9), IN_16_BITS, OF_64, RoundsHeads("INT8 and e4m3fn"), Package("triton")),
    ),
    AttentionBackend(
        name="triton-int8",
        about="our own: q and k in INT8, the rest in 16 bits",
        run=_triton(INT8),
        error=0.0040,
        needs=(CUDA, Capability(8, 0), IN_16_BITS, OF_64, RoundsHeads("INT8"), Package("triton")),
    ),
    AttentionBackend(
        name="plain-fp8",
        about="the definition of triton-fp8's arithmetic, on any device",
        run=_plain(FP8),
        error=0.021,
        needs=(OnlyByName(), RoundsHeads("e4m3fn")),
    ),
    AttentionBackend(
        name="plain-int8",
        about="the definition of triton-int8's",
        run=_plain(INT8),
        error=0.0040,
        needs=(OnlyByName(), RoundsHeads("INT8")),
    ),
    AttentionBackend(
        name="plain-int8-fp8",
        about="the definition of triton-int8-fp8's",
        run=_plain(INT8_FP8),
        error=0.016,
        needs=(OnlyByName(), RoundsHeads("INT8 and e4m3fn")),
    ),
)


@dataclass(frozen=True, slots=True)
class Taken:
    """A backend for a case, and why no other."""

    backend: AttentionBackend
    reasons: Mapping[str, str]  # by the names of those not taken


Measure = Callable[[AttentionBackend, Case], float]


def attention_called(name: str, backends: Sequence[AttentionBackend] = ATTENTION_BACKENDS) -> AttentionBackend:
    """The backend of this name.

    Raises:
        RequestError: there is none; lists those that are.
    """
    known = {backend.name: backend for backend in backends}
    if name not in known:
        raise RequestError(f"There is no attention '{name}'. Use one of {', '.join(known)}.{did_you_mean(name, known)}")
    return known[name]


def choose_attention(
    case: Case,
    *,
    wanted: AttentionBackend | None = None,
    measure: Measure | None = None,
    backends: Sequence[AttentionBackend] = ATTENTION_BACKENDS,
) -> Taken:
    """The backend for `case`: the one asked for; else the fastest by measured times, or the first without them.

    One that rounds has to be worth it: faster than the fastest exact one by more than chance.

    Args:
        wanted: asked for by the user.
        measure: gives a backend's seconds; raises `UnusableError` where it fails.
        backends: in order of preference; the definition, which has no needs, first.

    Raises:
        RequestError: the one asked for cannot serve the case.
    """
    if wanted is not None:
        if (why := wanted.refusal(replace(case, by_name=True))) is not None:
            raise RequestError(f"The attention '{wanted.name}' was asked for, but {why}.")
        return Taken(wanted, {b.name: f"'{wanted.name}' was asked for" for b in backends if b is not wanted})
    reasons = {backend.name: why for backend in backends if (why := backend.refusal(case)) is not None}
    usable = [backend for backend in backends if backend.name not in reasons]
    if measure is None:
        reasons |= {backend.name: f"'{usable[0].name}' comes before it" for backend in usable[1:]}
        return Taken(usable[0], reasons)
    times: dict[str, float] = {}
    for backend in usable:
        try:
            times[backend.name] = measure(backend, case)
        except UnusableError as error:
            if not backend.needs:  # the definition must work
                raise
            reasons[backend.name] = str(error)
    measured = [backend for backend in usable if backend.name in times]
    exact = min((b for b in measured if not b.rounds), key=lambda b: times[b.name])
    limit = WORTH * times[exact.name]
    taken = min([exact, *(b for b in measured if b.rounds and times[b.name] < limit)], key=lambda b: times[b.name])
    for backend in measured:
        if backend is not taken:
            ratio = times[backend.name] / times[taken.name]
            rounds = ", and rounds" if backend.rounds and not taken.rounds else ""
            reasons[backend.name] = f"measured {ratio:.2f} times as slow as '{taken.name}'{rounds}"
    return Taken(taken, reasons)


@dataclass(slots=True, eq=False)
class Attending:
    """How a model attends: chosen once for each shape that occurs, about. An `Attend`."""

    device: torch.device
    mode: Mode = "exact"
    wanted: AttentionBackend | None = None
    measure: Measure | None = None  # None: on CUDA devices by timing, else not
    backends: Sequence[AttentionBackend] = ATTENTION_BACKENDS
    taken: dict[tuple[object, ...], Taken] = field(default_factory=dict)  # by shapes, see `_about`, and dtype

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, L, H, E] and twice [B, M, H, E] → [B, L, H·E]."""
        batch, queries, heads, width = q.shape
        key = (batch, _about(queries), _about(k.shape[1]), heads, width, q.dtype)
        taken = self.taken.get(key)
        if taken is None:
            taken = self.taken[key] = self._choose(*key, inputs=(q, k, v))
        return taken.backend.run(q, k, v)

    def _choose(
        self, batch: int, queries: int, keys: int, heads: int, width: int, dtype: torch.dtype, inputs: Inputs
    ) -> Taken:
        case = Case(
            batch=batch, queries=queries, keys=keys, heads=heads, width=width, dtype=dtype, device="", mode=self.mode
        ).on(self.device)
        timings = None
        if self.measure is None and self.device.type == "cuda" and self.wanted is None:
            # Kept on disk, so that the next process takes the same one: another would give another last bit.
            timings = Timings(partial(seconds, inputs=inputs), file=FILE, shape=_shape)
        taken = choose_attention(case, wanted=self.wanted, measure=timings or self.measure, backends=self.backends)
        if timings is not None:
            timings.save()
        reasons = {} if self.wanted is not None else taken.reasons  # the same for each of them: it was asked for
        told = "".join(f"\n  not {name}: {why}" for name, why in reasons.items())
        logger.info("Attention of up to %d×%d tokens: %s%s", queries, keys, taken.backend.name, told)
        return taken


def _about(tokens: int) -> int:
    """Lengths that are chosen for together: texts differ by some tokens, and need not be measured each."""
    step = 64 if tokens <= 512 else 512
    return -(-tokens // step) * step


def seconds(backend: AttentionBackend, case: Case, inputs: Inputs | None = None) -> float:
    """Median time of `backend` for `case` on the current CUDA device, or on the CPU.

    Args:
        inputs: queries, keys and values of about that shape; drawn by lot when not given.

    Raises:
        UnusableError: it fails.
        RuntimeError: memory does not suffice.
    """
    device = torch.device(case.device)
    q, k, v = _random(case, device) if inputs is None else inputs
    times = []
    try:
        with torch.inference_mode():
            for _ in range(REPEATS + 2):  # the first ones make ready
                _wait(device)
                start = time.perf_counter()
                backend.run(q, k, v)
                _wait(device)
                times.append(time.perf_counter() - start)
    except _failures() as error:
        if out_of_memory(error):  # of which the backend is innocent
            raise
        raise UnusableError(f"fails when tried: {str(error).strip().partition(chr(10))[0]}") from error
    return median(times[2:])


def _random(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(case.batch, length, case.heads, case.width) for length in (case.queries, case.keys, case.keys)]
    q, k, v = (torch.randn(shape, device=device, dtype=case.dtype, generator=generator) for shape in shapes)
    return q, k, v


def _shape(case: Case) -> str:
    return f"{case.batch}x{case.queries}x{case.keys}, {case.heads} heads of {case.width}, {dtype_name(case.dtype)}"


def _failures() -> tuple[type[Exception], ...]:
    """What a kernel raises that does not run here: torch's errors, a package's, and triton's when it cannot compile."""
    known: tuple[type[Exception], ...] = (RuntimeError, ImportError, NotImplementedError, AssertionError, ValueError)
    if importlib.util.find_spec("triton") is None:
        return known
    from octavo.fp8.kernels.errors import TritonError

    return (*known, TritonError)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
