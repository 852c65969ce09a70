"""The whole job on a tiny random model: what is repeated, what is refused, what is freed."""

from collections.abc import Callable, Sequence
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
from octavo.pipeline.encode import Conditioning, TextEncoders, encode_all
from octavo.pipeline.generate import Progress, prepare, start
from octavo.pipeline.image import open_image, read_settings
from octavo.pipeline.latents import latents_of, mask_of
from octavo.pipeline.request import resolve
from octavo.pipeline.run import Run, Watch, solve
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


def test_only_the_white_of_a_mask_is_drawn(tiny: Components, tmp_path: Path) -> None:
    """In latents: where the mask is black they are the picture's, where it is white they are as far off as noise is."""
    (start_picture,) = generate(tiny, REQUEST)
    image = str(start_picture.save(tmp_path / "start.png"))
    mask = Image.new("L", (96, 64), 0)  # of twice the size
    mask.paste(255, (0, 0, 48, 64))
    mask.save(tmp_path / "mask.png")
    asked = replace(REQUEST, image=image, mask=str(tmp_path / "mask.png"), seed=9, steps=4)
    job = resolve(asked, tiny.preset, model=tiny.name, max_side=tiny.max_side)
    run = start(tiny, job, prepare(tiny, job))
    kept = latents_of(open_image(Path(image)), tiny.vae(), width=48, height=32)
    off = (solve(run, lambda _step: None) - kept).abs()
    assert off[..., 3:].amax() < 1e-5
    assert off[..., :3].mean() > 0.1
    (picture,) = generate(tiny, asked)
    assert picture.settings["mask"] == asked.mask
    assert pixels(tiny, GenerateRequest.from_settings(picture.settings)) == picture.image.tobytes()
    assert pixels(tiny, replace(asked, mask=None)) != picture.image.tobytes()


def test_a_mask_shows_its_grey_and_lies_as_its_picture_does() -> None:
    """Grey 128 is 128/255 of the way; a mask of other proportions is cropped around its middle."""
    mask = Image.new("L", (96, 32), 0)
    mask.paste(128, (48, 0, 96, 32))
    latent = mask_of(mask, width=32, height=32)
    assert latent.shape == (1, 1, 4, 4)
    torch.testing.assert_close(latent[0, 0], torch.tensor([0, 0, 1, 1.0]).expand(4, 4) * 128 / 255, atol=0.02, rtol=0)


def test_the_work_goes_to_those_who_are_named(tiny: Components) -> None:
    """An engine's own encoder, solver and device thread are used for all of the work, and give the same picture."""
    told: list[str] = []

    def my_encode(encoders: TextEncoders, prompts: Sequence[str], clip_skip: int) -> list[Conditioning]:
        told.append(f"encode {prompts}")
        return encode_all(encoders, prompts, clip_skip)

    def my_solve(run: Run, watch: Watch) -> Tensor:
        told.append("solve")
        return solve(run, watch)

    def my_device(work: Callable[[], object]) -> object:
        told.append("begin")
        try:
            return work()
        finally:
            told.append("end")

    (picture,) = generate_each(tiny, REQUEST, encode=my_encode, solve=my_solve, on_device=my_device)
    assert told == ["begin", "encode ['a red star', '']", "end", "begin", "end", "solve", "begin", "end"]
    assert picture.image.tobytes() == pixels(tiny, REQUEST)


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
        ({"image": __file__, "mask": "missing.png"}, "cannot be read as a picture"),
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
        {"mask": "mask.png"}, {"shift": 0.0}, {"shift": float("inf")}, {"steps": True}, {"steps": "20"},
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
    monkeypatch.setattr("octavo.pipeline.components.TILE", 4)
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
