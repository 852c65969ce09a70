"""Whatever happens to a file's bytes, it loads or is refused as a CheckpointError, and so it is described."""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from octavo.checkpoint import load_clip, load_mmdit, load_t5, load_vae
from octavo.checkpoint.describe import describe
from octavo.checkpoint.kinds import Kind
from octavo.checkpoint.plan import MODELS
from octavo.checkpoint.save import save_safetensors
from octavo.errors import CheckpointError
from octavo.fp8 import quantize
from octavo.models import ClipConfig, MMDiTConfig, T5Config, VAEConfig

CONFIGS: dict[Kind, object] = {
    "mmdit": MMDiTConfig(
        depth=2, width=16, heads=2, dual_attention=(0,), context_width=8, pooled_width=8, pos_embed_size=2
    ),
    "clip_g": ClipConfig(
        width=8, layers=1, heads=1, mlp_width=8, activation="gelu", vocab_size=9, positions=3, projection=8
    ),
    "t5": T5Config(width=8, layers=1, heads=2, head_width=4, mlp_width=8, vocab_size=9, buckets=8),
    "vae": VAEConfig(channels=(8, 8), layers_per_block=1, groups=2),
}
LOADERS: dict[Kind, Callable[[Path], object]] = {
    "mmdit": load_mmdit,
    "clip_g": load_clip,
    "t5": load_t5,
    "vae": load_vae,
}
KINDS = st.sampled_from(list(CONFIGS))
FORMS = st.sampled_from(["16-bit", "plain", "scaled_fp8", "comfy_quant", "header", "octavo"])
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# What may stand in place of any value of a header: what JSON can hold, and what would hurt.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "U8", "I64", "F4", "C64", "BOOL"]),
    st.lists(st.integers(-1, 70), max_size=5),
    st.lists(st.sampled_from([0, 1, 2**31, 2**40, 2**62]), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@cache
def sound_file(kind: Kind, form: str) -> bytes:
    """A tiny model that loads, in one of the forms."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = {name: tensor.half() for name, tensor in MODELS[kind](CONFIGS[kind]).state_dict().items()}
    layers = [
        name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.ndim == 2 and "emb" not in name
    ]
    layers = [
        layer
        for layer in layers
        if layer not in ("shared", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias")
    ]
    metadata = {}
    for layer in layers if form != "16-bit" else ():
        scaled = quantize(tensors[f"{layer}.weight"], granularity="row" if form == "octavo" else "tensor")
        rows, columns = scaled.q.shape
        if form == "plain":
            tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)
            continue
        tensors[f"{layer}.weight"] = scaled.q
        tensors[f"{layer}.{'scale_weight' if form == 'scaled_fp8' else 'weight_scale'}"] = scaled.scale
        if form == "comfy_quant":
            text = b'{"format": "float8_e4m3fn"}'
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        if form == "octavo":
            tensors[f"{layer}.low_rank_down"], tensors[f"{layer}.low_rank_up"] = (
                torch.ones(1, columns),
                torch.ones(rows, 1),
            )
    if form == "scaled_fp8":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if form == "octavo":
        described = {layer: {"format": "float8_e4m3fn", "granularity": "row", "low_rank": 1} for layer in layers}
        metadata["octavo.quantization"] = json.dumps({"version": 1, "layers": described})
    if form == "header":
        described = {layer: {"format": "float8_e4m3fn"} for layer in layers}
        metadata["_quantization_metadata"] = json.dumps({"layers": described})
    with TemporaryDirectory() as folder:
        save_safetensors(Path(folder) / "a.safetensors", tensors, metadata)
        return (Path(folder) / "a.safetensors").read_bytes()


def loads_or_is_refused(kind: Kind, content: bytes) -> bool:
    """Whether it loads; anything but a CheckpointError comes through."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(content)
        with suppress(CheckpointError):
            describe(path)
        try:
            LOADERS[kind](path)
        except CheckpointError as error:
            message = str(error)
        else:
            return True
        assert str(path.parent) in message
        return False


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(fields: object, data: bytes) -> bytes:
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + data


@given(kind=KINDS, form=FORMS)
@settings(deadline=None, max_examples=20)
def test_the_files_that_are_mutated_are_sound(kind: Kind, form: str) -> None:
    assert loads_or_is_refused(kind, sound_file(kind, form))
    assert loads_or_is_refused(kind, joined(*split(sound_file(kind, form))))


@given(kind=KINDS, form=FORMS, data=st.data())
@QUICK
def test_bytes_changed_anywhere(kind: Kind, form: str, data: st.DataObject) -> None:
    content = bytearray(sound_file(kind, form))
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        # Most of the interest is in the header and in the small tensors right after it.
        position = data.draw(st.integers(0, min(header_end + 64, len(content) - 1)))
        content[position] = data.draw(st.integers(0, 255))
    loads_or_is_refused(kind, bytes(content))


@given(kind=KINDS, form=FORMS, share=st.floats(0, 1, exclude_max=True))
@QUICK
def test_files_cut_anywhere_never_load(kind: Kind, form: str, share: float) -> None:
    content = sound_file(kind, form)
    assert not loads_or_is_refused(kind, content[: int(share * len(content))])


@given(kind=KINDS, form=FORMS, data=st.data())
@QUICK
def test_a_field_of_the_header_replaced(kind: Kind, form: str, data: st.DataObject) -> None:
    fields, tail = split(sound_file(kind, form))
    name = data.draw(st.sampled_from(sorted(fields)))
    key = data.draw(st.sampled_from([None, "dtype", "shape", "data_offsets"]))
    if key is None or name == "__metadata__":
        fields[name] = data.draw(ODD)
    else:
        fields[name][key] = data.draw(ODD)
    loads_or_is_refused(kind, joined(fields, tail))


@given(kind=KINDS, form=FORMS, data=st.data())
@QUICK
def test_a_tensor_taken_for_another_shape_of_the_same_size(kind: Kind, form: str, data: st.DataObject) -> None:
    fields, tail = split(sound_file(kind, form))
    name = data.draw(st.sampled_from(sorted(fields.keys() - {"__metadata__"})))
    shape = fields[name]["shape"]
    count = 1
    for side in shape:
        count *= side
    fields[name]["shape"] = data.draw(
        st.sampled_from([[count], [1, count], [count, 1], [], shape[::-1], [*shape, 1], [1, *shape], [2, count // 2]])
    )
    loads_or_is_refused(kind, joined(fields, tail))


@given(kind=KINDS, form=FORMS, data=st.data())
@QUICK
def test_names_lost_changed_and_exchanged(kind: Kind, form: str, data: st.DataObject) -> None:
    fields, tail = split(sound_file(kind, form))
    names = sorted(fields.keys() - {"__metadata__"})
    first, second = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    match data.draw(st.sampled_from(["exchange", "rename", "number"])):
        case "exchange":
            fields[first], fields[second] = fields[second], fields[first]
        case "rename":
            endings = ["", ".weight", ".weight_scale", ".scale_weight", ".comfy_quant", "scaled_fp8", ".bias"]
            fields[data.draw(st.text(max_size=6)) + data.draw(st.sampled_from(endings))] = fields.pop(first)
        case "number":
            number = data.draw(st.sampled_from(["7", "-1", "99999", "9" * 5000, "x"]))
            fields[first.replace(".0.", f".{number}.", 1)] = fields.pop(first)
    loads_or_is_refused(kind, joined(fields, tail))


@given(
    kind=KINDS,
    key=st.sampled_from(["_quantization_metadata", "octavo.config", "octavo.settings"]),
    value=st.one_of(
        st.text(max_size=10),
        st.recursive(ODD, lambda inner: st.dictionaries(st.sampled_from(["layers", "heads", "groups", "kind"]), inner))
        .map(json.dumps),
    ),
)  # fmt: skip
@QUICK
@example(kind="clip_g", key="octavo.config", value='{"heads": 1e999}')
@example(kind="vae", key="octavo.config", value='{"groups": -2}')
@example(kind="mmdit", key="_quantization_metadata", value="[" * 100_000)
@example(kind="mmdit", key="_quantization_metadata", value='""')
def test_odd_words_in_the_metadata(kind: Kind, key: str, value: str) -> None:
    fields, tail = split(sound_file(kind, "comfy_quant"))
    fields["__metadata__"] = {key: value}
    loads_or_is_refused(kind, joined(fields, tail))
