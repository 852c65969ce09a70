"""Bytes that several threads bring into place are those of the file, whatever the order in which they arrive."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from octavo.checkpoint import delivery, tensors
from octavo.checkpoint.delivery import (
    CudaCourier,
    Delivery,
    DeviceLane,
    HostLane,
    Lane,
    Mark,
    Piece,
    flags_of,
    not_finite,
    readers_for,
)
from octavo.checkpoint.load import load_part
from octavo.checkpoint.plan import plan_part
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.source import open_source
from octavo.checkpoint.tensors import TensorFile, open_tensors
from octavo.errors import CheckpointError, CorruptFileError
from octavo.fp8 import quantize
from octavo.pipeline.assemble import EMBEDDED_MODEL

FP8_MODEL = EMBEDDED_MODEL.parents[1] / "diffusion_models" / "octavo-demo-fp8.safetensors"
E4M3FN = torch.float8_e4m3fn


class LateMark:
    """A moment that comes when someone waits for it, and not before."""

    def __init__(self, courier: "LateCourier", count: int) -> None:
        self.courier, self.count = courier, count

    def synchronize(self) -> None:
        self.courier.fly(self.count)


class LateCourier:
    """A device whose copies happen at the last moment: what overwrites a buffer too early loses the bytes in it."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.sent = self.flown = 0
        self.buffers: list[Tensor] = []

    def buffer(self, nbytes: int) -> Tensor:
        self.buffers.append(torch.full((nbytes,), 0xAB, dtype=torch.uint8))
        return self.buffers[-1]

    def send(self, piece: Piece, staged: Tensor) -> tuple[Mark, list[Tensor]]:
        flags = [torch.zeros((), dtype=torch.bool) for _ in range(2)]

        def fly() -> None:
            piece.place.copy_(staged)
            for flag, found in zip(flags, flags_of(piece, staged), strict=False):
                flag.copy_(found)

        self.waiting.append(fly)
        self.sent += 1
        return LateMark(self, self.sent), flags if piece.check else []

    def fly(self, count: int) -> None:
        while self.flown < count:
            self.waiting.pop(0)()
            self.flown += 1

    def join(self) -> None:
        self.fly(self.sent)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that every tensor takes many."""
    for module in (delivery, tensors):
        monkeypatch.setattr(module, "HOST_CHUNK", 1 << 10)
    monkeypatch.setattr(delivery, "DEVICE_CHUNK", 1 << 10)
    monkeypatch.setattr(tensors, "WORTH_MAPPING", 1 << 10)


def written(folder: Path, **tensors: Tensor) -> Path:
    path = folder / "some.safetensors"
    save_safetensors(path, tensors)
    return path


LANES: dict[str, Callable[[], Lane]] = {"host": HostLane, "device": lambda: DeviceLane(LateCourier())}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_everything_arrives_converted_as_one_reading_would(
    tmp_path: Path, readers: int, lane: str, dtype: torch.dtype
) -> None:
    stored = {f"t{i}": torch.randn(37, 11 + i).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(9)}
    with (
        open_tensors(written(tmp_path, **stored)) as file,
        Delivery("cpu", readers=readers, lane=LANES[lane]) as under_way,
    ):
        places = {name: torch.full(tensor.shape, torch.nan, dtype=dtype) for name, tensor in stored.items()}
        for name, place in places.items():
            file.deliver(under_way, name, place)
        rows = torch.full((5, 12), torch.nan)
        file.deliver(under_way, "t1", rows, rows=(3, 8))
        under_way.finish()
        assert torch.equal(rows, stored["t1"][3:8].float())
        for name, place in places.items():
            assert torch.equal(place, stored[name].to(dtype)), name
            read = torch.empty_like(place)
            file.read_into(name, read)
            assert torch.equal(place, read)


@pytest.mark.usefixtures("small_chunks")
def test_a_buffer_is_not_filled_again_before_it_has_left(tmp_path: Path) -> None:
    """Two buffers a thread, and copies that happen as late as they may."""
    value = torch.arange(10_000, dtype=torch.float32)
    courier = LateCourier()
    with (
        open_tensors(written(tmp_path, a=value)) as file,
        Delivery("cpu", readers=1, lane=lambda: DeviceLane(courier)) as under_way,
    ):
        place = torch.full_like(value, torch.nan)
        file.deliver(under_way, "a", place)
        assert courier.flown == courier.sent - 2  # two are under way, and none was waited for too early
        under_way.wait()
        assert courier.flown == courier.sent
        assert len(courier.buffers) == 2
        assert torch.equal(place, value)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    ("value", "dtype", "into", "error", "words"),
    [
        (torch.nan, torch.float32, torch.float32, CorruptFileError, "NaN or infinity in 'bad'"),
        (torch.inf, torch.bfloat16, torch.float32, CorruptFileError, "NaN or infinity in 'bad'"),
        (torch.nan, E4M3FN, E4M3FN, CorruptFileError, "NaN or infinity in 'bad'"),
        (1e6, torch.float32, torch.float16, CheckpointError, "'bad' beyond float16's 65504"),
    ],
    ids=str,
)
def test_numbers_that_are_none_are_refused_by_name(
    tmp_path: Path,
    readers: int,
    lane: str,
    value: float,
    dtype: torch.dtype,
    into: torch.dtype,
    error: type[Exception],
    words: str,
) -> None:
    bad = torch.randn(4000)
    bad[3333] = value
    path = written(tmp_path, good=torch.randn(4000).to(dtype), bad=bad.to(dtype), worse=bad.to(dtype))

    def deliver() -> None:
        with open_tensors(path) as file, Delivery("cpu", readers=readers, lane=LANES[lane]) as under_way:
            for name in file.entries:
                file.deliver(under_way, name, torch.empty(4000, dtype=into))
            under_way.finish()

    with pytest.raises(error, match=words):  # of two bad ones always the first in the file is named
        deliver()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("lane", LANES)
def test_what_need_not_be_checked_is_taken_as_it_is(tmp_path: Path, lane: str) -> None:
    value = torch.full((2000,), torch.inf)
    with open_tensors(written(tmp_path, a=value)) as file, Delivery("cpu", readers=2, lane=LANES[lane]) as under_way:
        place = torch.zeros(2000)
        file.deliver(under_way, "a", place, check=False)
        under_way.finish()
    assert torch.equal(place, value)


@pytest.mark.parametrize("lane", LANES)
def test_a_file_that_ends_early_is_refused(tmp_path: Path, lane: str) -> None:
    path = written(tmp_path, a=torch.randn(5000))
    with open_tensors(path) as file, Delivery("cpu", readers=2, lane=LANES[lane]) as under_way:
        with path.open("rb+") as cut:
            cut.truncate(path.stat().st_size - 100)
        file.deliver(under_way, "a", torch.empty(5000))
        with pytest.raises(CorruptFileError, match="ended while 'a' was read"):
            under_way.finish()


def test_tensors_of_inference_mode_can_be_filled(tmp_path: Path) -> None:
    """That mode is each thread's own, and parts are loaded when they are first needed: within it."""
    value = torch.randn(3000)
    with (
        open_tensors(written(tmp_path, a=value)) as file,
        Delivery("cpu", readers=2) as under_way,
        torch.inference_mode(),
    ):
        place = torch.empty(3000)
        file.deliver(under_way, "a", place)
        under_way.finish()
        assert torch.equal(place, value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32], ids=str)
