"""LoRAs of a request: found by name, acting as merged weights would, alone and in company."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import octavo
from octavo.engine.batch import Batcher
from octavo.errors import ModelNotFoundError, NumericsError, RequestError
from octavo.fp8 import Fp8Linear
from octavo.models.adapter import adapted, weight_of
from octavo.pipeline.components import Components
from octavo.pipeline.encode import Conditioning, TextEncoders
from octavo.pipeline.generate import prepare, prepare_each, start
from octavo.pipeline.hires import Hires
from octavo.pipeline.image import a1111_parameters
from octavo.pipeline.request import GenerateRequest, Job, Lora, resolve
from octavo.pipeline.run import Run, Walk, solve
from octavo.pipeline.shelf import LoadSettings, Shelf
from octavo.text.lora_tags import as_tag, split_tags, spoken
from tests.lora_files import CLIP_LAYERS, MMDIT_LAYERS, low_rank, merge_into, write_lora

FP8 = "octavo-demo-fp8.safetensors"


@pytest.fixture(scope="module")
def plain() -> Components:
    return octavo.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tree(plain: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRAs of the model, one of which speaks to CLIP-L too."""
    root = tmp_path_factory.mktemp("models")
    mmdit, clip = plain.mmdit.skeleton, plain.encoders[0].skeleton
    of_model, of_text = low_rank(mmdit, MMDIT_LAYERS, size=0.3), low_rank(clip, CLIP_LAYERS, size=0.5)
    write_lora(root / "loras" / "style" / "One.safetensors", mmdit=of_model, clip_l=of_text)
    write_lora(root / "loras" / "two.safetensors", mmdit=low_rank(mmdit, MMDIT_LAYERS, size=0.3, seed=2))
    return root


@pytest.fixture(scope="module")
def components(tree: Path) -> Components:
    return octavo.load(models_dir=tree, device="cpu", dtype="float32")


def job_of(components: Components, prompt: str, **settings: object) -> Job:
    request = GenerateRequest(prompt=prompt, **({"steps": 2, "seed": 5, "width": 64, "height": 64} | settings))  # type: ignore[arg-type]
    return resolve(request, components.preset, model=components.name, max_side=components.max_side)


def latents(components: Components, prompt: str, **settings: object) -> Tensor:
    job = job_of(components, prompt, **settings)
    return solve(start(components, job, prepare(components, job)), lambda _step: None)


@pytest.mark.parametrize(
    ("prompt", "rest", "tags"),
    [
        ("a star", "a star", []),
        ("a star <lora:one:0.8> on blue", "a star on blue", [("one", 0.8, None)]),
        ("<lora:a b>, <LORA: sub/c.safetensors : -1.5 >", ",", [("a b", 1.0, None), ("sub/c.safetensors", -1.5, None)]),
        ("x<lora:one:0.25:0.5>y", "xy", [("one", 0.5, 0.25)]),
        (r"a \<lora:one:1> sign", r"a \<lora:one:1> sign", []),
        ("1 < 2 <lora:open", "1 < 2 <lora:open", []),
    ],
)
def test_tags_are_taken_out_of_a_prompt(prompt: str, rest: str, tags: list[tuple[str, float, float | None]]) -> None:
    found_rest, found = split_tags(prompt)
    assert found_rest == rest
    assert [(tag.name, tag.strength, tag.text_strength) for tag in found] == tags
    again = split_tags(" ".join([found_rest, *(as_tag(*tag) for tag in tags)]))
    assert again == (rest, found)
    assert spoken(rest) == rest.replace("\\<", "<")


@pytest.mark.parametrize("tag", ["<lora:>", "<lora:x:strong>", "<lora:x:nan>", "<lora:x:1:1:1>", "<lora:x:101>"])
def test_a_tag_that_means_nothing_is_refused(plain: Components, tag: str) -> None:
    with pytest.raises(RequestError, match=r"lora:|strength"):
        job_of(plain, f"a star {tag}")


def test_a_negative_prompt_has_no_loras() -> None:
    with pytest.raises(RequestError, match="not in the negative one"):
        GenerateRequest(prompt="a star", negative_prompt="<lora:x:1>")


def test_a_request_with_loras_is_read_back_from_its_picture(components: Components) -> None:
    job = job_of(components, "a star <lora:two:0.5:0.8>", loras=(Lora("style/One.safetensors", -0.5),))
    assert job.prompt == "a star"
    assert job.settings["loras"] == [
        {"name": "style/One.safetensors", "strength": -0.5},
        {"name": "two", "strength": 0.8, "text_strength": 0.5},
    ]
    again = GenerateRequest.from_settings(job.settings)
    assert resolve(again, components.preset, model=components.name, max_side=components.max_side) == job
    text = a1111_parameters(job.settings).split("\n")[0]
    assert text == "a star <lora:style/One.safetensors:-0.5> <lora:two:0.5:0.8>"
    assert "loras" not in job_of(components, "a star").settings


