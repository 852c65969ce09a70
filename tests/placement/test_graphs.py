"""Graphs answer as the model does, bit for bit, and only while what they hold is what the model would do.

CUDA is played by `Replayed`: it records the work on the very tensors it was given, runs it again when asked to, writes
results to the addresses of the first run, and spoils all inputs afterwards, so that an input which is not brought anew
would show.
"""

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo.fp8 import Choice, Fp8Linear, LinearSpec, at_sigmas, watch
from octavo.fp8.matmul import PLAIN, PLAIN_W8A8, PLAIN_WIDE
from octavo.models import MMDiT, MMDiTConfig, Modulation
from octavo.models.adapter import Adapter, LayerChange, LowRank, adapted
from octavo.models.packed import pack
from octavo.placement.arguments import rebuild, tensors_in
from octavo.placement.graphs import Captured, Limits, capture, captured_by, through
from octavo.placement.movers import PlainMover
from octavo.placement.placed import place
from octavo.placement.plan import Stay

CONFIG = MMDiTConfig(depth=2, width=128, heads=2, context_width=32, pooled_width=16, pos_embed_size=16)


class Replay:
    """A recording that is work done again."""

    def __init__(self, seam: "Replayed", work: Callable[[], Any]) -> None:
        self.seam, self.work, self.nbytes = seam, work, seam.each
        self.first, self.outputs = work(), work()
        captured: list[Tensor] = []
        tensors_in(self.outputs, captured)
        spoil([*captured, *seam.buffers])  # a capture computes nothing

    def replay(self) -> None:
        first: list[Tensor] = []
        again: list[Tensor] = []
        tensors_in(self.outputs, first)
        tensors_in(self.work(), again)
        for mine, made in zip(first, again, strict=True):
            mine.copy_(made)
        spoil(self.seam.buffers)


def spoil(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 0)


