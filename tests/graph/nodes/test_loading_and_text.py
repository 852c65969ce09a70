"""Nodes that load models and encode texts, on a tree of tiny random ones."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.errors import ModelNotFoundError, OctavoError, RequestError, WrongModelError
from octavo.fp8 import Fp8Linear
from octavo.graph.cache import size_of
from octavo.graph.context import Context
from octavo.graph.nodes import loaders, text
from octavo.graph.nodes.types import ModelLink
from octavo.graph.spec import NodeSpec
from octavo.pipeline.encode import Conditioning, encode
from octavo.pipeline.shelf import WEIGHT_DTYPES, Clip
from tests.graph.nodes.runs import context_with
from tests.tiny_tree import POSITIONS, write_tiny_tree

PROMPT = "a (red:1.3) star"
ENCODERS = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl.safetensors")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_with(write_tiny_tree(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def clip(context: Context) -> Clip:
    return context.shelf.clip(ENCODERS)


def told(spec: NodeSpec, context: Context, **inputs: Any) -> Conditioning:
    """What a text node gives, which holds everywhere and all the time."""
    outputs = spec.run(context, **inputs)
    assert isinstance(outputs, tuple)
    ((condition,),) = outputs
    assert condition.area is None
    assert condition.mask is None
    assert (condition.strength, condition.start, condition.end) == (1.0, 0.0, 1.0)
    found = condition.conditioning
    assert isinstance(found, Conditioning)
    return found


def same(one: Conditioning, other: Conditioning) -> bool:
    return torch.equal(one.context, other.context) and torch.equal(one.pooled, other.pooled)


# Loaders


def test_a_checkpoint_gives_the_model_and_all_that_belongs_to_it(context: Context) -> None:
    model, clip, vae = loaders.checkpoint_loader_simple.run(context, ckpt_name="tiny.safetensors")
    assert isinstance(model, ModelLink)
    assert model.model.config.depth == 2
    assert model.shift == model.model.preset.shift
    assert {part.kind for part in clip.parts} == {"clip_l", "clip_g", "t5"}
    assert vae.part.kind == "vae"


def test_what_is_loaded_takes_no_room_in_the_cache_of_results(context: Context) -> None:
    """Weights are the shelf's business, or a large model would never be kept."""
    loaded = loaders.checkpoint_loader_simple.run(context, ckpt_name="tiny.safetensors")
    assert isinstance(loaded, tuple)
    assert loaded[0].model.part.nbytes > 500_000
    assert size_of(loaded) < 20_000


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_weight_dtypes_are_honoured(context: Context, weight_dtype: str) -> None:
    (model,) = loaders.unet_loader.run(context, unet_name="tiny.safetensors", weight_dtype=weight_dtype)
    layer = model.model.part().joint_blocks[0].x_block.mlp.fc1
    assert isinstance(layer, Fp8Linear) == (weight_dtype != "default")
    if weight_dtype != "default":
        assert layer.spec.format.name == ("e5m2" if weight_dtype == "fp8_e5m2" else "e4m3fn")


@pytest.mark.parametrize(
    ("spec", "names", "more"),
    [
        (loaders.clip_loader, ("clip_name",), {"type": "sd3"}),
        (loaders.dual_clip_loader, ("clip_name1", "clip_name2"), {"type": "sd3"}),
        (loaders.triple_clip_loader, ("clip_name1", "clip_name2", "clip_name3"), {}),
    ],
)
def test_text_encoders_are_told_apart_by_what_is_in_them(
    context: Context, spec: NodeSpec, names: tuple[str, ...], more: dict[str, str]
) -> None:
    wanted = ENCODERS[: len(names)]
    (in_order,) = spec.run(context, **dict(zip(names, wanted, strict=True)), **more)
    (reversed_,) = spec.run(context, **dict(zip(names, wanted[::-1], strict=True)), **more)
    kinds = {"clip_l", "clip_g", "t5"}
    assert {part.kind for part in in_order.parts} == {part.kind for part in reversed_.parts}
    assert len(in_order.parts) == len(names)
    assert {part.kind for part in in_order.parts} <= kinds