def test_a_lora_acts_as_merged_weights_would(components: Components) -> None:
    merged = octavo.load(device="cpu", dtype="float32")
    mmdit, clip = merged.mmdit(), merged.encoders[0]()
    merge_into(mmdit, low_rank(mmdit, MMDIT_LAYERS, size=0.3), 0.7)
    merge_into(mmdit, low_rank(mmdit, MMDIT_LAYERS, size=0.3, seed=2), -0.4)
    merge_into(clip, low_rank(clip, CLIP_LAYERS, size=0.5), 0.9)
    drawn = latents(components, "a red star <lora:one:0.9:0.7><lora:two:-0.4>")
    assert (drawn - latents(merged, "a red star")).abs().max() < 2e-3
    assert (drawn - latents(components, "a red star")).abs().max() > 0.1
    # Taken off, it leaves no trace.
    assert torch.equal(latents(components, "a red star"), latents(components, "a red star <lora:one:0>"))


@pytest.mark.parametrize("fast", [False, True])
def test_fp8_layers_give_their_own_output_and_the_change(tree: Path, fast: bool) -> None:
    """bfloat16 keeps 8 bits: each of the sums' terms is rounded, which a few steps of the result's size bound."""
    fp8 = octavo.load(FP8, models_dir=tree, device="cpu", dtype="bfloat16", fast=fast)
    mmdit = fp8.mmdit()
    names = [name for name in MMDIT_LAYERS if isinstance(mmdit.get_submodule(name), Fp8Linear)]
    assert names
    changes = low_rank(mmdit, MMDIT_LAYERS, size=0.3)
    ((adapter, _),) = fp8.stack([Lora("one")])["mmdit"]
    for name in names:
        layer = mmdit.get_submodule(name)
        assert isinstance(layer, Fp8Linear)
        x = torch.randn(9, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.inference_mode():
            alone = layer(x).float()
            with adapted(mmdit, [(adapter, 0.8)]):
                changed = layer(x).float()
        delta = changes[f"{name}.lora_up.weight"] @ changes[f"{name}.lora_down.weight"]
        expected = alone + 0.8 * x.float() @ delta.t()
        assert (changed - expected).abs().max() <= 4 * 2**-8 * expected.abs().max()


def test_dora_acts_on_weights_that_were_given_up_as_on_those_of_the_file(tree: Path) -> None:
    """INT8 by row is off by half of a 127th of a row's largest weight at most, and a row's length by √K times that."""
    exact, fast = (
        octavo.load(FP8, models_dir=tree, device="cpu", dtype="float32", fast=fast) for fast in (False, True)
    )
    mmdit = fast.mmdit()
    given_up = [name for name, layer in mmdit.named_modules() if isinstance(layer, Fp8Linear) and layer.given_up]
    if not given_up:
        pytest.skip("this processor has no faster form of the weights")
    name = given_up[0]
    layers = [each.mmdit().get_submodule(name) for each in (exact, fast)]
    weight = weight_of(layers[0])
    change = low_rank(exact.mmdit(), [name], size=0.3)
    changed = weight + change[f"{name}.lora_up.weight"] @ change[f"{name}.lora_down.weight"]
    magnitude = 1.3 * changed.norm(dim=1)
    tensors = change | {f"{name}.dora_scale": magnitude}
    write_lora(tree / "loras" / "dora.safetensors", mmdit=tensors)
    ((adapter, _),) = exact.stack([Lora("dora")])["mmdit"]
    plain = adapter.change(name, layers[0], torch.float32).scale
    adapter.release()
    twin = adapter.change(name, layers[1], torch.float32).scale
    assert plain is not None
    assert twin is not None
    torch.testing.assert_close(plain, torch.full_like(plain, 1.3), rtol=1e-5, atol=0)
    bound = weight.shape[1] ** 0.5 * weight.abs().amax(1) / 254 / changed.norm(dim=1)
    assert bool(((twin / plain - 1).abs() <= 1.1 * bound).all())
    assert float((twin / plain - 1).abs().max()) < 0.01
    assert not torch.equal(latents(fast, "a red star <lora:dora>"), latents(fast, "a red star"))


def test_in_company_each_run_has_its_own_loras(components: Components) -> None:
    """Rows with equal LoRAs share calls, others never do; the pictures are those of each run alone."""
    prompts = ["a red star", "a red star <lora:one:0.8>", "a blue ring <lora:one:0.8>", "a red star <lora:two>"]
    runs = []
    for prompt in prompts:
        job = job_of(components, prompt)
        runs.append(start(components, job, prepare(components, job)))
    shapes = [frozenset(next_question(run)) for run in runs]
    assert shapes[1] == shapes[2]
    assert len(set(shapes)) == 3
    alone = [solve(run, lambda _step: None) for run in runs]
    batcher = Batcher()
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda run: batcher.solve(run, lambda _step: None), runs))
    finally:
        batcher.close()
    for one, other in zip(alone, together, strict=True):
        assert (one - other).abs().max() < 1e-3


