"""Ways to attend: who may serve where, who is taken, and that it is told why."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.fp8.attention import FP8, attention_8bit
from octavo.fp8.backends import UnusableError
from octavo.models.attention import attention
from octavo.models.ops import PlainOps, use_ops
from octavo.placement import attention as module
from octavo.placement.attention import (
    ATTENTION_BACKENDS,
    Attending,
    AttentionBackend,
    Case,
    RoundsHeads,
    attention_called,
    choose_attention,
    seconds,
)
from octavo.placement.graphs import Limits, through
from tests.placement.test_graphs import Replayed, captured, inputs, made

HOPPER = Case(dtype=torch.bfloat16, device="cuda", capability=(9, 0))
CPU = Case(dtype=torch.float32, device="cpu")
OURS = ("triton-fp8", "triton-int8-fp8", "triton-int8")


def refused(case: Case) -> dict[str, str]:
    return {b.name: why for b in ATTENTION_BACKENDS if (why := b.refusal(case)) is not None}


def test_the_definition_serves_everywhere_and_comes_first() -> None:
    assert ATTENTION_BACKENDS[0].run is attention
    assert not ATTENTION_BACKENDS[0].needs
    assert choose_attention(CPU).backend.name == "sdpa"
    assert all(case.device != "cpu" or set(refused(case)) == {b.name for b in ATTENTION_BACKENDS[1:]} for case in [CPU])


@pytest.mark.parametrize("name", [b.name for b in ATTENTION_BACKENDS if b.rounds])
def test_eight_bits_only_in_mode_fast_or_by_name(name: str) -> None:
    backend = attention_called(name)
    assert "only in mode 'fast'" in str(backend.refusal(replace(HOPPER, by_name=False))) or "only when" in str(
        backend.refusal(HOPPER)
    )
    permitted = [replace(HOPPER, by_name=True), *([] if name.startswith("plain") else [replace(HOPPER, mode="fast")])]
    for case in permitted:
        assert backend.refusal(case) in (None, f"the package {name}attention is not installed")


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({"capability": (8, 6)}, "triton-fp8", "needs compute capability 8.9, this device has 8.6"),
        ({"capability": (8, 9)}, "fa3", "needs compute capability 9.0, this device has 8.9"),
        ({"width": 72}, "triton-int8", "takes heads of 32 or 64 or 128, not of 72"),
        ({"dtype": torch.float32}, "sdpa-flash", "takes bfloat16 or float16, not float32"),
        ({"device": "mps", "capability": None}, "sdpa-cudnn", "runs on cuda, this is mps"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_limits_are_told(change: dict[str, object], name: str, reason: str) -> None:
    case = replace(HOPPER, mode="fast", **change)  # type: ignore[arg-type]
    assert attention_called(name).refusal(case) == reason


def backends(**rounds: bool) -> list[AttentionBackend]:
    return [
        AttentionBackend(name=name, run=attention, about="", needs=(RoundsHeads("INT8"),) if each else (Anything(),))
        for name, each in rounds.items()
    ]


class Anything:
    def unmet(self, _case: Case, /) -> str | None:
        return None


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({"sdpa": 3.0, "other": 2.0, "rounds": 1.0}, "rounds"),
        ({"sdpa": 3.0, "other": 1.0, "rounds": 0.99}, "other"),  # not worth its error
        ({"sdpa": 1.0, "other": 2.0, "rounds": 3.0}, "sdpa"),
    ],
)
def test_the_fastest_is_taken_if_what_it_rounds_is_worth_it(times: dict[str, float], taken: str) -> None:
    some = [ATTENTION_BACKENDS[0], *backends(other=False, rounds=True)]
    choice = choose_attention(
        replace(HOPPER, mode="fast"), measure=lambda backend, _case: times[backend.name], backends=some
    )
    assert choice.backend.name == taken
    assert set(choice.reasons) == set(times) - {taken}
    assert all("times as slow" in why for why in choice.reasons.values())


def test_one_that_fails_is_not_taken_and_says_why() -> None:
    def measure(backend: AttentionBackend, _case: Case) -> float:
        if backend.name == "other":
            raise UnusableError("fails when tried: no kernel image")
        return 1.0

    choice = choose_attention(HOPPER, measure=measure, backends=[ATTENTION_BACKENDS[0], *backends(other=False)])
    assert choice.backend.name == "sdpa"
    assert choice.reasons == {"other": "fails when tried: no kernel image"}


def test_one_that_is_asked_for_is_taken_or_refused_aloud() -> None:
    assert choose_attention(CPU, wanted=attention_called("plain-fp8")).backend.name == "plain-fp8"
    with pytest.raises(RequestError, match="'fa3' was asked for, but runs on cuda, this is cpu"):
        choose_attention(CPU, wanted=attention_called("fa3"))
    with pytest.raises(RequestError, match=r"no attention 'sdpa-flush'.*Did you mean 'sdpa-flash'"):
        attention_called("sdpa-flush")


def test_a_model_attends_as_chosen_once_for_each_shape() -> None:
    """On a CPU that is the definition itself; one asked for by name is really what the blocks call."""
    model = made()
    args = inputs(model)
    expected = model(*args)
    attend = Attending(torch.device("cpu"), mode="fast")
    use_ops(model, PlainOps(attend))
    assert torch.equal(model(*args), expected)
    model(*inputs(model, side=6))  # 14 tokens rather than 21: near enough
    assert [taken.backend.name for taken in attend.taken.values()] == ["sdpa"]
    model(*inputs(model, side=16))  # 69
    model(*inputs(model, rows=1))
    assert [taken.backend.name for taken in attend.taken.values()] == ["sdpa"] * 3

    calls = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape[1])
        return attention_8bit(q, k, v, rounded=FP8)

    use_ops(model, PlainOps(Attending(torch.device("cpu"), wanted=replace(attention_called("plain-fp8"), run=counted))))
    error = (model(*args) - expected).norm() / expected.norm()
    assert calls == [21, 21]
    assert 1e-4 < error < 0.1


def test_attention_is_chosen_before_it_is_captured() -> None:
    """Measuring waits for the device, which a capture cannot: a shape's first call, which goes without, chooses."""
    model, seam, captures = made(), Replayed(), []

    def measure(_backend: AttentionBackend, _case: Case) -> float:
        captures.append(seam.recorded)
        return 1.0

    use_ops(model, PlainOps(Attending(torch.device("cpu"), measure=measure)))
    graphs = captured(model, seam, after=Limits().after)
    args = inputs(model)
    for _ in range(3):
        assert torch.equal(through(model)(*args), model(*args))
    assert captures == [0]
    assert graphs.replays == 2


