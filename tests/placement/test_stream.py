"""Blocks that pass through slots: the same bits whatever passes, in whatever order, under whatever adapters.

The oracle is the model itself, unplaced. `PlainMover(late=True)` fills a slot with NaN as soon as a copy to it is asked
for, and with numbers only when somebody waits for them: a block that read its slot too early, or after it was given to
another, would give NaN. What the host's order cannot show, that a copy waits for the work which read the slot before,
is read from the mover's log.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from octavo.fp8 import E4M3FN, E5M2, Choice, LinearSpec, at_sigmas
from octavo.fp8.linear import Fp8Linear
from octavo.fp8.matmul import PLAIN, TORCH_INT8
from octavo.models import ClipConfig, ClipTextEncoder, T5Encoder
from octavo.models.adapter import adapted
from octavo.models.clip import ClipText
from octavo.models.t5 import T5Text
from octavo.placement.movers import PlainMover
from octavo.placement.placed import Placed, place, placed_on
from octavo.placement.plan import Stay
from octavo.placement.units import units_of
from tests.placement.models import EXAMPLES, Example, adapter, clip, draw, evaluate, filled, in_fp8, mmdit, t5


def stay_of(model: nn.Module, resident: int = 0, slots: int = 2, *, leaves: bool = False) -> Stay:
    return Stay(resident=resident, layers=len(units_of(model).blocks), slots=slots, leaves=leaves)


def put(model: nn.Module, resident: int = 0, slots: int = 2, *, mover: PlainMover | None = None) -> Placed:
    return place(model, stay_of(model, resident, slots), mover or PlainMover(late=True), modulation_streamed=True)


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


@pytest.mark.parametrize(("resident", "slots"), [(0, 1), (0, 2), (0, 3), (0, 9), (1, 2), (2, 2), (99, 2)])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_model_gives_the_same_bits_under_every_plan(name: str, resident: int, slots: int) -> None:
    example = EXAMPLES[name]()
    expected = example.run(example.model)
    put(example.model, min(resident, len(units_of(example.model).blocks)), slots)
    for _ in range(3):
        assert_same(example.run(example.model), expected)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    "spec",
    [
        LinearSpec(),
        LinearSpec(granularity="row"),
        LinearSpec(granularity="block", block=(16, 16)),
        LinearSpec(format=E5M2, granularity="row"),
        LinearSpec(format=E4M3FN, granularity="row", input_scale=True, step_sigmas=(0.5,)),
    ],
    ids=["tensor", "row", "block", "e5m2", "steps"],
)
def test_fp8_layers_stream_with_all_that_belongs_to_them(spec: LinearSpec, rank: int) -> None:
    example = EXAMPLES["mmdit"]()
    in_fp8(example.model, spec, rank=rank)
    assert isinstance(example.model.get_submodule("joint_blocks.1.x_block.attn.qkv"), Fp8Linear)
    expected = example.run(example.model)
    put(example.model)
    assert_same(example.run(example.model), expected)


def test_int8_twins_stream_in_place_of_the_codes() -> None:
    example = EXAMPLES["mmdit"]()
    in_fp8(example.model, LinearSpec(granularity="row"))
    for layer in example.model.modules():
        if isinstance(layer, Fp8Linear):
            layer.use(Choice(TORCH_INT8, {}))
    expected = example.run(example.model)
    bytes_of_codes = sum(t.nbytes for t in units_of(example.model).blocks[0].tensors() if t.dtype == torch.int8)
    mover = PlainMover(late=True)
    put(example.model, mover=mover)
    assert bytes_of_codes > 0
    assert_same(example.run(example.model), expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_loras_act_on_weights_that_stream(dora: bool, fp8: bool) -> None:
    model = mmdit()
    if fp8:
        in_fp8(model, LinearSpec(granularity="row"))
    plain = evaluate(model)
    with adapted(model, [(adapter(model, dora=dora), 0.7)]):
        expected = evaluate(model)
    assert not torch.equal(expected[0], plain[0])
    put(model)
    with adapted(model, [(adapter(model, dora=dora), 0.7)]):
        assert_same(evaluate(model), expected)
    assert_same(evaluate(model), plain)


def test_a_plan_can_change_between_steps_in_both_directions() -> None:
    model = mmdit()
    expected = evaluate(model)
    placed = put(model, 5)
    before = placed.device_bytes
    for resident in (3, 0, 4, 5, 1):
        placed.move(stay_of(model, resident), modulation_streamed=resident != 4)
        assert_same(evaluate(model), expected)
    assert placed.device_bytes < before
    assert placed.streamed


def test_blocks_out_of_turn_are_fetched_when_they_come() -> None:
    model = mmdit()
    whole = copy.deepcopy(model)
    put(model)
    table = whole.modulation(torch.tensor([300.0]), torch.ones(1, 16))
    context, x = torch.ones(1, 5, 64) / 8, torch.ones(1, 12, 64) / 8
    for i in (4, 0, 0, 3, 1, 4, 2):
        told = (context, x, table.context[i], table.image[i])
        assert_same(list(model.joint_blocks[i](*told)), list(whole.joint_blocks[i](*told)))


def test_a_step_that_breaks_off_leaves_no_trace() -> None:
    model = mmdit()
    expected = evaluate(model)
    put(model)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt  # which torch's hooks do not hear of

    for place_of_failure in ("joint_blocks.2.x_block.mlp.fc1", "joint_blocks.4", "joint_blocks.1.x_block.attn.proj"):
        hook = model.get_submodule(place_of_failure).register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model)
        hook.remove()
        assert_same(evaluate(model), expected)


def test_threads_take_turns_block_by_block() -> None:
    model = mmdit()
    expected = [evaluate(model, scale=1.0 + i) for i in range(3)]
    put(model)
    got: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        with torch.inference_mode():
            for _ in range(5):
                got[i] = evaluate(model, scale=1.0 + i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert_same(got[i], expected[i])


def test_a_model_placed_in_inference_mode_works_outside_of_it_and_the_other_way_round() -> None:
    model = mmdit()
    expected = evaluate(model)
    with torch.inference_mode():
        put(model)
        assert_same(evaluate(model), expected)
    assert_same(evaluate(model), expected)


# What is where, and in what order


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("name", EXAMPLES)
def test_all_that_computes_is_on_the_device(
    name: str, resident: int, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device plays the GPU: torch refuses to compute with tensors of two devices, and meta is another."""
    # From there no tokens can be brought to a table in host memory.
    monkeypatch.setattr("octavo.placement.placed._look_up_at_home", lambda table, device: table.to(device))
    example = EXAMPLES[name]()
    if fp8:
        in_fp8(example.model, LinearSpec(granularity="row", input_scale=True, step_sigmas=(0.5,)))
        for layer in example.model.modules():
            if isinstance(layer, Fp8Linear):
                layer.use(Choice(PLAIN, {}))
    meta = torch.device("meta")
    placed = place(example.model, stay_of(example.model, resident), PlainMover(device=meta), modulation_streamed=True)
    with meta, at_sigmas(example.model, [0.9, 0.1][: 1 if "controlnet" in name else 2]):
        outputs = example.run(example.model)
    assert all(output.device == meta for output in outputs)
    assert placed.streamed
    for unit in units_of(example.model).blocks:
        where = {tensor.device.type for tensor in unit.tensors()}
        assert where in ({"cpu"}, set())  # at home again, or resident, whose tensors are meta


