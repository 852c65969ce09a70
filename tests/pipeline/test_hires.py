"""A second, larger pass: what is asked of it, what it starts from, and that both passes are one job."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from octavo import Components, GenerateRequest, generate, load
from octavo.errors import OutOfMemoryError, RequestError
from octavo.pipeline import generate as generate_module
from octavo.pipeline.control_request import ControlImage
from octavo.pipeline.generate import Progress, enlarge, finish, prepare, prepare_each, start
from octavo.pipeline.hints import ControlPicture
from octavo.pipeline.hires import METHODS, Hires, enlarged
from octavo.pipeline.image import a1111_parameters, read_settings
from octavo.pipeline.passes import work_of
from octavo.pipeline.request import Job, Lora, resolve
from octavo.pipeline.run import solve
from octavo.placement.work import Work
from tests.tiny_tree import write_tiny_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tree(tmp_path_factory.mktemp("tiny") / "models")


@pytest.fixture
def tiny(tree: Path) -> Components:
    return load("tiny", models_dir=tree, device="cpu")


REQUEST = GenerateRequest(
    prompt="a red star", width=48, height=32, steps=3, sampler="euler", seed=5, guidance_scale=3.0, hires=Hires()
)


def with_hires(**settings: Any) -> GenerateRequest:
    return replace(REQUEST, hires=Hires(**settings))


def pixels(components: Components, request: GenerateRequest) -> bytes:
    (picture,) = generate(components, request)
    return picture.image.tobytes()


def job_of(components: Components, request: GenerateRequest) -> Job:
    return resolve(request, components.preset, model=components.name, max_side=components.max_side)


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({}, 2),  # both passes say the same
        ({"prompt": "a blue star"}, 3),
        ({"prompt": "a blue star", "negative_prompt": "red"}, 4),
        ({"guidance_scale": 1.0}, 2),  # the first pass has a negative prompt
        ({"prompt": "a blue star", "loras": (Lora("other"),)}, 2),  # read with other LoRAs, and so by themselves
    ],
)
def test_memory_is_planned_for_all_texts_that_are_encoded_together(
    tiny: Components, changes: dict[str, Any], texts: int
) -> None:
    assert work_of(job_of(tiny, with_hires(**changes)), tokens=77).prompts == texts


@pytest.mark.parametrize("method", ["lanczos", "latent-bislerp"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_sde", "dpm_adaptive"])
def test_a_picture_is_repeated_bit_for_bit_from_its_file(
    tiny: Components, tmp_path: Path, sampler: str, method: str
) -> None:
    request = replace(with_hires(method=method, scale=1.5, prompt="a blue star"), sampler=sampler, seed=None)
    (picture,) = generate(tiny, request)
    assert picture.image.size == (64, 48)  # 72 is as near to 64 as to 80, and to the even number of sixteens
    again = GenerateRequest.from_settings(read_settings(picture.save(tmp_path / "x.png")))
    assert pixels(tiny, again) == picture.image.tobytes()
    assert job_of(tiny, again).settings == picture.settings


def test_every_setting_of_the_second_pass_changes_the_picture(tiny: Components) -> None:
    """None of them is silently ignored: each alone gives another picture than without it."""
    plain = pixels(tiny, REQUEST)
    changes = {
        "scale": 1.5, "width": 80, "method": "latent-bicubic", "denoise": 0.6, "steps": 4, "guidance_scale": 1.0,
        "sampler": "heun", "schedule": "karras", "prompt": "a blue star", "negative_prompt": "red",
    }  # fmt: skip
    for name, value in changes.items():
        assert pixels(tiny, with_hires(**{name: value})) != plain, name


def test_what_is_not_said_is_as_in_the_first_pass(tiny: Components) -> None:
    same = {"steps": 3, "guidance_scale": 3.0, "sampler": "euler", "schedule": tiny.preset.schedule}
    said = with_hires(width=96, height=64, prompt="a red star", negative_prompt="", loras=(), **same)
    assert pixels(tiny, said) == pixels(tiny, REQUEST)


@pytest.mark.parametrize("method", METHODS)
def test_without_denoise_it_is_the_first_picture_made_larger(tiny: Components, method: str) -> None:
    """The second pass has no step then, so the picture is that of the first pass's latents, made larger."""
    job = job_of(tiny, with_hires(method=method, denoise=0.0))
    first = job.passes[0]
    latents = solve(start(tiny, first, prepare(tiny, first)), lambda _step: None)
    larger = enlarge(tiny, job, latents)
    assert larger.shape == (1, 16, 8, 12)
    assert pixels(tiny, job) == finish(tiny, job, larger).tobytes()