class Replayed:
    """A device on which recording is possible."""

    def __init__(self, *, each: int = 1 << 20, free: int | None = None, fails: str | None = None) -> None:
        self.each, self.room, self.fails = each, free, fails
        self.recorded, self.forgotten = 0, 0
        self.buffers: list[Tensor] = []

    def refusal(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"this is {device}"

    def free(self, device: torch.device) -> int | None:  # noqa: ARG002
        return self.room

    def record(self, work: Callable[[], Any], device: torch.device) -> Replay:  # noqa: ARG002
        self.recorded += 1
        if self.fails is not None:
            raise RuntimeError(self.fails)
        assert work.__closure__ is not None
        for cell in work.__closure__:
            if isinstance(cell.cell_contents, tuple):
                tensors_in(cell.cell_contents, self.buffers)
        return Replay(self, work)

    def forget(self) -> None:
        self.forgotten += 1


def made(config: MMDiTConfig = CONFIG) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def inputs(model: MMDiT, seed: int = 1, *, rows: int = 2, side: int = 8, tokens: int = 5) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    table = model.modulation(torch.full((rows,), 700.0 - seed), random(rows, 16))
    return random(rows, 16, side, side), random(rows, tokens, 32), table


def captured(model: MMDiT, seam: Replayed | None = None, **limits: int) -> Captured:
    return capture(model, limits=Limits(**{"after": 1, "spare": 0} | limits), seam=seam or Replayed())


def test_replays_equal_the_model_bit_for_bit() -> None:
    """Each with inputs of its own: what was there before is spoilt, so all of them must have been brought anew."""
    model = made()
    graphs = captured(model)
    for seed in range(1, 6):
        args = inputs(model, seed)
        assert torch.equal(through(model)(*args), model(*args))
    assert (graphs.replays, graphs.plain, len(graphs)) == (5, 0, 1)


def test_results_are_the_callers_to_keep() -> None:
    model = made()
    captured(model)
    first = inputs(model, 1)
    kept, expected = through(model)(*first), model(*first)
    through(model)(*inputs(model, 2))
    assert torch.equal(kept, expected)


def test_nothing_is_captured_unasked() -> None:
    model = made()
    assert through(model) is model
    assert captured_by(model) is None


def test_a_shape_that_comes_once_is_not_captured() -> None:
    model, seam = made(), Replayed()
    graphs = captured(model, seam, after=3)
    for seed in range(2):
        through(model)(*inputs(model, seed))
        through(model)(*inputs(model, seed, side=6))
    assert (graphs.replays, graphs.plain, seam.recorded) == (0, 4, 0)
    through(model)(*inputs(model, 3))
    assert (graphs.replays, seam.recorded) == (1, 1)


@pytest.mark.parametrize(
    "other",
    [
        {"rows": 1},
        {"side": 6},
        {"tokens": 4},
        {"skip_layers": (1,)},
        {"control": 1},
    ],
    ids=lambda each: next(iter(each)),
)
def test_each_bucket_has_a_graph_of_its_own(other: dict[str, Any]) -> None:
    model = made()
    graphs = captured(model)
    shape = {name: value for name, value in other.items() if name in ("rows", "side", "tokens")}
    more: dict[str, Any] = {}
    if "skip_layers" in other:
        more["skip_layers"] = other["skip_layers"]
    for seed in range(3):
        args = inputs(model, seed, **shape)
        if "control" in other:
            more["control"] = [None, torch.randn(2, 16, 128)]
        assert torch.equal(through(model)(*args, **more), model(*args, **more))
        plain = inputs(model, seed)
        assert torch.equal(through(model)(*plain), model(*plain))
    assert (len(graphs), graphs.replays) == (2, 6)


def test_methods_have_graphs_of_their_own() -> None:
    """What a model is made of can be captured piece by piece; several results come back as they were."""
    model = made()
    graphs = captured(model)
    x, context, _ = inputs(model)
    for _ in range(2):
        text, image = through(model, model.embed)(x, context)
        assert torch.equal(image, model.embed(x, context)[1])
        assert torch.equal(text, model.embed(x, context)[0])
        assert torch.equal(through(model, model.embed_image)(x), image)
    assert len(graphs) == 2


def test_the_buckets_used_longest_ago_leave_first() -> None:
    model, seam = made(), Replayed()
    graphs = captured(model, seam, graphs=2)
    for side in (2, 4, 2, 6, 2, 4):  # 6 takes the place of 4, which is captured again
        through(model)(*inputs(model, side=side))
    assert (len(graphs), seam.recorded) == (2, 4)


def test_graphs_hold_no_more_bytes_than_they_may() -> None:
    model = made()
    graphs = captured(model, Replayed(each=10 << 20), nbytes=25 << 20)
    for side in (2, 4, 6, 8):
        through(model)(*inputs(model, side=side))
    assert len(graphs) == 2
    assert graphs.nbytes == 20 << 20


def test_where_memory_is_short_nothing_is_captured() -> None:
    model, seam = made(), Replayed(free=100 << 20)
    graphs = captured(model, seam, spare=200 << 20)
    args = inputs(model)
    assert torch.equal(through(model)(*args), model(*args))
    assert (seam.recorded, graphs.plain) == (0, 1)
    assert graphs.reasons == ["less than 200 MB of device memory are free"]


def test_a_capture_that_fails_is_told_and_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    model, seam = made(), Replayed(fails="operation not permitted when stream is capturing\nmore")
    graphs = captured(model, seam)
    args = inputs(model)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert torch.equal(through(model)(*args), model(*args))
    assert (seam.recorded, graphs.plain, len(graphs)) == (1, 3, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "operation not permitted when stream is capturing." in caplog.text


@pytest.mark.parametrize("change", ["ops", "weights", "choice", "low rank"])
def test_a_model_that_is_no_longer_the_same_is_captured_anew(change: str) -> None:
    model, seam = made(), Replayed()
    model.joint_blocks[0].x_block.mlp.fc1 = layer = Fp8Linear(128, 512, LinearSpec(granularity="row"))
    layer.q, layer.choice = torch.randn(512, 128).to(layer.q.dtype), Choice(PLAIN, {})
    graphs = captured(model, seam)
    args = inputs(model)
    before = through(model)(*args)
    if change == "ops":
        model.joint_blocks[0].ops = copy.copy(model.joint_blocks[0].ops)
    elif change == "weights":
        linear = model.joint_blocks[1].x_block.attn.proj
        linear.weight.data = linear.weight.data * 2
    elif change == "choice":
        layer.use(Choice(PLAIN_WIDE, {}))
    else:
        layer.set_low_rank(torch.randn(2, 128), torch.randn(512, 2))
    after = through(model)(*args)
    assert torch.equal(after, model(*args))
    assert torch.equal(after, before) == (change in ("ops", "choice"))
    assert (seam.recorded, seam.forgotten, len(graphs)) == (2, 2, 1)


def lora() -> Adapter:
    change = LayerChange((LowRank(torch.randn(4, 128), torch.randn(128, 4)),))
    return Adapter("hands", {"joint_blocks.0.x_block.attn.proj": change})


def test_loras_are_part_of_the_bucket() -> None:
    model, adapters = made(), (lora(), lora())
    graphs = captured(model)
    args = inputs(model)
    for applied in ((), ((adapters[0], 1.0),), ((adapters[0], 0.5),), ((adapters[1], 1.0),)):
        for _ in range(2):
            with adapted(model, applied):
                assert torch.equal(through(model)(*args), model(*args))
    assert (len(graphs), graphs.replays) == (4, 8)


def test_a_lora_that_left_its_device_takes_its_graphs_along() -> None:
    model, adapter, seam = made(), lora(), Replayed()
    graphs = captured(model, seam)
    args = inputs(model)
    for _ in range(2):
        with adapted(model, ((adapter, 1.0),)):
            through(model)(*args)
        adapter.release()
    assert (seam.recorded, len(graphs)) == (2, 1)


def test_parts_of_the_schedule_are_part_of_the_bucket() -> None:
    """Calibrated scales that follow the schedule: of one part for all rows, or of each row's own."""
    model = made()
    spec = LinearSpec(granularity="row", input_scale=True, step_sigmas=(0.7, 0.3))
    model.joint_blocks[0].x_block.mlp.fc1 = layer = Fp8Linear(128, 512, spec)
    layer.q = torch.randn(512, 128).to(layer.q.dtype)
    layer.input_scale = torch.tensor([1e-3, 1.0, 2e-3])
    layer.choice = Choice(PLAIN_W8A8, {})
    graphs = captured(model)
    args = inputs(model)
    seen = []
    for sigmas in ([0.9, 0.9], [0.5, 0.5], [0.9, 0.1], [0.1, 0.9], [0.8, 0.8]):
        with at_sigmas(model, sigmas):
            seen.append(through(model)(*args))
            assert torch.equal(seen[-1], model(*args))
    assert len(graphs) == 4
    assert torch.equal(seen[0], seen[4])
    assert not torch.equal(seen[0], seen[1])


def test_texts_of_unlike_lengths_have_a_graph_for_their_lengths() -> None:
    """Which token belongs to which row is an input as well; it is spoilt after each replay, as all of them are."""
    model = made()
    graphs = captured(model)
    for lengths in ((3, 5), (5, 3), (3, 5), (3, 6)):
        x, _, table = inputs(model, sum(lengths))
        texts = [torch.randn(1, length, 32) for length in lengths]
        expected = model(x, pack(texts), table)
        assert torch.equal(through(model)(x, pack(texts), table), expected)
    assert (len(graphs), graphs.replays) == (3, 4)


@pytest.mark.parametrize("resident", [0, 1, 2])
def test_streamed_blocks_are_not_captured_and_streamed_modulation_does_not_matter(resident: int) -> None:
    """What streams has another address each time; adaLN is not called within a step."""
    model = made()
    args = inputs(model)
    expected = model(*args)
    place(model, Stay(resident=resident, layers=2), PlainMover(), modulation_streamed=True)
    graphs = captured(model)
    for _ in range(2):
        assert torch.equal(through(model)(*args), expected)
        model.modulation(torch.full((2,), 500.0), torch.randn(2, 16))
    assert graphs.replays == (2 if resident == 2 else 0)
    assert len(graphs.reasons) == (resident < 2)
    assert all("watches or moves its layers (octavo.placement.stream)" in reason for reason in graphs.reasons)


def test_a_model_that_left_its_device_and_came_back_is_captured_anew() -> None:
    model, seam = made(), Replayed()
    placed = place(model, Stay(resident=2, layers=2, leaves=True), PlainMover())
    args = inputs(model)
    expected = model(*args)
    graphs = captured(model, seam)
    for turn in range(3):
        assert torch.equal(through(model)(*args), expected)
        assert graphs.replays == turn + 1
        placed.leave()
        spare = [torch.zeros_like(parameter) for parameter in model.parameters()]  # takes the places that are free
        placed.arrive()
        del spare
    assert seam.recorded > 1


def test_whoever_watches_layers_sees_them_work() -> None:
    """A replay calls no hooks, so it must not take the place of a call that has some."""
    model = made()
    graphs = captured(model)
    args = inputs(model)
    through(model)(*args)
    model.joint_blocks[1].x_block.mlp.fc2.weight.data.fill_(torch.inf)
    with watch(model) as culprit:
        through(model)(*args)
    assert culprit.name == "joint_blocks.1.x_block.mlp.fc2"
    assert graphs.plain == 1
    assert graphs.reasons == ["a hook watches or moves its layers (octavo.fp8.finite)"]
    through(model)(*args)
    assert graphs.replays == 2


@pytest.mark.gradients
def test_with_gradients_nothing_is_captured() -> None:
    model = made()
    graphs = captured(model)
    through(model)(*inputs(model)).sum().backward()
    assert graphs.reasons == ["gradients are recorded"]


def test_another_device_is_refused_with_its_reason() -> None:
    model = made()
    graphs = capture(model, limits=Limits(after=1))
    through(model)(*inputs(model))
    assert graphs.reasons == ["CUDA graphs need a CUDA device, this is cpu"]
    assert "CUDA graphs need a CUDA device" in str(graphs)


def test_graphs_keep_no_model_alive() -> None:
    model = made()
    graphs = captured(model, Replayed(), after=9)
    through(model)(*inputs(model))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert len(graphs) == 0


def test_a_copied_model_is_not_captured() -> None:
    model = made()
    captured(model)
    assert captured_by(copy.deepcopy(model)) is None


def test_calls_are_taken_apart_and_put_together_again() -> None:
    table = Modulation(torch.randn(2, 6), ((1,), (1,), 1))
    value = (torch.ones(2), [None, torch.zeros(1)], table, {3, 4}, ("a", 1.5))
    tensors: list[Tensor] = []
    spec = tensors_in(value, tensors)
    assert [x.shape for x in tensors] == [(2,), (1,), (2, 6)]
    again = rebuild(spec, iter(tensors))
    assert again[0] is value[0]
    assert again[1][0] is None
    assert again[2].chunks == table.chunks
    assert again[2].flat is table.flat
    assert again[3:] == ({3, 4}, ("a", 1.5))
    assert spec == tensors_in(value, [])
    assert spec != tensors_in((*value[:4], ("a", 1.6)), [])
    with pytest.raises(TypeError, match="unhashable"):
        tensors_in({"a": 1}, [])