def test_a_vae_is_loaded_by_its_file(tmp_path: Path) -> None:
    root = write_tiny_tree(tmp_path)
    (root / "vae").mkdir()
    shutil.copy(root / "checkpoints" / "tiny.safetensors", root / "vae" / "mine.safetensors")
    (vae,) = loaders.vae_loader.run(context_with(root), vae_name="mine.safetensors")
    assert vae.part.path == root / "vae" / "mine.safetensors"


REFUSED: list[tuple[NodeSpec, dict[str, str], type[OctavoError], str]] = [
    (loaders.clip_loader, {"clip_name": ENCODERS[0], "type": "stable_diffusion"}, RequestError, "sd3"),
    (
        loaders.dual_clip_loader,
        {"clip_name1": ENCODERS[0], "clip_name2": ENCODERS[1], "type": "flux"},
        RequestError,
        "sd3",
    ),
    (
        loaders.dual_clip_loader,
        {"clip_name1": ENCODERS[0], "clip_name2": "tiny.safetensors", "type": "sd3"},
        WrongModelError,
        "tiny",
    ),
    (loaders.unet_loader, {"unet_name": "tiny.safetensors", "weight_dtype": "fp4"}, RequestError, "fp4"),
    (loaders.vae_loader, {"vae_name": "pixel_space"}, ModelNotFoundError, "pixel_space"),
]


