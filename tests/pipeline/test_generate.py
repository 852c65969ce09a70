"""The whole job on a tiny random model: what is repeated, what is refused, what is freed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from torch import Tensor

from octavo import Components, GenerateRequest, generate, generate_each, load
from octavo.checkpoint.save import save_safetensors
from octavo.errors import ModelNotFoundError, NumericsError, OctavoError, RequestError, WrongModelError
from octavo.pipeline import components as components_module
from octavo.pipeline.generate import Progress
from octavo.pipeline.image import read_settings
from octavo.sampling import SAMPLERS, SCHEDULES, SkipLayerGuidance
from tests.tiny_tree import write_tiny_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tree(tmp_path_factory.mktemp("tiny") / "models")


@pytest.fixture
def tiny(tree: Path) -> Components:
    return load("tiny", models_dir=tree, device="cpu")


REQUEST = GenerateRequest(prompt="a red star", width=48, height=32, steps=3, sampler="euler", seed=5)


def pixels(components: Components, request: GenerateRequest) -> bytes:
    (picture,) = generate(components, request)
    return picture.image.tobytes()


@pytest.mark.parametrize(
    "sampler", ["euler", "dpmpp_2m", "dpmpp_sde", "euler_ancestral", "dpm_adaptive", "euler_cfg_pp"]
)
def test_a_picture_is_repeated_bit_for_bit_from_its_file(tiny: Components, tmp_path: Path, sampler: str) -> None:
    (picture,) = generate(tiny, replace(REQUEST, sampler=sampler, seed=None, prompt="a (red:1.3) star"))
    settings = read_settings(picture.save(tmp_path / "x.png"))
    assert pixels(tiny, GenerateRequest.from_settings(settings)) == picture.image.tobytes()


def test_every_setting_that_is_asked_for_changes_the_picture(tiny: Components) -> None:
    """None of them is silently ignored: each alone gives another picture than without it."""
    base = replace(REQUEST, steps=4)
    plain = pixels(tiny, base)
    changes = {
        "prompt": "a blue star", "negative_prompt": "red", "steps": 5, "guidance_scale": 2.0, "sampler": "heun",
        "schedule": "karras", "shift": 1.5, "seed": 6, "guidance_rescale": 0.7, "guidance_start": 0.3,
        "guidance_end": 0.6, "clip_skip": 1, "width": 64,
        "skip_layer_guidance": SkipLayerGuidance(scale=2, layers=(1,), start=0, end=1),
    }  # fmt: skip
    for name, value in changes.items():
        assert pixels(tiny, replace(base, **{name: value})) != plain, name


def test_pictures_of_a_batch_equal_those_made_alone(tiny: Components) -> None:
    together = generate(tiny, replace(REQUEST, batch=3))
    assert [p.settings["seed"] for p in together] == [5, 6, 7]
    for picture in together:
        alone = replace(REQUEST, seed=picture.settings["seed"])
        assert pixels(tiny, alone) == picture.image.tobytes()
    assert len({p.image.tobytes() for p in together}) == 3


def test_pictures_arrive_one_by_one_and_the_rest_can_be_left(tiny: Components) -> None:
    done: list[int] = []
    pictures = generate_each(tiny, replace(REQUEST, batch=1000), watch=lambda p: done.append(p.picture))
    next(pictures)
    pictures.close()
    assert set(done) == {0}


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2s_ancestral", "lms"])
def test_progress_counts_every_evaluation_and_ends_at_its_total(tiny: Components, sampler: str) -> None:
    seen: list[Progress] = []
    generate(tiny, replace(REQUEST, sampler=sampler), watch=seen.append)
    steps = [p for p in seen if p.stage == "denoise"]
    assert [p.step for p in steps] == list(range(steps[0].steps + 1))
    assert (seen[0].stage, seen[-1].stage) == ("encode", "decode")
    assert all(p.denoised is not None and p.denoised.shape == (1, 16, 4, 6) for p in steps[1:])


def test_an_exception_of_the_watcher_stops_the_job(tiny: Components) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tiny, REQUEST, watch=stop)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_draws_a_finite_picture(tiny: Components, name: str) -> None:
    (picture,) = generate(tiny, replace(REQUEST, sampler=name, steps=5))
    assert picture.image.size == (48, 32)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_draws_a_finite_picture(tiny: Components, name: str) -> None:
    (picture,) = generate(tiny, replace(REQUEST, schedule=name))
    assert picture.settings["schedule"] == name


def test_image_to_image_keeps_more_the_less_is_made_anew(tiny: Components, tmp_path: Path) -> None:
    (start,) = generate(tiny, REQUEST)
    path = str(start.save(tmp_path / "start.png"))

    def distance(denoise: float) -> float:
        (picture,) = generate(tiny, replace(REQUEST, image=path, denoise=denoise, seed=9, steps=8))
        histogram = ImageChops.difference(picture.image, kept.image).convert("L").histogram()
        return sum(level * count for level, count in enumerate(histogram))

    (kept,) = generate(tiny, replace(REQUEST, image=path, denoise=0.0))
    assert distance(0.0) == 0
    assert distance(0.1) < distance(0.5) < distance(0.9)


def test_a_picture_of_any_mode_and_shape_can_start_a_run(tiny: Components, tmp_path: Path) -> None:
    for mode, size in (("RGBA", (7, 99)), ("L", (200, 20)), ("P", (48, 32)), ("1", (5, 5)), ("I;16", (48, 32))):
        path = tmp_path / f"{mode.replace(';', '')}.png"
        Image.new(mode, size).save(path)
        (picture,) = generate(tiny, replace(REQUEST, image=str(path), denoise=0.5))
        assert picture.image.size == (48, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "eular"}, "Did you mean 'euler'"),
        ({"schedule": "karas"}, "Did you mean 'karras'"),
        ({"width": 144}, "too large"),
        ({"seed": 2**64 - 1, "batch": 2}, "no room"),
        ({"image": "missing.png"}, "no file"),
    ],
)
def test_requests_that_do_not_suit_the_model_are_refused(
    tiny: Components, change: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        generate(tiny, replace(REQUEST, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "  "}, {"width": 50}, {"height": 0}, {"height": -16}, {"steps": 0}, {"steps": 1001},
        {"guidance_scale": -1}, {"guidance_scale": float("nan")}, {"seed": -1}, {"seed": 2**64}, {"batch": 0},
        {"denoise": 1.5}, {"denoise": 0.5}, {"guidance_start": 0.5, "guidance_end": 0.5}, {"clip_skip": 0},
        {"shift": 0.0}, {"shift": float("inf")}, {"steps": True}, {"steps": "20"},
    ],
)  # fmt: skip
def test_requests_that_make_no_sense_are_refused_at_birth(change: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        GenerateRequest(**{"prompt": "a star", **change})


@pytest.mark.parametrize(
    "settings",
    [{"prompt": "x", "stepz": 3}, {"prompt": 3}, {"prompt": "x", "skip_layer_guidance": 3}, {"steps": 3}],
)
def test_settings_of_another_kind_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        GenerateRequest.from_settings(settings)


def test_overflow_ends_in_an_error_that_names_the_layer_and_not_in_a_black_picture(tiny: Components) -> None:
    tiny.mmdit().joint_blocks[1].x_block.mlp.fc1.bias.fill_(float("inf"))
    with pytest.raises(NumericsError, match=r"evaluation 1\. .*'joint_blocks\.1\.x_block\.mlp\.fc1'"):
        generate(tiny, REQUEST)


def test_parts_leave_when_memory_is_short_and_the_picture_stays_the_same(
    tiny: Components, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = pixels(tiny, REQUEST)
    assert all(part.loaded for part in (*tiny.encoders, tiny.mmdit, tiny.vae))
    monkeypatch.setattr(components_module, "free_bytes", lambda _device: 0)
    short = load("tiny", models_dir=tree, device="cpu", tiled_vae=False)
    assert pixels(short, REQUEST) == roomy
    assert [part.loaded for part in (*short.encoders, short.mmdit, short.vae)] == [False] * 4 + [True]


def test_tiled_decoding_is_used_when_asked(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.pipeline.generate.TILE", 4)
    monkeypatch.setattr("octavo.pipeline.generate.OVERLAP", 1)
    calls: list[tuple[int, ...]] = []

    def counted(decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda z: calls.append(tuple(z.shape)) or decode(z)

    tiled = load("tiny", models_dir=tree, device="cpu", tiled_vae=True)
    monkeypatch.setattr(tiled.vae(), "decode", counted(tiled.vae().decode))
    generate(tiled, REQUEST)
    assert len(calls) > 1
    assert all(shape[2] <= 4 and shape[3] <= 4 for shape in calls)


def test_encoders_are_found_in_the_tree_or_named_or_missed(tree: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "models" / "checkpoints"
    lonely.mkdir(parents=True)
    (lonely / "tiny.safetensors").symlink_to(tree / "checkpoints" / "tiny.safetensors")
    with pytest.raises(ModelNotFoundError, match="octavo pull text-encoders"):
        load("tiny", models_dir=lonely.parent)
    clip_only = load(
        "tiny", models_dir=lonely.parent, text_encoders=[tree / "text_encoders" / "clip_l.safetensors"], device="cpu"
    )
    assert "CLIP-G and T5 not found" in clip_only.warnings[0]
    assert pixels(clip_only, REQUEST)


def test_the_model_s_own_kind_is_checked(tree: Path) -> None:
    with pytest.raises(WrongModelError, match="text encoder"):
        load(tree / "text_encoders" / "clip_l.safetensors", models_dir=tree)
    with pytest.raises(OctavoError, match="Did you mean 'tiny'"):
        load("tinny", models_dir=tree)


def test_textual_inversion_takes_the_place_of_words(tree: Path) -> None:
    folder = tree / "embeddings"
    folder.mkdir(exist_ok=True)
    save_safetensors(folder / "mine.safetensors", {"clip_l": torch.randn(2, 64), "clip_g": torch.randn(2, 64)}, None)
    components = load("tiny", models_dir=tree, device="cpu")
    plain = pixels(components, replace(REQUEST, prompt="a star"))
    assert pixels(components, replace(REQUEST, prompt="a star embedding:mine")) != plain
    assert pixels(components, replace(REQUEST, prompt="a star embedding:../mine")) != b""