def test_weights_are_at_home_between_calls_and_nothing_else_is_on_the_device() -> None:
    model = mmdit()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    placed = put(model, 1)
    evaluate(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    blocks = [sum(t.nbytes for t in unit.tensors()) for unit in units_of(model).blocks]
    (stays,) = stay_of(model, 1).resident_units
    rest = sum(t.nbytes for name, t in weights.items() if "joint_blocks" not in name)
    passing = max(size for i, size in enumerate(blocks) if i != stays)
    lower = blocks[stays] + rest + 2 * passing
    assert lower <= placed.device_bytes <= 1.2 * lower  # each tensor begins at a multiple of 256 bytes
    assert "1 of 5 blocks resident, 4 pass through 2 buffers" in str(placed)
    assert "adaLN passes once a run" in str(placed)
    assert placed_on(model) is placed
    assert placed_on(mmdit(1, ())) is None


def test_a_step_copies_each_passing_block_once_and_asks_for_it_a_block_ahead() -> None:
    model, mover = mmdit(), PlainMover(keep_log=True)
    put(model, mover=mover)
    table = model.modulation(torch.tensor([800.0, 30.0]), torch.ones(2, 16))
    step = (torch.ones(2, 16, 6, 8), torch.ones(2, 5, 24), table)
    model(*step)
    mover.log.clear()
    entered: list[int] = []  # how long the log is as each block begins to compute
    for block in model.joint_blocks:
        block.register_forward_pre_hook(lambda *_: entered.append(len(mover.log)))
    model(*step)
    copies = [(at, event) for at, event in enumerate(mover.log) if event.what == "copy"]
    assert len(copies) == 5
    for i, (at, event) in enumerate(copies):
        # That of block i + 1 is asked for after the wait for block i, before that computes.
        assert at < entered[i]
        assert i == 0 or at >= entered[i - 1]
        if i + 1 < 5:
            waits = [
                place for place, other in enumerate(mover.log) if other.what == "wait" and other.number == event.number
            ]
            assert waits
            assert entered[i] <= min(waits) < entered[i + 1]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_copy_waits_for_the_work_that_read_its_slot(slots: int) -> None:
    """Read from the log: between two copies into a slot there is a mark, which the later copy waits for."""
    model, mover = mmdit(), PlainMover(keep_log=True)
    put(model, 1, slots, mover=mover)
    for skip in ((), (1, 2), (), (0, 4)):
        evaluate(model, skip)
    marks = [event.number for event in mover.log if event.what == "mark"]
    read: dict[int, list[int]] = {}  # by slot: numbers of the copies that were waited for, so computed from
    last: dict[int, int] = {}
    for event in mover.log:
        if event.what == "copy":
            if event.buffer in last and last[event.buffer] in read.get(event.buffer, []):
                # Some work read what was there: the mark it left came after that copy.
                assert event.after > last[event.buffer]
                assert event.after in marks
            last[event.buffer] = event.number
        elif event.what == "wait":
            for buffer, number in last.items():
                if number == event.number:
                    read.setdefault(buffer, []).append(number)
    assert len(last) >= slots


def test_adaln_takes_no_memory_while_blocks_compute() -> None:
    made: list[weakref.ref[Tensor]] = []

    class Noting(PlainMover):
        def buffer(self, nbytes: int) -> Tensor:
            buffer = super().buffer(nbytes)
            made.append(weakref.ref(buffer))
            return buffer

    model = mmdit()
    put(model, mover=Noting(device=torch.device("cpu")))
    before = sum(each() is not None for each in made)
    model.modulation(torch.tensor([800.0]), torch.ones(1, 16))
    assert len(made) > before
    assert sum(each() is not None for each in made) == before


@pytest.mark.parametrize("make", [clip, t5])
@pytest.mark.parametrize("resident", [0, 4])
def test_encoders_leave_the_device_and_come_back(make: Callable[[], Example], resident: int) -> None:
    example = make()
    expected = example.run(example.model)
    placed = place(example.model, stay_of(example.model, resident, leaves=True), PlainMover(late=True))
    for _ in range(3):
        placed.arrive()
        assert_same(example.run(example.model), expected)
        placed.leave()


def quick_clip() -> Example:
    """As CLIP-L: a quick GELU, nothing projected."""
    config = ClipConfig(width=32, layers=5, heads=2, mlp_width=48, activation="quick_gelu", vocab_size=40, positions=9)
    return Example(filled(ClipTextEncoder(config)), lambda _model: [])


def texts_of(model: nn.Module) -> list[ClipText] | list[T5Text]:
    """Of unlike lengths and row counts, one with vectors of its own."""
    tokens = [torch.arange(9).view(1, 9), torch.arange(18).view(2, 9) % 7, torch.arange(5).view(1, 5) + 3]
    vectors: list[Mapping[tuple[int, int], Tensor]] = [{}, {(1, 2): draw(32)}, {}]
    if isinstance(model, T5Encoder):
        return [T5Text(*each) for each in zip(tokens, vectors, strict=True)]
    ends = [torch.tensor(end) for end in ([8], [3, 5], [4])]
    return [ClipText(*each) for each in zip(tokens, ends, vectors, strict=True)]


def encoded_alone(model: nn.Module) -> list[Tensor]:
    assert isinstance(model, ClipTextEncoder | T5Encoder)
    if isinstance(model, T5Encoder):
        return [model(tokens, vectors) for tokens, vectors in cast("list[T5Text]", texts_of(model))]
    texts = cast("list[ClipText]", texts_of(model))
    return [out for text in texts for out in model(text.tokens, end=text.end, vectors=text.vectors)]


def encoded_together(model: nn.Module) -> list[Tensor]:
    assert isinstance(model, ClipTextEncoder | T5Encoder)
    if isinstance(model, T5Encoder):
        return model.encode(cast("list[T5Text]", texts_of(model)))
    return [out for both in model.encode(cast("list[ClipText]", texts_of(model))) for out in both]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("resident", "slots"), [(99, 2), (0, 1), (0, 2), (0, 3), (2, 2)])