@pytest.mark.parametrize(("spec", "inputs", "error", "reason"), REFUSED)
def test_what_is_not_honoured_is_refused(
    context: Context, spec: NodeSpec, inputs: dict[str, str], error: type[OctavoError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        spec.run(context, **inputs)


@pytest.mark.parametrize("device", ["default", "cpu"])
def test_encoders_on_the_cpu_are_no_other_wish_where_everything_is_there(context: Context, device: str) -> None:
    (clip,) = loaders.clip_loader.run(context, clip_name=ENCODERS[0], type="sd3", device=device)
    assert [part.device.type for part in clip.parts] == ["cpu"]


def test_encoders_on_another_device_than_the_model_are_refused(context: Context, monkeypatch: Any) -> None:
    monkeypatch.setattr(context.shelf, "device", torch.device("cuda"))
    with pytest.raises(RequestError, match="default"):
        loaders.clip_loader.run(context, clip_name=ENCODERS[0], type="sd3", device="cpu")


def test_a_file_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    context = context_with(write_tiny_tree(tmp_path))
    changed = loaders.checkpoint_loader_simple.is_changed
    assert changed is not None
    before = changed(context, ckpt_name="tiny.safetensors")
    assert changed(context, ckpt_name="tiny.safetensors") == before
    os.utime(tmp_path / "checkpoints" / "tiny.safetensors", ns=(0, 0))
    assert changed(context, ckpt_name="tiny.safetensors") != before
    assert changed(context, ckpt_name=None) == []  # comes from another node


# Texts


def test_a_text_is_encoded_as_everywhere(context: Context, clip: Clip) -> None:
    assert same(told(text.clip_text_encode, context, text=PROMPT, clip=clip), encode(clip.encoders, PROMPT))


@pytest.mark.parametrize("padding", ["none", "empty_prompt"])
def test_the_same_text_for_each_encoder_is_one_text(context: Context, clip: Clip, padding: str) -> None:
    of_three = told(
        text.clip_text_encode_sd3,
        context, clip=clip, clip_l=PROMPT, clip_g=PROMPT, t5xxl=PROMPT, empty_padding=padding,
    )  # fmt: skip
    assert same(of_three, encode(clip.encoders, PROMPT))


def of_each(context: Context, clip: Clip, clip_l: str, clip_g: str, t5xxl: str, padding: str = "none") -> Conditioning:
    return told(
        text.clip_text_encode_sd3,
        context, clip=clip, clip_l=clip_l, clip_g=clip_g, t5xxl=t5xxl, empty_padding=padding,
    )  # fmt: skip


def test_each_encoder_reads_its_own_text(context: Context, clip: Clip) -> None:
    """Rows of L and G stand side by side, 64 channels each, before those of T5."""
    mixed = of_each(context, clip, "a red star", "a blue circle", "on white")
    alone = [encode(clip.encoders, prompt).context for prompt in ("a red star", "a blue circle", "on white")]
    rows = POSITIONS
    assert torch.equal(mixed.context[:, :rows, :64], alone[0][:, :rows, :64])
    assert torch.equal(mixed.context[:, :rows, 64:], alone[1][:, :rows, 64:])
    assert torch.equal(mixed.context[:, rows:], alone[2][:, rows:])


def test_no_text_for_t5_leaves_its_rows_out(context: Context, clip: Clip) -> None:
    whole = encode(clip.encoders, PROMPT)
    assert torch.equal(of_each(context, clip, PROMPT, PROMPT, "").context, whole.context[:, :POSITIONS])
    padded = of_each(context, clip, PROMPT, PROMPT, "", "empty_prompt").context
    assert torch.equal(padded[:, POSITIONS:], encode(clip.encoders, "").context[:, POSITIONS:])


def test_one_clip_without_text_reads_an_empty_one(context: Context, clip: Clip) -> None:
    """As ComfyUI fills up uneven numbers of chunks: none against one."""
    one_empty = of_each(context, clip, "", PROMPT, PROMPT)
    assert torch.equal(one_empty.context[:, :POSITIONS, :64], encode(clip.encoders, "").context[:, :POSITIONS, :64])


def test_no_text_at_all_is_zeros(context: Context, clip: Clip) -> None:
    nothing = of_each(context, clip, "", "", "")
    assert not nothing.context.any()
    assert not nothing.pooled.any()
    only_t5 = of_each(context, clip, "", "", PROMPT)
    assert torch.equal(only_t5.context, encode(clip.encoders, PROMPT).context[:, POSITIONS:])
    assert not only_t5.pooled.any()


def test_another_layer_of_clip_is_read(context: Context, clip: Clip) -> None:
    (last,) = text.clip_set_last_layer.run(context, clip=clip, stop_at_clip_layer=-1)
    assert same(
        told(text.clip_text_encode, context, text=PROMPT, clip=last), encode(clip.encoders, PROMPT, clip_skip=1)
    )
    assert not same(told(text.clip_text_encode, context, text=PROMPT, clip=last), encode(clip.encoders, PROMPT))


def test_a_layer_that_clip_does_not_have_is_refused(context: Context, clip: Clip) -> None:
    with pytest.raises(RequestError, match="2 layers"):
        text.clip_set_last_layer.run(context, clip=clip, stop_at_clip_layer=-3)


@pytest.mark.parametrize(
    ("spec", "inputs"),
    [
        (text.clip_text_encode, {"text": PROMPT}),
        (text.clip_text_encode_sd3, {"clip_l": "", "clip_g": "", "t5xxl": "", "empty_padding": "none"}),
        (text.clip_set_last_layer, {"stop_at_clip_layer": -1}),
    ],
)
def test_a_checkpoint_without_encoders_is_told_what_to_load(
    context: Context, spec: NodeSpec, inputs: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match="TripleCLIPLoader"):
        spec.run(context, clip=None, **inputs)


def test_encoding_is_done_where_the_device_is_owned(context: Context, clip: Clip) -> None:
    done: list[Any] = []

    def on_device(work: Any) -> Any:
        done.append(work())
        return done[-1]

    told(text.clip_text_encode, replace(context, on_device=on_device), text="a blue circle", clip=clip)
    assert [type(each) for each in done] == [Conditioning]