def test_times_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second process takes what the first one took, without measuring."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    measured = []

    def count(backend: AttentionBackend, _case: Case) -> float:
        measured.append(backend.name)
        return 2.0 if backend.name == "sdpa" else 1.0

    from octavo.fp8.timing import Timings

    for _ in range(2):
        timings = Timings(count, file=module.FILE, shape=module._shape)
        some = [ATTENTION_BACKENDS[0], *backends(other=False)]
        assert choose_attention(CPU, measure=timings, backends=some).backend.name == "other"
        timings.save()
    assert measured == ["sdpa", "other"]


def test_a_backend_is_timed_and_its_failure_named() -> None:
    case = replace(CPU, batch=1, queries=8, keys=8, heads=1)
    assert 0 < seconds(ATTENTION_BACKENDS[0], case) < 1

    def broken(_q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nis available")

    with pytest.raises(UnusableError, match=r"^fails when tried: no kernel image$"):
        seconds(replace(ATTENTION_BACKENDS[0], run=broken), case)


def test_short_memory_is_no_fault_of_a_backend() -> None:
    """It goes to those who know what to give up."""

    def greedy(_q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(torch.OutOfMemoryError):
        seconds(replace(ATTENTION_BACKENDS[0], run=greedy), replace(CPU, batch=1, queries=8, keys=8, heads=1))


def test_times_are_those_of_what_is_attended_to() -> None:
    """Its strides matter, too; and nothing more than that needs a place in memory."""
    seen = set()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.add((q.data_ptr(), k.data_ptr(), v.data_ptr()))
        return attention(q, k, v)

    q, k, v = torch.randn(1, 8, 3, 2, 16).unbind(2)
    seconds(replace(ATTENTION_BACKENDS[0], run=run), replace(CPU, batch=1, queries=64, keys=64, heads=2), (q, k, v))
    assert seen == {(q.data_ptr(), k.data_ptr(), v.data_ptr())}
