"""Whole pictures under memory plans, carried out on the CPU: the same pixels whatever comes and goes; the ladder."""

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from octavo import GenerateRequest, generate, load
from octavo.engine.batch import Batcher
from octavo.errors import OutOfMemoryError, PlacementError, RequestError
from octavo.models import MMDiT
from octavo.models.vae import VAE
from octavo.pipeline.components import Components
from octavo.pipeline.control_request import ControlImage
from octavo.pipeline.denoise import Question, Track, denoise, make_tables
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.generate import Progress, generate_each, prepare
from octavo.pipeline.hires import Hires
from octavo.pipeline.placing import Budget, budget_of, check_vram
from octavo.pipeline.request import resolve
from octavo.pipeline.shelf import LoadSettings, Shelf
from octavo.pipeline.tables import Tables
from octavo.placement.movers import PlainMover
from octavo.placement.placed import place, placed_on
from octavo.placement.plan import Stay, make_plan
from octavo.placement.shapes import Shapes
from octavo.placement.units import units_of
from octavo.placement.work import Work
from octavo.sampling import ClassifierFree, Guidance, SkipLayerGuidance
from tests.placement.fake_cuda import FakeCuda, Mover
from tests.placement.models import adapter

REQUEST = GenerateRequest(prompt="a large red star on a blue background", width=64, height=64, steps=3, seed=5)
WORK = Work(width=64, height=64, steps=3, rows=2, tokens=24, prompts=2)
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
GREAT = 10**9

Pixels = NDArray[np.uint8]


def pixels(components: Components, request: GenerateRequest = REQUEST) -> Pixels:
    (picture,) = generate(components, request)
    return np.asarray(picture.image)


@cache
def unplaced() -> Pixels:
    return pixels(load(device="cpu"))


@cache
def budgets() -> list[int]:
    """One for each rung of the ladder, from that on which everything stays to the least."""
    components = load(device="cpu")
    parts: dict[str, nn.Module] = {
        part.kind: part.skeleton for part in (components.mmdit, components.vae, *components.encoders)
    }
    shapes, found = Shapes.of(parts, torch.float32), [GREAT]
    try:
        while True:
            found.append(make_plan(shapes, found[-1], work=WORK).peak - 1)
    except PlacementError:
        return found[:-1]


def placed(budget: int) -> Components:
    """The embedded model, planned for pictures as small as the tests' alone."""
    components = load(device="cpu", vram=GREAT)
    assert components.placing is not None
    components.placing.budget = Budget(budget, named=True)
    components.placing.plan = components.placing._planned(WORK)
    components.placing.fit(WORK)
    return components


def test_a_picture_is_the_same_on_every_rung() -> None:
    seen = []
    for budget in budgets():
        components = placed(budget)
        assert components.placing is not None
        seen.append(str(components.placing))
        if components.placing.plan.tile is not None:
            continue  # tiles change a picture a little: the last rung
        for _ in range(2):
            assert np.array_equal(pixels(components), unplaced()), components.headline
        if "mmdit streams;" in seen[-1]:
            assert not placed_on(components.mmdit()).stay.resident  # type: ignore[union-attr]
    for rung in (
        "everything stays",
        "clip_l streams; clip_g streams; t5 streams; vae leaves",
        "modulation passes through",
        "mmdit streams 1 of 3",
    ):
        assert any(rung in said for said in seen), rung


@pytest.mark.parametrize("method", ["lanczos", "latent-bislerp"])
def test_a_picture_of_two_passes_is_the_same_on_every_rung(method: str) -> None:
    """The VAE comes between the passes and leaves again, where the plan says so; words are read before either."""
    request = replace(REQUEST, width=32, height=32, hires=Hires(method=method, prompt="a blue star"))
    expected = pixels(load(device="cpu"), request)
    for budget in budgets():
        components = placed(budget)
        assert components.placing is not None
        if components.placing.plan.tile is not None:
            continue
        assert np.array_equal(pixels(components, request), expected), components.headline
        work = components.placing.plan.work
        assert (work.width, work.height) == (64, 64)