def test_the_devices_check_is_that_of_the_host(dtype: torch.dtype) -> None:
    for value in (0.0, 1.0, -3.0, torch.nan, -torch.nan, torch.inf, -torch.inf):
        x = torch.randn(100).clamp(-2, 2)
        x[57] = value
        x = x.to(dtype)
        assert bool(not_finite(x)) == (not tensors.all_finite(x)), value


@pytest.mark.usefixtures("small_chunks")
def test_fp8_codes_stay_in_the_page_cache_and_are_those_of_the_file(tmp_path: Path) -> None:
    """On: the codes are mapped, so that a change of the file shows; and it equals a reading."""
    q = quantize(torch.randn(64, 64)).q
    path = written(tmp_path, q=q, small=q[:2, :2].clone(), wide=torch.randn(64, 64))
    with open_tensors(path) as file:
        mapped = file.mapped("q")
        assert mapped is not None
        assert torch.equal(mapped.view(torch.uint8), q.view(torch.uint8))
        assert file.mapped("small") is None
        assert file.mapped("wide") is None
        start = file.entries["q"].start
    with path.open("rb+") as changed:
        changed.seek(start)
        changed.write(b"\x01\x02")
    assert mapped.view(torch.uint8).flatten()[:2].tolist() == [1, 2]
    mapped.view(torch.uint8).fill_(7)  # stays private
    assert path.read_bytes()[start : start + 3] != b"\x07\x07\x07"