@pytest.mark.parametrize("make", [quick_clip, clip, t5])
def test_texts_pass_together_with_the_bits_that_each_has_alone(
    make: Callable[[], Example], resident: int, slots: int, fp8: bool
) -> None:
    model = make().model
    if fp8:
        in_fp8(model, LinearSpec(granularity="row"))
    expected, count = encoded_alone(model), len(units_of(model).blocks)
    assert_same(encoded_together(model), expected)
    mover = PlainMover(late=True, keep_log=True)
    placed = put(model, min(resident, count), slots, mover=mover)
    for _ in range(2):
        mover.log.clear()
        assert_same(encoded_together(model), expected)
        # Each layer that streams comes once for all of them, and nothing stays behind.
        assert sum(event.what == "copy" for event in mover.log) == len(placed._blocks.streamed)
        assert not placed.slots
    assert_same(encoded_alone(model), expected)


@pytest.mark.parametrize("make", [clip, t5])
def test_token_tables_stay_in_host_memory(make: Callable[[], Example]) -> None:
    example = make()
    (table,) = units_of(example.model).tables
    placed = place(example.model, stay_of(example.model), PlainMover())
    assert placed.host_bytes >= table.weight.nbytes
    assert placed.device_bytes + placed.host_bytes < 1.5 * sum(p.nbytes for p in example.model.parameters()) + 2 * 10**5