def test_what_leaves_is_away_and_comes_back_when_it_is_called() -> None:
    components = placed(budgets()[-1])
    parts = {part.kind: part for part in (components.mmdit, components.vae, *components.encoders)}

    def here() -> set[str]:
        return {kind for kind, part in parts.items() if part.loaded and not part.away}

    pixels(components)
    assert here() == {"mmdit"}
    components.vae()
    assert here() == {"mmdit", "vae"}
    for encoder in components.encoders:  # one after the other, for they stream
        encoder()
        assert here() == {"mmdit", encoder.kind}
    mmdit = components.mmdit()
    assert here() == {"mmdit"}
    on_device = placed_on(mmdit)
    assert on_device is not None
    pixels(components)
    assert not on_device.slots  # given back for the VAE's work


class Counting(PlainMover):
    """Counts the bytes of buffers that are on the "device", of all parts together."""

    alive: list["weakref.ref[Tensor]"]
    peak: int

    def buffer(self, nbytes: int) -> Tensor:
        made = super().buffer(nbytes)
        Counting.alive.append(weakref.ref(made))
        there = (buffer() for buffer in Counting.alive)
        Counting.peak = max(Counting.peak, sum(buffer.nbytes for buffer in there if buffer is not None))
        return made


def test_no_stage_has_more_weights_on_the_device_than_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.pipeline.components.mover_for", lambda _: Counting())
    for budget in budgets()[1:]:
        components = placed(budget)
        assert components.placing is not None
        stages = components.placing.plan.stages
        if not components.placing.plan.modulation_streamed:
            continue  # the MMDiT is whole, and not of buffers
        Counting.alive, Counting.peak = [], 0
        peaks: dict[str, int] = {}
        stage = "encode"

        def watch(progress: Progress) -> None:
            nonlocal stage
            if progress.stage != stage:
                peaks[stage], stage = Counting.peak, progress.stage  # noqa: B023  # called within the turn
                Counting.peak = 0

        generate(components, REQUEST, watch=watch)
        peaks[stage] = Counting.peak
        for name, peak in peaks.items():
            # What is made before the first step, modulation among it, comes before the word that steps begin.
            told = [stages[each] for each in {"encode": ("encode", "modulation")}.get(name, (name,))]
            most = max(each.weights + each.buffers for each in told)
            # Tensors begin at multiples of 256 bytes.
            assert peak <= most + 10**5, (name, str(components.placing))
        # And they are there: of what the plan counts most is seen.
        assert max(peaks.values()) > 0.7 * max(each.weights + each.buffers for each in stages.values())


