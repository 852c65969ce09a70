"""CLIP's numbers are CLIP's own; whatever is missing is named."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octavo.errors import MissingExtraError, ModelNotFoundError
from octavo.evaluate.features import ClipNetwork, JudgeNetwork, features_of
from octavo.evaluate.metrics import cosine_score
from octavo.evaluate.typography import RapidReader, share_read


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP with a vocabulary of bytes."""
    transformers = pytest.importorskip("transformers", reason="the eval extra is not installed")
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    letters = [chr(code) for code in range(97, 123)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": len(tokens), "max_position_embeddings": 24,
                     "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_that_clip_itself_gives(clip_folder: Path) -> None:
    """`logits_per_image` of transformers is that cosine, times the exponent of its scale."""
    network = ClipNetwork(str(clip_folder))
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = ["a fox", "red cat"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (ClipNetwork.MEAN, ClipNetwork.STD))
    tokens = network.tokenizer(texts, padding=True, return_tensors="pt")
    out = network.model(pixel_values=(pixels / 255 - mean) / std, **tokens)
    wanted = 100 * out.logits_per_image.diagonal() / network.model.logit_scale.exp()
    got = cosine_score(network.image_features(pixels), network.text_features(texts))
    torch.testing.assert_close(got, wanted.clamp(min=0).detach(), atol=1e-4, rtol=1e-4)
    assert network.name.startswith("CLIP ")


def test_clip_sees_the_middle_of_a_wide_picture(clip_folder: Path) -> None:
    network = ClipNetwork(str(clip_folder))
    middle = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    wide = torch.nn.functional.pad(middle, (9, 9))
    torch.testing.assert_close(network.image_features(wide), network.image_features(middle), atol=1e-5, rtol=1e-4)


def test_a_folder_without_clip_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ModelNotFoundError, match="There is no CLIP model"):
        ClipNetwork(str(tmp_path))


def test_features_of_many_are_features_of_each() -> None:
    network = JudgeNetwork()
    generator = torch.Generator().manual_seed(0)
    sizes = [(32, 32)] * 3 + [(48, 32)] + [(32, 32)]
    pictures = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    each = torch.cat([network.image_features(picture[None]) for picture in pictures])
    torch.testing.assert_close(features_of(network, pictures), each, atol=1e-5, rtol=1e-4)


def test_the_judge_is_never_called_clip() -> None:
    judge = JudgeNetwork()
    assert "CLIP" not in judge.name.upper()
    assert "LPIPS" not in judge.distance().name.upper()


@pytest.mark.parametrize(
    ("words", "text", "share"),
    [
        (("FRESH", "BREAD"), "fresh Bread!", 1.0),
        (("FRESH", "BREAD"), "FRESHBREAD", 1.0),  # run together by the reader
        (("OPEN", "24"), "open", 0.5),
        (("A",), "BAKERY", 0.0),  # a short word is not found inside another
        (("HOPE",), "", 0.0),
    ],
)
def test_words_are_found_as_readers_give_them(words: tuple[str, ...], text: str, share: float) -> None:
    assert share_read(words, text) == share


def test_words_drawn_are_words_read() -> None:
    pytest.importorskip("rapidocr_onnxruntime", reason="the eval extra is not installed")
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (320, 160), "white")
    ImageDraw.Draw(image).text((30, 50), "HELLO", fill="navy", font=ImageFont.load_default(60))
    assert share_read(("HELLO",), RapidReader()(image)) == 1


@pytest.mark.parametrize(
    ("package", "use"),
    [("transformers", lambda: ClipNetwork("x")), ("rapidocr_onnxruntime", RapidReader)],
)
def test_a_missing_extra_is_named(package: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"octavo\[eval\]"):
        use()
