"""How the CUDA mover orders its work, on a CUDA that only notes what it is asked: streams, events, pinning."""

import gc
from collections.abc import Iterator

import pytest
import torch

from octavo.placement.movers import CudaMover, PlainMover, mover_for
from octavo.placement.placed import place
from octavo.placement.plan import Stay
from octavo.placement.units import units_of
from tests.placement.fake_cuda import FakeCuda, Mover
from tests.placement.models import evaluate, mmdit


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    fake.install(monkeypatch)
    yield fake
    gc.collect()  # what is pinned still is unpinned by the fake


def test_a_copy_begins_after_the_mark_and_ends_in_an_event_that_computing_waits_for(cuda: FakeCuda) -> None:
    mover = CudaMover(torch.device("cpu"))
    home, slot = mover.host(6), mover.buffer(9)
    home.copy_(torch.arange(6))
    reached = mover.mark()
    done = mover.copy(home, slot, reached)
    mover.wait(done)
    assert slot[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert cuda.notes == [
        ("compute", "record", 1),
        ("copies", "begin"),
        ("copies", "wait", 1),
        ("copies", "record", 2),
        ("copies", "end"),
        ("compute", "wait", 2),
    ]


def test_a_step_keeps_the_host_waiting_for_nothing_and_gives_the_same_bits(cuda: FakeCuda) -> None:
    model = mmdit()
    expected = evaluate(model)
    stay = Stay(resident=1, layers=len(units_of(model).blocks))
    placed = place(model, stay, Mover(torch.device("cpu")), modulation_streamed=True)
    cuda.notes.clear()
    for _ in range(2):
        for got, one in zip(evaluate(model), expected, strict=True):
            assert torch.equal(got, one)
    assert ("host", "synchronize") not in cuda.notes
    waits = [note[2] for note in cuda.notes if note[:2] == ("compute", "wait")]
    copies = [note[2] for note in cuda.notes if note[:2] == ("copies", "record")]
    assert set(waits) <= set(copies)
    # Once more each block, but for the last that was fetched ahead; adaLN once for each.
    assert len(copies) == 2 * 4 + 1 + 2 * len(units_of(model).modulation)
    placed.close()
    assert cuda.notes[-1] == ("host", "synchronize")


def test_homes_are_pinned_once_they_are_filled_and_unpinned_with_the_model(cuda: FakeCuda) -> None:
    model = mmdit()
    stay = Stay(resident=0, layers=len(units_of(model).blocks))
    placed = place(model, stay, Mover(torch.device("cpu")), modulation_streamed=True)
    assert len(cuda.pinned) == len(units_of(model).blocks) + len(units_of(model).modulation)
    assert sum(cuda.pinned.values()) == placed.host_bytes
    placed.move(Stay(resident=stay.layers, layers=stay.layers), modulation_streamed=True)
    assert len(cuda.pinned) == len(units_of(model).modulation)
    placed.close()
    del placed, model
    gc.collect()
    assert not cuda.pinned
    assert ("host", "synchronize") in cuda.notes  # before that: a copy might be reading


def test_memory_that_cannot_be_pinned_is_told_and_serves_all_the_same(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.refuses = 2
    model = mmdit()
    expected = evaluate(model)
    place(model, Stay(resident=0, layers=5), Mover(torch.device("cpu")))
    assert torch.equal(evaluate(model)[0], expected[0])
    assert "cannot be pinned" in caplog.text


def test_what_is_on_the_device_already_is_not_copied_within_it(cuda: FakeCuda) -> None:
    model = mmdit()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    placed = place(model, Stay(resident=2, layers=5), CudaMover(torch.device("cpu")))
    after = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    same = {name for name in before if before[name] == after[name]}
    assert "x_embedder.proj.weight" in same
    assert sum(name.startswith(f"joint_blocks.{i}.") for i in placed.stay.resident_units for name in same)
    assert not any(name.startswith("joint_blocks.0.x_block.attn") for name in same)
    assert cuda.pinned


def test_each_device_has_its_mover(cuda: FakeCuda) -> None:
    assert isinstance(mover_for(torch.device("cpu")), PlainMover)
    assert isinstance(mover_for(torch.device("cuda", 0)), CudaMover)
    assert not cuda.pinned
