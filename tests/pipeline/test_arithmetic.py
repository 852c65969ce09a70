"""How a loaded model multiplies by its FP8 weights is what was asked for at load."""

from pathlib import Path

import pytest
import torch

from octavo import Components, GenerateRequest, generate, load
from octavo.errors import NumericsError, RequestError
from octavo.fp8 import Choice, Fp8Linear, paths
from octavo.fp8.matmul import PLAIN_WIDE
from octavo.pipeline.assemble import EMBEDDED_MODEL
from tests.tiny_tree import write_tiny_tree

FP8_MODEL = EMBEDDED_MODEL.parents[1] / "diffusion_models" / "octavo-demo-fp8.safetensors"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tree(tmp_path_factory.mktemp("tiny") / "models")


def test_a_backend_is_taken_by_name_and_changes_the_picture_a_little() -> None:
    request = GenerateRequest(prompt="a red star", steps=2, seed=1)
    exact, named = load(FP8_MODEL, device="cpu"), load(FP8_MODEL, device="cpu", backend="plain-w8a8")
    rounded = [each for each in named.mmdit().modules() if isinstance(each, Fp8Linear) and not each.spec.full_precision]
    taken = paths(named.mmdit()).layers
    assert taken["plain-w8a8"] == len(rounded) > 20  # the others ask not to be multiplied in FP8
    assert sum(taken.values()) == named.mmdit.fp8_linears
    assert "plain-w8a8" not in paths(exact.mmdit()).layers
    pictures = [generate(components, request)[0].image for components in (exact, named)]
    difference = [abs(a - b) for a, b in zip(*(picture.tobytes() for picture in pictures), strict=True)]
    assert 0 < sum(difference) / len(difference) < 20


@pytest.mark.parametrize(
    ("model", "backend", "message"),
    [
        (FP8_MODEL, "fast", "no backend 'fast'. Use one of cpu,"),
        (FP8_MODEL, "torch", "'octavo-demo-fp8.safetensors': None of the model's .* runs on cuda, this is cpu"),
        ("tiny", "plain-w8a8", "'tiny.safetensors': .* multiplies by FP8 weights, and the model has none"),
    ],
)
def test_a_backend_of_no_use_is_refused_before_weights_are_read(
    tree: Path, model: str, backend: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        load(model, models_dir=tree, device="cpu", backend=backend)


OVERFLOWING = "joint_blocks.0.x_block.mlp.fc2"
REQUEST = GenerateRequest(prompt="a red star", width=32, height=32, steps=3, sampler="euler", seed=5)


def overflowing(tree: Path, *, backend: str = "plain", fast: bool = False, retry_bf16: bool = True) -> Components:
    """A model whose layer has weights beyond float16, though neither its inputs nor its outputs are."""
    components = load(
        "tiny", models_dir=tree, device="cpu", dtype="float16", force_fp8=True, backend=None if fast else backend,
        fast=fast, retry_bf16=retry_bf16,
    )  # fmt: skip
    fc1, fc2 = (layer_of(components, f"{OVERFLOWING[:-1]}{i}") for i in (1, 2))
    assert fc1.bias is not None
    fc1.scale *= 1e-4
    fc1.bias.mul_(1e-4)
    fc2.scale *= 1e7
    return components


def layer_of(components: Components, name: str) -> Fp8Linear:
    layer = components.mmdit().get_submodule(name)
    assert isinstance(layer, Fp8Linear)
    return layer


def test_a_layer_that_overflows_is_named(tree: Path) -> None:
    with pytest.raises(NumericsError, match=rf"'{OVERFLOWING}' \(Fp8Linear on the path 'plain'\).*Try --retry-bf16"):
        generate(overflowing(tree, retry_bf16=False), REQUEST)


def test_or_goes_on_in_more_bits_with_one_warning(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    components = overflowing(tree)
    pictures = [generate(components, REQUEST)[0].image.tobytes() for _ in range(2)]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"'{OVERFLOWING}'" in warning
    assert paths(components.mmdit()).layers["plain-wide"] == 1
    from_the_start = overflowing(tree)
    layer_of(from_the_start, OVERFLOWING).use(Choice(PLAIN_WIDE, {}))
    expected = generate(from_the_start, REQUEST)[0].image.tobytes()
    assert pictures == [expected, expected]


def test_where_more_bits_do_not_help_it_says_so(tree: Path) -> None:
    components = overflowing(tree)
    layer_of(components, OVERFLOWING).scale *= 1e9
    with pytest.raises(NumericsError, match="Retrying it in bfloat16 did not help"):
        generate(components, REQUEST)


def test_the_modulation_is_watched_too(tree: Path) -> None:
    components = load(
        "tiny", models_dir=tree, device="cpu", dtype="float16", force_fp8=True, backend="plain", retry_bf16=True
    )
    name = "joint_blocks.1.x_block.adaLN_modulation.1"
    layer_of(components, name).scale *= 1e9
    with pytest.raises(NumericsError, match=f"left '{name}'"):
        generate(components, REQUEST)


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor lacks VNNI")
def test_a_layer_without_its_fp8_weights_cannot_be_retried(tree: Path) -> None:
    components = overflowing(tree, fast=True)
    layer = layer_of(components, OVERFLOWING)
    assert layer.given_up
    assert layer.bias is not None
    layer.bias.fill_(torch.inf)
    with pytest.raises(NumericsError, match="leave --fast out"):
        generate(components, REQUEST)