def test_steps_and_prompts_keep_the_host_waiting_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the mover for CUDA, on a CUDA that notes what it is asked."""
    expected, cuda = unplaced(), FakeCuda()
    cuda.install(monkeypatch)
    monkeypatch.setattr("octavo.pipeline.components.mover_for", Mover)
    components = placed(budgets()[-1])
    assert np.array_equal(pixels(components), expected)
    cuda.notes.clear()
    assert np.array_equal(pixels(components), expected)
    assert ("host", "synchronize") not in cuda.notes
    assert sum(note[:2] == ("copies", "record") for note in cuda.notes) > 20
    for part in (components.mmdit, components.vae, *components.encoders):
        part.release()
    gc.collect()
    assert not cuda.pinned


def test_a_controlnet_follows_the_plan_as_the_model_does(tmp_path: Path) -> None:
    hint = tmp_path / "edges.png"
    Image.effect_noise((64, 64), 80).point(lambda value: 255 * (value > 160)).save(hint)
    request = GenerateRequest(
        **{name: getattr(REQUEST, name) for name in ("prompt", "width", "height", "steps", "seed")},
        controls=(ControlImage(image=str(hint), type="canny"),),
    )
    expected = pixels(load(device="cpu"), request)
    assert not np.array_equal(expected, unplaced())
    components = placed(budgets()[-1])
    assert components.placing is not None
    components.placing.budget = Budget(GREAT, named=True)  # the net is more than the least has room for
    assert np.array_equal(pixels(components, request), expected)
    while components.smaller():
        pass
    assert np.array_equal(pixels(components, request), expected)
    (net,) = components.placing._nets.values()
    assert net.stay is not None
    assert net.stay.streamed
    assert placed_on(net()) is not None


def test_a_batch_of_strangers_with_loras_and_skipped_layers_is_the_same_when_streamed() -> None:
    """Rows with no LoRA, a LoRA and a DoRA, one of them with skip-layer guidance, in one turn."""

    def answers(components: Components) -> list[Tensor]:
        mmdit = components.mmdit()
        config = mmdit.config
        questions = []
        for i, dora in enumerate((None, False, True)):
            context = torch.randn(1, 16, config.context_width, generator=torch.Generator().manual_seed(i))
            prompt, negative = (
                Conditioning(sign * context, sign * context[:, 0, : config.pooled_width]) for sign in (1, -1)
            )
            skip = SkipLayerGuidance(layers=(1,), start=0.0, end=1.0) if i == 1 else None
            guidance = Guidance(classifier_free=ClassifierFree(scale=3.0), skip_layers=skip)
            adapters = () if dora is None else ((adapter(mmdit, dora=dora), 0.5),)
            track = Track.of(prompt, negative, guidance, 3.0, adapters)
            make_tables(mmdit, track, [0.9, 0.4])
            x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(9 + i))
            questions += [Question(x, sigma, track) for sigma in (0.9, 0.4)]
        return [answer.denoised for answer in denoise(mmdit, questions)]

    with torch.inference_mode():
        expected, streamed = answers(load(device="cpu")), placed(budgets()[-1])
        for one, other in zip(answers(streamed), expected, strict=True):
            assert torch.equal(one, other)
    on_device = placed_on(streamed.mmdit())
    assert on_device is not None
    assert on_device.streamed


@pytest.mark.parametrize("cache", [None, Tables()])
def test_adaln_passes_once_a_run_for_all_its_prompts(cache: Tables | None) -> None:
    mmdit, mover = load(device="cpu").mmdit(), PlainMover(keep_log=True)
    units, config = units_of(mmdit), mmdit.config
    count = len(units.blocks)
    place(mmdit, Stay(resident=count, layers=count), mover, modulation_streamed=True)
    sides = [Conditioning(torch.zeros(1, 4, config.context_width), torch.randn(1, config.pooled_width)) for _ in "+-"]
    track = Track.of(sides[0], sides[1], Guidance(classifier_free=ClassifierFree(scale=3.0)), 3.0)
    mover.log.clear()
    make_tables(mmdit, track, [0.9, 0.4, 0.1], cache=cache)
    assert len(track.tables) == 6
    assert sum(event.what == "copy" for event in mover.log) == len(units.modulation)


def test_encoders_pass_once_for_all_prompts_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt with weights, the empty one that these start from, and a negative one: what streams is copied once, be
    it a layer or the rest of an encoder."""
    movers: list[PlainMover] = []

    def logging_mover(_device: object) -> PlainMover:
        movers.append(PlainMover(keep_log=True))
        return movers[-1]

    monkeypatch.setattr("octavo.pipeline.components.mover_for", logging_mover)
    components = placed(budgets()[-1])
    asked = replace(REQUEST, prompt="a (large:1.3) red star", negative_prompt="blue")
    job = resolve(asked, components.preset, model=components.name, max_side=99)
    assert job.guidance_scale != 1
    prepare(components, job)
    for mover in movers:
        mover.log.clear()
    prepare(components, job)
    layers = sum(len(units_of(encoder.skeleton).blocks) for encoder in components.encoders)
    copies = [event for mover in movers for event in mover.log if event.what == "copy"]
    assert len(copies) == layers + len(components.encoders)


