"""The folders that we write, read by diffusers and transformers where they are installed (the `bench` extra)."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.checkpoint.save import save_safetensors
from octavo.text.vocabulary import clip_vocabulary, t5_vocabulary
from tests.checkpoint.converting import convert
from tests.checkpoint.samples import MMDIT_PREFIX, all_in_one, recorded, tiny
from tests.goldens import golden

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of which we are not the judge
TEXT = "A café  in the style of van Gogh, 4k"


@pytest.fixture(scope="module")
def diffusers():  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers", reason="diffusers is not installed (the bench extra)")


@pytest.fixture(scope="module")
def transformers():  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="transformers is not installed (the bench extra)")


@pytest.mark.parametrize("name", ["transformer_large_tiny", "transformer_medium_tiny"])
def test_diffusers_gives_the_recorded_output_from_our_folder(tmp_path: Path, name: str, diffusers) -> None:  # type: ignore[no-untyped-def]
    convert(golden(f"diffusers/{name}.safetensors"), tmp_path / "folder", shard_bytes=300_000)
    model = diffusers.SD3Transformer2DModel.from_pretrained(
        tmp_path / "folder", subfolder="transformer", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    io = load_file(golden(f"diffusers/{name}_io.safetensors"))
    inputs = {key.removeprefix("in."): value for key, value in io.items() if key.startswith("in.")}
    assert (model(**inputs).sample - io["out.sample"]).abs().max() < 2e-5


def test_diffusers_gives_the_recorded_outputs_of_the_vae_from_our_folder(tmp_path: Path, diffusers) -> None:  # type: ignore[no-untyped-def]
    recorded_vae = recorded("vae_tiny_single_file")
    save_safetensors(tmp_path / "vae.safetensors", recorded_vae, {"octavo.config": '{"groups": 32}'})
    convert(tmp_path / "vae.safetensors", tmp_path / "folder")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "folder", subfolder="vae", torch_dtype=torch.float32)
    io = load_file(golden("diffusers/vae_tiny_io.safetensors"))
    assert (vae.decode(io["in.latent"]).sample - io["out.decode"]).abs().max() < 5e-5
    assert (vae.encode(io["in.image"]).latent_dist.parameters - io["out.encode_moments"]).abs().max() < 5e-5


@pytest.mark.parametrize("kind", ["clip_l", "clip_g", "t5"])
def test_transformers_gives_the_recorded_outputs_from_our_folder(tmp_path: Path, kind: str, transformers) -> None:  # type: ignore[no-untyped-def]
    theirs = json.loads(golden(f"diffusers/{kind}_tiny_config.json").read_text())
    own = {"kind": kind} if kind == "t5" else {"kind": kind, "heads": theirs["num_attention_heads"]}
    save_safetensors(tmp_path / "e.safetensors", recorded(f"{kind}_tiny"), {"octavo.config": json.dumps(own)})
    convert(tmp_path / "e.safetensors", tmp_path / "folder")
    folder, name = {
        "clip_l": ("text_encoder", "CLIPTextModelWithProjection"),
        "clip_g": ("text_encoder_2", "CLIPTextModelWithProjection"),
        "t5": ("text_encoder_3", "T5EncoderModel"),
    }[kind]
    model = getattr(transformers, name).from_pretrained(tmp_path / "folder" / folder, dtype=torch.float32).eval()
    io = load_file(golden(f"diffusers/{kind}_tiny_io.safetensors"))
    out = model(io["in.input_ids"], output_hidden_states=True)
    assert (out.last_hidden_state - io["out.last_hidden_state"]).abs().max() < 2e-5
    if kind != "t5":
        assert (out.text_embeds - io["out.text_embeds"]).abs().max() < 2e-5


def test_diffusers_loads_the_whole_pipeline(tmp_path: Path, diffusers, transformers) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Every component but the tokenizers, which tiny vocabularies have none of."""
    save_safetensors(tmp_path / "all.safetensors", all_in_one())
    convert(tmp_path / "all.safetensors", tmp_path / "folder")
    tokenizers = dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "folder", torch_dtype=torch.float16, **tokenizers
    )
    assert pipeline.scheduler.config.shift == 3.0
    assert torch.equal(
        pipeline.transformer.context_embedder.weight, all_in_one()[f"{MMDIT_PREFIX}context_embedder.weight"]
    )
    assert torch.equal(pipeline.text_encoder_3.shared.weight, tiny("t5")["shared.weight"])
    assert torch.equal(pipeline.text_encoder.text_projection.weight, tiny("clip_l")["text_projection.weight"])


def test_transformers_reads_the_vocabularies_that_we_write(tmp_path: Path, transformers) -> None:  # type: ignore[no-untyped-def]
    """Encoders of the released vocabularies' sizes, otherwise tiny."""
    for kind, embedding, rows in (
        ("clip_l", "text_model.embeddings.token_embedding.weight", 49408),
        ("clip_g", "text_model.embeddings.token_embedding.weight", 49408),
        ("t5", "shared.weight", 32128),
    ):
        tensors = tiny(kind)  # type: ignore[arg-type]
        tensors[embedding] = torch.zeros(rows, tensors[embedding].shape[1], dtype=torch.float16)
        save_safetensors(tmp_path / f"{kind}.safetensors", tensors, {"octavo.config": json.dumps({"kind": kind})})
        convert(tmp_path / f"{kind}.safetensors", tmp_path / kind)
    clip_l = transformers.CLIPTokenizer.from_pretrained(tmp_path / "clip_l" / "tokenizer")
    clip_g = transformers.CLIPTokenizer.from_pretrained(tmp_path / "clip_g" / "tokenizer_2")
    t5 = transformers.T5TokenizerFast.from_pretrained(tmp_path / "t5" / "tokenizer_3")
    ids = clip_vocabulary().ids(TEXT)
    assert clip_l(TEXT).input_ids == clip_g(TEXT).input_ids == [49406, *ids, 49407]
    padded = clip_g(TEXT, padding="max_length", max_length=77).input_ids
    assert padded[len(ids) + 2 :] == [0] * (75 - len(ids))
    assert t5(TEXT).input_ids == [*t5_vocabulary().ids(TEXT), 1]
