"""The configuration comes back from names and shapes alone, for every released model at full size."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.checkpoint import kinds
from octavo.checkpoint.plan import Plan, plan_part
from octavo.checkpoint.presets import preset_for
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.source import open_source
from octavo.errors import CorruptFileError
from octavo.models import ClipConfig, MMDiTConfig, T5Config, VAEConfig
from tests.checkpoint.samples import (
    MMDIT_PREFIX,
    mmdit_in_diffusers,
    shapes_of,
    tiny,
    vae_in_diffusers,
    write_hollow,
)

RELEASED = [
    ("mmdit", MMDiTConfig.large()),
    ("mmdit", MMDiTConfig.medium()),
    ("mmdit", MMDiTConfig.sd3_medium()),
    ("clip_l", ClipConfig.clip_l()),
    ("clip_g", ClipConfig.clip_g()),
    ("t5", T5Config.xxl()),
    ("vae", VAEConfig()),
]


def plan_of(path: Path) -> Plan:
    with open_source(path) as source:
        (located,) = source.parts
        return plan_part(located)


@pytest.mark.parametrize(("kind", "config"), RELEASED, ids=lambda value: str(value)[:28])
def test_released_models_at_full_size(tmp_path: Path, kind: kinds.Kind, config: object) -> None:
    plan = plan_of(write_hollow(tmp_path / "a.safetensors", shapes_of(kind, config)))
    assert plan.located.part.kind == kind
    assert plan.config == config
    assert plan.fp8_form is None


@pytest.mark.parametrize("config", [config for kind, config in RELEASED if kind == "mmdit"], ids=str)
def test_released_models_in_diffusers_layout(tmp_path: Path, config: MMDiTConfig) -> None:
    on_meta = {name: torch.empty(shape, device="meta") for name, shape in shapes_of("mmdit", config).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in mmdit_in_diffusers(on_meta).items()}
    assert plan_of(write_hollow(tmp_path / "diffusion_pytorch_model.safetensors", shapes)).config == config


@pytest.mark.parametrize("layers_per_block", [1, 2, 3])
@pytest.mark.parametrize("channels", [(128, 256, 512, 512), (32, 48, 64, 64)])
def test_vaes_of_other_shapes_in_both_layouts(tmp_path: Path, channels: tuple[int, ...], layers_per_block: int) -> None:
    config = VAEConfig(channels=channels, layers_per_block=layers_per_block, groups=min(32, channels[0] // 4))
    shapes = shapes_of("vae", config)
    assert plan_of(write_hollow(tmp_path / "a.safetensors", shapes)).config == config
    on_meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in vae_in_diffusers(on_meta).items()}
    assert plan_of(write_hollow(tmp_path / "b.safetensors", shapes)).config == config


@pytest.mark.parametrize(
    ("config", "path", "name", "steps", "guidance_scale", "sampler"),
    [
        (MMDiTConfig.large(), "sd3.5_large.safetensors", "SD3.5 Large", 40, 4.5, "dpmpp_2m"),
        (MMDiTConfig.large(), "sd3.5_large_turbo.safetensors", "SD3.5 Large Turbo", 4, 1.0, "euler"),
        (MMDiTConfig.large(), "SD3.5-Large-Turbo/transformer/model.safetensors", "SD3.5 Large Turbo", 4, 1.0, "euler"),
        (MMDiTConfig.medium(), "medium.safetensors", "SD3.5 Medium", 40, 5.0, "dpmpp_2m"),
        (MMDiTConfig.sd3_medium(), "sd3.safetensors", "SD3 Medium", 50, 5.0, "euler"),
        (replace(MMDiTConfig.large(), pos_embed_size=96), "a.safetensors", "SD3.5 Large", 40, 4.5, "dpmpp_2m"),
    ],
)
def test_released_models_are_recognised_with_their_settings(
    tmp_path: Path, config: MMDiTConfig, path: str, name: str, steps: int, guidance_scale: float, sampler: str
) -> None:
    plan = plan_of(write_hollow(tmp_path / path, shapes_of("mmdit", config, MMDIT_PREFIX)))
    assert isinstance(plan.config, MMDiTConfig)
    preset = preset_for(plan.config, plan.located.file)
    assert (preset.name, preset.steps, preset.guidance_scale, preset.sampler) == (name, steps, guidance_scale, sampler)
    assert (preset.skip_layer_guidance is not None) == (name == "SD3.5 Medium")
    assert preset.shift == 3


SMALL = MMDiTConfig(depth=3, width=192, heads=3, context_width=128, pooled_width=128, pos_embed_size=16)


def test_a_small_model_says_for_itself_how_it_is_used(tmp_path: Path) -> None:
    settings = {"name": "tiny", "steps": 12, "width": 128, "height": 128, "guidance_scale": 3, "from the future": [1]}
    path = write_hollow(
        tmp_path / "a.safetensors", shapes_of("mmdit", SMALL), {"octavo.settings": json.dumps(settings)}
    )
    plan = plan_of(path)
    assert plan.config == SMALL
    preset = preset_for(SMALL, plan.located.file)
    assert (preset.name, preset.steps, preset.width, preset.height, preset.guidance_scale) == ("tiny", 12, 128, 128, 3)


def test_an_unknown_model_is_asked_for_no_more_than_it_can_draw(tmp_path: Path) -> None:
    plan = plan_of(write_hollow(tmp_path / "a.safetensors", shapes_of("mmdit", SMALL)))
    preset = preset_for(SMALL, plan.located.file)
    assert (preset.width, preset.height) == (256, 256)
    assert "3 blocks, width 192" in preset.name


@pytest.mark.parametrize(
    "settings", ["no json", "[]", '{"steps": "many"}', '{"steps": true}', '{"skip_layer_guidance": {"layers": 3}}']
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: str) -> None:
    plan = plan_of(write_hollow(tmp_path / "a.safetensors", shapes_of("mmdit", SMALL), {"octavo.settings": settings}))
    with pytest.raises(CorruptFileError, match=r"'octavo\.settings'"):
        preset_for(SMALL, plan.located.file)


def clip_shapes(width: int, *, projected: bool) -> dict[str, tuple[int, ...]]:
    config = ClipConfig(
        width=width, layers=2, heads=1, mlp_width=128, activation="gelu", projection=width if projected else None
    )
    return shapes_of("clip_g", config)


@pytest.mark.parametrize(
    ("width", "projected", "path", "kind"),
    [
        (768, True, "model_g.safetensors", "clip_l"),
        (1280, False, "clip_l.safetensors", "clip_g"),
        (64, False, "clip_l.safetensors", "clip_l"),
        (64, True, "clip_l.safetensors", "clip_l"),
        (64, True, "my-clip-g.safetensors", "clip_g"),
        (64, True, "text_encoder/model.safetensors", "clip_l"),
        (64, True, "text_encoder_2/model.safetensors", "clip_g"),
        (64, True, "encoder.safetensors", "clip_g"),
        (64, False, "encoder.safetensors", "clip_l"),
    ],
)
def test_which_clip_by_width_then_name_then_projection(
    tmp_path: Path, width: int, projected: bool, path: str, kind: str
) -> None:
    plan = plan_of(write_hollow(tmp_path / path, clip_shapes(width, projected=projected)))
    assert plan.located.part.kind == kind


def test_what_shapes_cannot_tell_may_stand_in_the_header(tmp_path: Path) -> None:
    said = {"octavo.config": json.dumps({"kind": "clip_g", "heads": 4, "activation": "quick_gelu"})}
    config = plan_of(write_hollow(tmp_path / "a.safetensors", clip_shapes(64, projected=False), said)).config
    assert isinstance(config, ClipConfig)
    assert (config.heads, config.activation) == (4, "quick_gelu")


def test_a_config_json_counts_only_beside_a_file_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 16, "hidden_act": "gelu"}')
    for name, heads in (("model.safetensors", 16), ("clip_l.safetensors", 1)):
        save_safetensors(tmp_path / name, tiny("clip_l"))
        config = plan_of(tmp_path / name).config
        assert isinstance(config, ClipConfig)
        assert config.heads == heads


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"heads": 3}, "3 heads do not divide"),
        ({"heads": 0}, "0 heads do not divide"),
        ({"heads": "4"}, "heads = '4'"),
        ({"activation": "relu"}, "relu"),
    ],
)
def test_impossible_words_about_a_clip_are_refused(tmp_path: Path, said: dict[str, object], complaint: str) -> None:
    metadata = {"octavo.config": json.dumps(said)}
    path = write_hollow(tmp_path / "a.safetensors", clip_shapes(64, projected=False), metadata)
    with pytest.raises(CorruptFileError, match=complaint):
        plan_of(path)


def test_groups_that_do_not_divide_the_channels_are_refused(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a.safetensors", tiny("vae"), {"octavo.config": '{"groups": 7}'})
    with pytest.raises(CorruptFileError, match="7 groups do not divide"):
        plan_of(tmp_path / "a.safetensors")


@pytest.mark.parametrize("said", ["no json", "[]", "3"])
def test_a_header_that_speaks_of_its_model_badly_is_refused(tmp_path: Path, said: str) -> None:
    path = write_hollow(tmp_path / "a.safetensors", clip_shapes(64, projected=False), {"octavo.config": said})
    with pytest.raises(CorruptFileError, match=r"'octavo\.config'.*Write it again"):
        plan_of(path)