# Out of memory


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str, list[int]], None]:
    """Have calls of a method fail for want of memory, by their number."""

    def arrange(owner: type, method: str, failing: list[int]) -> None:
        plain, calls = getattr(owner, method), 0

        def counted(self: Any, *args: Any, **settings: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls in failing:
                raise FULL
            result: Tensor = plain(self, *args, **settings)
            return result

        monkeypatch.setattr(owner, method, counted)

    return arrange


@pytest.mark.parametrize(
    ("owner", "method", "failing"),
    [(MMDiT, "forward", [2, 3]), (MMDiT, "modulations", [1]), (VAE, "decode", [1]), (MMDiT, "forward", [1, 4])],
)
def test_a_picture_goes_on_under_a_smaller_plan(
    short: Callable[..., None], caplog: pytest.LogCaptureFixture, owner: type, method: str, failing: list[int]
) -> None:
    expected, components = unplaced(), placed(GREAT)
    assert components.placing is not None
    before = components.placing.plan.peak
    short(owner, method, failing)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(pixels(components), expected)
    assert components.placing.plan.peak <= 0.9 ** len(failing) * before or components.at_last
    said = [record.message for record in caplog.records if "smaller memory plan" in record.message]
    assert len(said) == len(failing)
    # The plan stays: what did not fit once is not tried again with the next picture.
    plan = components.placing.plan
    pixels(components)
    assert components.placing.plan.parts == plan.parts


def test_where_no_plan_is_left_the_user_is_told(short: Callable[..., None]) -> None:
    components = placed(GREAT)
    short(MMDiT, "forward", list(range(1, 99)))
    with pytest.raises(OutOfMemoryError, match=r"picture of 64x64 pixels, .*given up.*CUDA out of memory"):
        pixels(components)
    assert components.at_last
    with pytest.raises(OutOfMemoryError):
        pixels(load(device="cpu"))


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(LoadSettings(device="cpu", vram=GREAT))


@pytest.fixture
def batcher(shelf: Shelf) -> Iterator[Batcher]:
    batcher = Batcher(relief=shelf.free, smaller=shelf.smaller)
    yield batcher
    batcher.close()


@pytest.mark.parametrize("failing", [[2, 3], [2, 3, 4]])
def test_an_engine_goes_over_to_a_smaller_plan_once_relief_did_not_help(
    shelf: Shelf, batcher: Batcher, short: Callable[..., None], failing: list[int]
) -> None:
    """Evaluation 2 fails whole, row by row, and after all else has left; then plan by plan."""
    expected, components = unplaced(), shelf.components()
    assert components.placing is not None
    plan = components.placing.plan
    short(MMDiT, "forward", failing)
    (picture,) = generate_each(components, REQUEST, solve=batcher.solve, on_device=batcher.do)
    # Row by row rounds a little differently.
    assert np.abs(np.asarray(picture.image).astype(int) - expected).max() <= 2
    assert (components.placing.plan is plan) == (len(failing) < 3)


def test_parts_of_a_shelf_share_one_budget_and_leave_for_one_another(shelf: Shelf) -> None:
    model, clip, vae = shelf.checkpoint("octavo-demo.safetensors")
    assert clip is not None
    assert vae is not None
    lone = Shelf(LoadSettings(device="cpu", vram=GREAT)).vae("octavo-demo.safetensors")
    assert lone.part.stay is not None
    assert lone.part.stay.leaves
    assert model.part.stay is not None
    assert not model.part.stay.leaves


# Loading


def test_memory_of_a_model_that_leaves_is_free_at_once() -> None:
    components = placed(budgets()[-1])
    gone = weakref.ref(components.mmdit())
    gc.disable()
    try:
        components.mmdit.release()
        assert gone() is None
    finally:
        gc.enable()


def test_a_budget_that_is_too_small_is_refused_with_what_would_do() -> None:
    components = load(device="cpu", vram="90MB")
    with pytest.raises(PlacementError, match=r"90 MB of device memory do not suffice for pictures of 256x256.*needed"):
        pixels(components, GenerateRequest(prompt="a star", width=256, height=256, steps=1))
    with pytest.raises(PlacementError, match="even with all weights passing through"):
        load(device="cpu", vram="1MB")


def test_where_nobody_has_named_a_budget_the_least_plan_is_tried_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """What is free on a device may be less than the least plan is reckoned to need."""
    components = load(device="cpu", vram=Budget(10**6))
    assert components.at_last
    assert "1 MB is free on cpu" in caplog.text
    assert np.array_equal(pixels(components), unplaced())


def test_those_who_train_have_every_part_whole() -> None:
    components = load(device="cpu", vram="1MB", planned=False)
    assert components.placing is None
    assert placed_on(components.mmdit()) is None


def test_budgets_are_read_as_people_write_them() -> None:
    cpu = torch.device("cpu")
    assert budget_of("6GB", cpu) == Budget(6 * 10**9, named=True)
    assert budget_of(None, cpu) is None
    with pytest.raises(RequestError, match="a share, but of a device"):
        budget_of("80%", cpu)
    with pytest.raises(RequestError, match=r"shares the machine's memory"):
        budget_of("6GB", torch.device("mps"))
    with pytest.raises(RequestError, match=r"--vram 6GB is about a GPU's memory.*--force-fp8"):
        check_vram("6GB", cpu)


def test_the_headline_and_the_log_say_what_comes_and_goes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        components = placed(budgets()[-1])
        pixels(components)
    assert "t5 streams" in components.headline
    assert components.placing is not None
    assert components.placing.tokens >= WORK.rows * (WORK.tokens + 16)
    assert any("blocks resident" in record.message for record in caplog.records)
    assert any("Memory plan: " in record.message for record in caplog.records)
    assert load(device="cpu").headline.endswith("in float32")
