"""What diffusers and transformers want to read beside the weights: config.json of each part, model_index.json.

Every field that decides about the arithmetic is written, so that a folder does not depend on defaults of a version.
"""

from collections.abc import Collection, Mapping
from typing import Any

from octavo.checkpoint.detect import Config
from octavo.checkpoint.kinds import Kind
from octavo.errors import UnsupportedFormatError
from octavo.models import ClipConfig, ControlNetConfig, MMDiTConfig, T5Config, VAEConfig
from octavo.models.vae import SCALE, SHIFT

DIFFUSERS_VERSION = "0.32.0"  # the first that knows all of these fields
# Folder and class of each part.
COMPONENTS: Mapping[Kind, tuple[str, str, str]] = {
    "mmdit": ("transformer", "diffusers", "SD3Transformer2DModel"),
    "vae": ("vae", "diffusers", "AutoencoderKL"),
    "clip_l": ("text_encoder", "transformers", "CLIPTextModelWithProjection"),
    "clip_g": ("text_encoder_2", "transformers", "CLIPTextModelWithProjection"),
    "t5": ("text_encoder_3", "transformers", "T5EncoderModel"),
}
TOKENIZERS: Mapping[Kind, tuple[str, str]] = {
    "clip_l": ("tokenizer", "CLIPTokenizer"),
    "clip_g": ("tokenizer_2", "CLIPTokenizer"),
    "t5": ("tokenizer_3", "T5TokenizerFast"),
}
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def config_json(config: Config) -> dict[str, Any]:
    """The config.json of a part, as its class in diffusers or transformers wants it."""
    match config:
        case MMDiTConfig():
            return _mmdit(config)
        case VAEConfig():
            return _vae(config)
        case ClipConfig():
            return _clip(config)
        case T5Config():
            return _t5(config)
        case ControlNetConfig():
            raise UnsupportedFormatError("A ControlNet is no part of a diffusers model; it is not converted.")


def model_index(kinds: Collection[Kind], tokenizers: Collection[Kind]) -> dict[str, Any]:
    """The model_index.json of a folder with these parts; what is missing is null, as diffusers writes it."""
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": DIFFUSERS_VERSION}
    index["scheduler"] = ["diffusers", SCHEDULER]
    for kind, (folder, library, name) in COMPONENTS.items():
        index[folder] = [library, name] if kind in kinds else [None, None]
    for kind, (folder, name) in TOKENIZERS.items():
        index[folder] = ["transformers", name] if kind in tokenizers else [None, None]
    return index


def scheduler_config(shift: float) -> dict[str, Any]:
    """The scheduler_config.json for a model that wants its sigmas shifted so far."""
    return {
        "_class_name": SCHEDULER,
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "shift": shift,
    }


def _mmdit(config: MMDiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": min(128, config.pos_embed_size * config.patch_size),
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.width // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context_width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_width,
        "pos_embed_max_size": config.pos_embed_size,
        "dual_attention_layers": list(config.dual_attention),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def _vae(config: VAEConfig) -> dict[str, Any]:
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_block,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "sample_size": 1024,
        "scaling_factor": SCALE,
        "shift_factor": SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
        "force_upcast": True,
    }


def _clip(config: ClipConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.positions,
        "projection_dim": config.projection or config.width,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        # transformers takes 2 for "the token with the highest id", which the end token of CLIP is.
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _t5(config: T5Config) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": config.width,
        "d_ff": config.mlp_width,
        "d_kv": config.head_width,
        "num_layers": config.layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.heads,
        "vocab_size": config.vocab_size,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