def test_what_is_enlarged_is_cut_and_not_stretched() -> None:
    """Where nothing is stretched, the middle is that of the whole picture made larger, but for the very edge."""
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 32, 64)
    wide = enlarged(ramp, Hires(method="bilinear"), 128, 64)
    square = enlarged(ramp, Hires(method="bilinear"), 64, 64)
    torch.testing.assert_close(square[..., 1:-1], wide[..., 33:95])


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({}, (256, 192)),
        ({"scale": 1}, (128, 96)),
        ({"scale": 1.5}, (192, 144)),
        ({"scale": 1.1}, (144, 112)),
        ({"width": 512}, (512, 384)),
        ({"height": 192}, (256, 192)),
        ({"width": 512, "height": 512}, (512, 512)),
    ],
)
def test_the_size_follows_from_factor_or_sides(asked: dict[str, Any], size: tuple[int, int]) -> None:
    assert Hires(**asked).size(128, 96) == size


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"scale": 0.9}, "scale"), ({"scale": 8.5}, "scale"), ({"width": 100}, "use 96"), ({"height": 0}, "height"),
        ({"scale": 2, "width": 256}, "leave one"), ({"method": "ESRGAN_4x"}, "upscaling models are not read"),
        ({"method": "lanczoss"}, "Did you mean 'lanczos'"), ({"denoise": 1.1}, "denoise"), ({"steps": 0}, "steps"),
        ({"guidance_scale": -1}, "guidance_scale"), ({"prompt": " "}, "leave it out"),
        ({"negative_prompt": "x <lora:y>"}, "not in the negative"), ({"scale": float("nan")}, "scale"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_at_birth(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Hires(**asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hires": Hires(scale=4)}, "192x128 is too large"),
        ({"hires": Hires(width=32, height=64)}, "smaller than those of 48x32"),
        ({"hires": Hires(sampler="eular")}, "Did you mean 'euler'"),
        ({"hires": Hires(schedule="karas")}, "Did you mean 'karras'"),
        ({"hires": Hires(prompt="<lora:style:strong> a star")}, "strong"),
    ],
)
def test_what_does_not_suit_the_model_is_refused(tiny: Components, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        generate(tiny, replace(REQUEST, **change))


@pytest.mark.parametrize(
    "settings",
    [{"scael": 2}, {"loras": 3}, {"width": "large"}, 3, "2", [2]],
)
def test_settings_of_another_kind_are_refused(settings: Any) -> None:
    with pytest.raises(RequestError):
        GenerateRequest.from_settings({"prompt": "x", "hires": settings})


def test_a_picture_to_start_from_has_no_second_pass() -> None:
    with pytest.raises(RequestError, match="second pass alone"):
        replace(REQUEST, image="x.png")


def test_a_prompt_of_its_own_brings_its_own_loras(tiny: Components) -> None:
    beside = (Lora("hands", 0.5),)
    first = replace(REQUEST, prompt="a star <lora:ink:0.7>", loras=beside)
    ink, oil = Lora("ink", 0.7), Lora("oil", 1.0)
    for hires, expected in [
        (Hires(), (*beside, ink)),
        (Hires(prompt="a blue star"), beside),
        (Hires(prompt="a <lora:oil> star"), (*beside, oil)),
        (Hires(loras=()), (ink,)),
        (Hires(loras=(oil,), prompt="a star"), (oil,)),
    ]:
        request = replace(first, hires=hires)
        assert request.hires_loras == expected
        job = job_of(tiny, request)
        assert [each.loras for each in job.passes] == [(*beside, ink), expected]
        assert "<lora" not in job.passes[1].prompt
        again = job_of(tiny, GenerateRequest.from_settings(job.settings))
        assert again.passes == job.passes


def test_progress_counts_both_passes_as_one_way(tiny: Components) -> None:
    """Three euler steps, then two of heun, which evaluates twice in all steps but the last."""
    seen: list[Progress] = []
    generate(tiny, with_hires(steps=2, sampler="heun"), watch=seen.append)
    steps = [each for each in seen if each.stage == "denoise"]
    assert [each.step for each in steps] == [0, 1, 2, 3, 3, 4, 5, 6]
    assert {each.steps for each in steps} == {6}
    assert [each.denoised.shape[-1] for each in steps if each.denoised is not None] == [6] * 3 + [12] * 3
    assert (seen[-1].stage, seen[-1].step) == ("decode", 6)


def test_the_total_is_unknown_where_either_pass_chooses_its_steps(tiny: Components) -> None:
    seen: list[Progress] = []
    generate(tiny, with_hires(sampler="dpm_adaptive"), watch=seen.append)
    assert {each.steps for each in seen if each.stage == "denoise"} == {0}


def test_a_watcher_stops_the_second_pass(tiny: Components) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tiny, REQUEST, watch=stop)


def test_pictures_of_a_batch_equal_those_made_alone(tiny: Components) -> None:
    together = generate(tiny, replace(REQUEST, batch=2))
    for picture, seed in zip(together, (5, 6), strict=True):
        assert pixels(tiny, replace(REQUEST, seed=seed)) == picture.image.tobytes()


@pytest.mark.parametrize("method", ["lanczos", "latent-bislerp"])
def test_memory_is_planned_for_the_larger_pass_and_given_up_in_it(
    tiny: Components, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    request = with_hires(method=method)
    expected = pixels(tiny, request)
    works: list[Work] = []
    monkeypatch.setattr(tiny, "fit", lambda work, _controls=(): works.append(work))
    given_up: list[str] = []
    monkeypatch.setattr(tiny, "smaller", lambda: not given_up.append("smaller"))
    real = generate_module.enlarge

    def short_at_first(components: Components, job: Job, latents: Tensor) -> Tensor:
        if not given_up:
            raise torch.OutOfMemoryError("out of memory")
        return real(components, job, latents)

    monkeypatch.setattr(generate_module, "enlarge", short_at_first)
    assert pixels(tiny, request) == expected
    assert given_up == ["smaller"]
    assert {(work.width, work.height, work.rows) for work in works} == {(96, 64, 2)}


def test_memory_that_does_not_suffice_is_said_of_the_larger_size(
    tiny: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(generate_module, "enlarge", short)
    with pytest.raises(OutOfMemoryError, match="a picture of 96x64 pixels"):
        generate(tiny, REQUEST)


def test_each_pass_follows_the_control_at_its_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edges of a photo are found anew at the larger size, where a line is still one or two pixels wide."""
    photo = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(photo).rectangle((16, 16, 48, 48), fill="black")
    photo.save(tmp_path / "photo.png")
    edges = ControlImage(image=str(tmp_path / "photo.png"), type="canny", preprocess="canny")
    components = load(device="cpu", dtype="float32")
    hinted: list[tuple[tuple[int, int], float]] = []
    real: Callable[..., Tensor] = ControlPicture.__call__

    def spy(self: ControlPicture, size: tuple[int, int]) -> Tensor:
        hinted.append((size, self._pixels.mean().item()))
        return real(self, size)

    monkeypatch.setattr(ControlPicture, "__call__", spy)
    request = GenerateRequest(prompt="red", width=64, height=64, steps=2, seed=1, controls=(edges,), hires=Hires())
    prepare_each(components, job_of(components, request))
    (small, few), (large, fewer) = hinted
    assert (small, large) == ((8, 8), (16, 16))
    assert fewer < 0.7 * few  # of twice as many pixels a side, so a share that falls towards half
    assert pixels(components, request) != pixels(components, replace(request, controls=()))


def test_speed_forecasts_in_both_passes() -> None:
    components = load(device="cpu", dtype="float32")
    seen: list[Progress] = []
    request = GenerateRequest(
        prompt="a red star on a blue background", width=64, height=64, seed=1, steps=16, speed="fast", hires=Hires()
    )
    generate(components, request, watch=seen.append)
    of_first = [each.forecast for each in seen if each.stage == "denoise" and each.step == 16][-1]
    assert 0 < of_first < seen[-1].forecast
    assert seen[-1].step == 32


def test_other_programs_are_told_of_the_second_pass(tiny: Components) -> None:
    (picture,) = generate(tiny, with_hires(steps=4, prompt="a blue star, large", denoise=0.4, sampler="heun"))
    line = a1111_parameters(picture.settings).splitlines()[-1]
    for part in ("Size: 48x32", "Denoising strength: 0.4", "Hires resize: 96x64", "Hires steps: 4",
                 "Hires upscaler: lanczos", "Hires sampler: heun", 'Hires prompt: "a blue star, large"'):  # fmt: skip
        assert part in line
