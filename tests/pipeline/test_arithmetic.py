"""How a loaded model multiplies by its FP8 weights is what was asked for at load."""

from pathlib import Path

import pytest

from octavo import GenerateRequest, generate, load
from octavo.errors import RequestError
from octavo.fp8 import paths
from octavo.pipeline.assemble import EMBEDDED_MODEL
from tests.tiny_tree import write_tiny_tree

FP8_MODEL = EMBEDDED_MODEL.parents[1] / "diffusion_models" / "octavo-demo-fp8.safetensors"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tree(tmp_path_factory.mktemp("tiny") / "models")


def test_a_backend_is_taken_by_name_and_changes_the_picture_a_little() -> None:
    request = GenerateRequest(prompt="a red star", steps=2, seed=1)
    exact, named = load(FP8_MODEL, device="cpu"), load(FP8_MODEL, device="cpu", backend="plain-w8a8")
    assert paths(named.mmdit()).layers == {"plain-w8a8": named.mmdit.fp8_linears}
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
