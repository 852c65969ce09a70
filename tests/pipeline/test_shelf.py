"""Models by name: each loaded once, gone when memory is short; texts encoded once."""

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from octavo.errors import ModelNotFoundError, RequestError, WrongModelError
from octavo.fp8 import Fp8Linear
from octavo.pipeline import room as shelf_room
from octavo.pipeline.assemble import load
from octavo.pipeline.encode import Conditioning, TextEncoders, encode
from octavo.pipeline.shelf import LoadSettings, Shelf
from octavo.pipeline.text_cache import TextCache
from tests.tiny_tree import write_tiny_tree

DEMO = "octavo-demo"


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(LoadSettings(models_dir=tmp_path))


def test_what_is_asked_for_twice_is_the_same(shelf: Shelf) -> None:
    model, clip, vae = shelf.checkpoint(f"{DEMO}.safetensors")
    assert shelf.checkpoint(DEMO) == (model, clip, vae)
    components = shelf.components(DEMO)
    assert components.mmdit is model.part
    assert vae is not None
    assert components.vae is vae.part is shelf.vae(DEMO).part
    assert shelf.diffusion_model(DEMO).part is model.part


def test_single_files_give_what_the_whole_model_has(shelf: Shelf) -> None:
    components = shelf.components()
    clip = shelf.clip(shelf.names("text_encoders"))
    assert {part.path for part in clip.parts} == {part.path for part in components.encoders}
    prompt = "a (red:1.3) star"
    of_files, of_model = shelf.encode(clip, prompt), encode(load(DEMO).text, prompt)
    assert torch.equal(of_files.context, of_model.context)
    assert torch.equal(of_files.pooled, of_model.pooled)


def test_a_missing_encoder_leaves_the_widths_that_the_model_takes(tmp_path: Path) -> None:
    shelf = Shelf(LoadSettings(models_dir=write_tiny_tree(tmp_path)))
    whole = shelf.encode(shelf.clip(["clip_l", "clip_g", "t5xxl"]), "a cat")
    assert shelf.encode(shelf.clip(["clip_l", "clip_g"]), "a cat").pooled.shape == whole.pooled.shape


@pytest.mark.parametrize(
    ("dtype", "fmt"), [("fp8_e4m3fn", "e4m3fn"), ("fp8_e5m2", "e5m2"), ("fp8_e4m3fn_fast", "e4m3fn")]
)
def test_weight_dtypes_are_honoured(shelf: Shelf, dtype: str, fmt: str) -> None:
    layer = shelf.diffusion_model(DEMO, dtype).part().joint_blocks[0].x_block.mlp.fc1
    assert isinstance(layer, Fp8Linear)
    assert layer.spec.format.name == fmt
    plain = shelf.diffusion_model(DEMO, "default").part().joint_blocks[0].x_block.mlp.fc1
    assert not isinstance(plain, Fp8Linear)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda shelf: shelf.diffusion_model(DEMO, "fp8"), "no weight_dtype 'fp8'"),
        (lambda shelf: shelf.clip([DEMO], "flux"), "type 'flux'"),
        (lambda shelf: shelf.names("pictures"), "no folder of models 'pictures'"),
        (lambda shelf: shelf.clip(["clip_l", DEMO]), "but no text encoder"),
        (lambda shelf: shelf.vae("nothing"), "no model 'nothing'"),
    ],
)
def test_bad_wishes_are_refused(shelf: Shelf, ask: object, message: str) -> None:
    with pytest.raises((RequestError, WrongModelError, ModelNotFoundError), match=message):
        ask(shelf)  # type: ignore[operator]


def test_a_text_for_another_model_is_refused(shelf: Shelf) -> None:
    model = shelf.diffusion_model(DEMO)
    with pytest.raises(WrongModelError, match="use the text encoders that come with the model"):
        model.check(Conditioning(torch.zeros(1, 77, 4096), torch.zeros(1, 2048)))
    model.check(shelf.encode(shelf.components().text, "a star"))


def test_a_file_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    root = write_tiny_tree(tmp_path)
    shelf = Shelf(LoadSettings(models_dir=root))
    before = shelf.diffusion_model("tiny")
    shutil.copy(root / "checkpoints" / "tiny.safetensors", tmp_path / "copy")
    (tmp_path / "copy").replace(root / "checkpoints" / "tiny.safetensors")
    assert shelf.diffusion_model("tiny") is not before


def test_parts_used_longest_ago_leave_when_memory_is_short(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, vae = shelf.checkpoint(DEMO)
    assert vae is not None
    vae.part()
    model.part()
    vae.part()
    assert [part.kind for part in shelf.loaded] == ["mmdit", "vae"]
    # Room for nothing, until the model is gone.
    gone = model.part.nbytes
    monkeypatch.setattr(shelf_room, "free_bytes", lambda _: 2 << 30 if not model.part.loaded else gone - 1)
    shelf.diffusion_model(DEMO, "fp8_e5m2").part()
    assert not model.part.loaded
    assert vae.part.loaded
    assert shelf.free() > 0
    assert not shelf.loaded


def test_texts_are_encoded_once_and_forgotten_by_bytes_and_with_their_encoders() -> None:
    cache = TextCache(limit=2 * 40)
    asked = []

    def ask(encoders: TextEncoders, text: str) -> Conditioning:
        def make(missing: Sequence[str]) -> list[Conditioning]:
            asked.extend(missing)
            return [Conditioning(torch.zeros(1, 2, 4), torch.zeros(1, 2)) for _ in missing]  # 40 bytes

        return cache.get(encoders, [text], make)[0]

    encoders = load(DEMO).text
    for text in "aabac":  # the last forgets b
        ask(encoders, text)
    ask(encoders, "a")
    ask(encoders, "b")
    assert asked == ["a", "b", "c", "b"]
    assert cache.nbytes == 80
    assert (cache.hits, cache.misses) == (3, 4)
    del encoders
    gc.collect()
    assert cache.nbytes == 0


def test_of_several_texts_those_that_are_not_remembered_are_encoded_together_and_each_once() -> None:
    shelf = Shelf(LoadSettings(device="cpu", dtype="float32"))
    encoders = shelf.components().text
    known = shelf.encode(encoders, "a star")
    calls: list[list[str]] = []

    def make(missing: Sequence[str]) -> list[Conditioning]:
        calls.append(list(missing))
        return [encode(encoders, text) for text in missing]

    asked = ["a circle", "", "a circle", ""]
    found = TextCache(limit=0).get(encoders, asked, make)
    assert calls == [["a circle", ""]]
    assert found[0] is found[2]
    together = shelf.encode_all(encoders, ["a circle", "a star", ""])
    assert together[1] is known
    assert (shelf.texts.hits, shelf.texts.misses) == (1, 3)
    for one, other in zip(together, (found[0], known, found[1]), strict=True):
        assert torch.equal(one.context, other.context)
        assert torch.equal(one.pooled, other.pooled)


def test_whoever_counts_is_told_of_each_part_that_is_read(tmp_path: Path) -> None:
    shelf = Shelf(LoadSettings(models_dir=write_tiny_tree(tmp_path / "models"), device="cpu"))
    told: list[str] = []
    shelf.when_loaded = lambda part: told.append(part.kind)
    components = shelf.components("tiny")
    for part in (components.mmdit, components.mmdit, components.vae):
        part()
    assert told == ["mmdit", "vae"]
    components.mmdit.release()
    components.mmdit()
    assert told == ["mmdit", "vae", "mmdit"]