@pytest.mark.usefixtures("small_chunks")
def test_mapped_codes_are_checked_like_read_ones(tmp_path: Path) -> None:
    q = quantize(torch.randn(64, 64)).q
    q.view(torch.uint8)[60, 60] = 0x7F
    path = written(tmp_path, q=q)
    with open_tensors(path) as file:
        with pytest.raises(CorruptFileError, match="NaN or infinity in 'q'"):
            file.mapped("q")
        assert file.mapped("q", check=False) is not None
        with path.open("rb+") as cut:
            cut.truncate(path.stat().st_size - 100)
        with pytest.raises(CorruptFileError, match="ended while 'q' was read"):
            file.mapped("q")


@pytest.mark.usefixtures("small_chunks")
def test_a_model_has_the_same_weights_however_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[bool] = []
    real = TensorFile.mapped

    def counted(file: TensorFile, name: str, *, check: bool = True) -> Tensor | None:
        found = real(file, name, check=check)
        mapped.append(found is not None)
        return found

    monkeypatch.setattr(TensorFile, "mapped", counted)

    def loaded(readers: int) -> dict[str, Tensor]:
        monkeypatch.setattr(delivery, "readers_for", lambda _device: readers)
        with open_source(FP8_MODEL) as source:
            return dict(load_part(plan_part(source.require("mmdit")), "cpu", torch.float32).state_dict())

    states = [loaded(1), loaded(4)]
    assert all(mapped)
    assert len(mapped) > 40
    monkeypatch.setattr(tensors, "WORTH_MAPPING", 1 << 40)
    states.append(loaded(2))
    assert not mapped[-1]
    monkeypatch.setattr(tensors, "WORTH_MAPPING", 1 << 10)
    monkeypatch.setenv("OCTAVO_MAP", "0")
    states.append(loaded(2))
    assert not mapped[-1]
    for state in states[1:]:
        assert all(torch.equal(state[name].float(), tensor.float()) for name, tensor in states[0].items())


def test_one_thread_for_torch_means_one_reader() -> None:
    torch.set_num_threads(1)
    assert readers_for(torch.device("cpu")) == 1
    assert Delivery("cpu")._pool is None
    assert readers_for(torch.device("cuda")) >= 1


class FakeCuda:
    """So much of torch.cuda as a courier touches, writing down what it is asked."""

    log: ClassVar[list[str]] = []

    class Event:
        def record(self, stream: object = None) -> None:
            FakeCuda.log.append("mark" if stream is None else "sent")

        def synchronize(self) -> None:
            FakeCuda.log.append("wait")

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_event(self, _event: object) -> None:
            FakeCuda.log.append("after mark")

        def wait_stream(self, _stream: object) -> None:
            FakeCuda.log.append("join")

    @staticmethod
    def stream(_stream: object) -> AbstractContextManager[None]:
        return nullcontext()

    @classmethod
    def current_stream(cls, device: torch.device) -> "FakeCuda.Stream":
        return cls.Stream(device)


@pytest.mark.usefixtures("small_chunks")
def test_cuda_is_asked_in_the_right_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy begins after the caller's mark and ends with its own; the caller's stream joins before the end."""
    value = torch.arange(600, dtype=torch.float32)
    path = written(tmp_path, a=value)
    monkeypatch.setattr(torch, "cuda", FakeCuda)
    monkeypatch.setattr(CudaCourier, "buffer", lambda _self, nbytes: torch.empty(nbytes, dtype=torch.uint8))
    FakeCuda.log.clear()
    place = torch.zeros(600)
    cpu = torch.device("cpu")
    with open_tensors(path) as file, Delivery("cpu", readers=1, lane=lambda: DeviceLane(CudaCourier(cpu))) as under_way:
        monkeypatch.setattr(under_way, "_cuda", True)
        file.deliver(under_way, "a", place)
        assert FakeCuda.log == ["mark", *["after mark", "sent"] * 2, "wait", "after mark", "sent"]
        under_way.finish()
    assert FakeCuda.log[-4:] == ["join", "join", "wait", "wait"]
    assert torch.equal(place, value)
