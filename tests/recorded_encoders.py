"""The text encoders of ComfyUI's recordings: shortened, widths as released, weights made by the recording's recipe."""

import torch

from octavo.models import ClipConfig, ClipTextEncoder, T5Config, T5Encoder
from octavo.pipeline.encode import TextEncoders
from octavo.text.tokenizers import EncoderTokenizer, Tokenizers
from tests.goldens import golden
from tests.recipes import text_encoder_weights

ALL = frozenset({"clip_l", "clip_g", "t5xxl"})


def recorded_encoders() -> dict[str, torch.nn.Module]:
    """The models by name: clip_l, clip_g, t5xxl; a gigabyte of weights, so keep them no longer than needed."""
    description = golden("comfyui/text_encoders.json")
    with torch.device("meta"):
        built: dict[str, torch.nn.Module] = {
            "clip_l": ClipTextEncoder(
                ClipConfig(width=768, layers=3, heads=12, mlp_width=3072, activation="quick_gelu")
            ),
            "clip_g": ClipTextEncoder(
                ClipConfig(width=1280, layers=3, heads=20, mlp_width=5120, activation="gelu", projection=1280)
            ),
            "t5xxl": T5Encoder(T5Config(width=4096, layers=2, heads=4, head_width=64, mlp_width=512)),
        }
    for name, model in built.items():
        weights = text_encoder_weights(description, name)
        # Copies that the files hold and the conditioning never reads.
        for surplus in weights.keys() - model.state_dict().keys():
            assert surplus in ("text_projection.weight", "encoder.embed_tokens.weight")
            del weights[surplus]
        model.load_state_dict(weights, assign=True)
    return built


def encoders(models: dict[str, torch.nn.Module], names: frozenset[str] | set[str] = ALL) -> TextEncoders:
    """Those of the models that are named, with the released tokenizers."""
    kits = {"clip_l": EncoderTokenizer.clip_l(), "clip_g": EncoderTokenizer.clip_g(), "t5": EncoderTokenizer.t5()}
    return TextEncoders(
        tokenizers=Tokenizers(**{key: kit for key, kit in kits.items() if key.replace("t5", "t5xxl") in names}),
        clip_l=(lambda: models["clip_l"]) if "clip_l" in names else None,
        clip_g=(lambda: models["clip_g"]) if "clip_g" in names else None,
        t5=(lambda: models["t5xxl"]) if "t5xxl" in names else None,
        context_width=4096,
        pooled_width=2048,
    )