def next_question(run: Run) -> set[tuple[object, ...]]:
    with torch.inference_mode():
        question = Walk(run).question
    assert question is not None
    return question.shapes


def test_texts_are_remembered_by_the_loras_they_were_encoded_with(tree: Path) -> None:
    shelf = Shelf(LoadSettings(models_dir=tree, device="cpu", dtype="float32"))
    components = shelf.components()

    def encode(encoders: TextEncoders, prompts: Sequence[str], clip_skip: int) -> list[Conditioning]:
        return shelf.encode_all(encoders, prompts, clip_skip=clip_skip)

    def positive(prompt: str) -> Tensor:
        track = prepare(components, job_of(components, prompt, guidance_scale=1), encode=encode)
        return track.positive[0].conditioning.context

    texts = [positive(prompt) for prompt in ("a star", "a star <lora:one>", "a star", "a star <lora:one>")]
    assert shelf.texts.misses == 2
    assert shelf.texts.hits == 2
    assert torch.equal(texts[0], texts[2])
    assert torch.equal(texts[1], texts[3])
    assert not torch.equal(texts[0], texts[1])


def test_files_are_read_once_and_found_by_any_form_of_their_name(components: Components, tree: Path) -> None:
    stacks = [
        components.stack([Lora(name)]) for name in ("style/One.safetensors", "style/one", "One", "ONE.safetensors")
    ]
    assert len({stack["mmdit"][0][0] for stack in stacks}) == 1
    assert components.stack([Lora(str(tree / "loras" / "two.safetensors"))])["mmdit"]
    with pytest.raises(ModelNotFoundError, match=r"no LoRA 'tow'.*Did you mean 'two'.*style/One"):
        components.stack([Lora("tow")])


def test_names_from_a_network_never_lead_out_of_the_tree(tree: Path, tmp_path: Path) -> None:
    shelf = Shelf(LoadSettings(models_dir=tree, device="cpu"))
    outside = tmp_path / "two.safetensors"
    outside.write_bytes((tree / "loras" / "two.safetensors").read_bytes())
    for name in (str(outside), "../loras/../../two.safetensors"):
        with pytest.raises(ModelNotFoundError):
            shelf.components().stack([Lora(name)])


def test_a_lora_that_is_too_strong_is_named_among_the_remedies(components: Components, tree: Path) -> None:
    tensors = low_rank(components.mmdit.skeleton, MMDIT_LAYERS[:1], size=1e20)
    write_lora(tree / "loras" / "wild.safetensors", mmdit={name: t * 1e18 for name, t in tensors.items()})
    with pytest.raises(NumericsError, match="a lower strength may help"):
        latents(components, "a red star <lora:wild:100>")
    assert latents(components, "a red star").isfinite().all()


def test_what_is_released_in_use_is_made_again(components: Components) -> None:
    """As happens where a server has read many other LoRAs meanwhile."""
    ((adapter, _),) = components.stack([Lora("two")])["mmdit"]
    before = latents(components, "a red star <lora:two>")
    adapter.release()
    assert torch.equal(latents(components, "a red star <lora:two>"), before)


def test_each_pass_has_the_loras_that_its_prompt_asks_for(components: Components) -> None:
    hires = Hires(prompt="a red star <lora:two:0.5>")
    job = job_of(components, "a red star <lora:One>", hires=hires, negative_prompt="")
    first, second = prepare_each(components, job)
    assert first.adapters == components.stack((Lora("One"),))["mmdit"]
    assert second.adapters == components.stack((Lora("two", 0.5),))["mmdit"]
    # One speaks to CLIP-L, two does not: the same words are read anew without it.
    read = [track.positive[0].conditioning.context for track in (first, second)]
    assert not torch.equal(*read)
    (plain,) = prepare_each(components, job_of(components, "a red star"))
    assert torch.equal(read[1], plain.positive[0].conditioning.context)
