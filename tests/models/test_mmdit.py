"""The MMDiT against ComfyUI's and diffusers' recorded outputs, and laws that hold for any weights."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.models import MMDiT, MMDiTConfig
from tests.goldens import golden
from tests.recipes import mmdit_weights

TINY = MMDiTConfig(depth=2, width=128, heads=2, pos_embed_size=12, context_width=96, pooled_width=48)


def comfy_model(name: str) -> MMDiT:
    description = golden(f"comfyui/mmdit_{name}_tiny.json")
    facts = json.loads(description.read_text())
    config = MMDiTConfig(
        depth=facts["depth"],
        width=facts["hidden"],
        heads=facts["heads"],
        dual_attention=tuple(facts["x_block_self_attn_layers"]),
        pos_embed_size=facts["pos_embed_max_size"],
    )
    model = MMDiT(config)
    model.load_state_dict(mmdit_weights(description))
    return model


def diffusers_model(name: str) -> MMDiT:
    dual, side, depth = ((), 12, 3) if name == "large" else ((0,), 24, 2)
    model = MMDiT(replace(TINY, depth=depth, dual_attention=dual, pos_embed_size=side))
    weights = load_file(golden(f"diffusers/transformer_{name}_tiny.safetensors"))
    model.load_state_dict({k.removeprefix("model.diffusion_model."): v.float() for k, v in weights.items()})
    return model


def random_model(config: MMDiTConfig) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(config)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("large", "nonsquare_b2"),
        ("large", "odd_b1"),
        ("large", "square_b1_77tok"),
        ("medium", "nonsquare_b2"),
        ("medium", "odd_b1"),
    ],
)
def test_velocity_equals_comfyui(name: str, case: str) -> None:
    io = load_file(golden(f"comfyui/mmdit_{name}_tiny_io.safetensors"))
    model = comfy_model(name)
    x, timestep = io[f"{case}/in/x"], io[f"{case}/in/timestep"]
    modulation = model.modulation(timestep, io[f"{case}/in/y"])
    velocity = model(x, io[f"{case}/in/context"], modulation)
    torch.testing.assert_close(velocity, io[f"{case}/out"], atol=2e-5, rtol=0)
    denoised = x - (timestep / 1000).view(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(denoised, io[f"{case}/denoised"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["large", "medium"])
def test_intermediates_equal_comfyui(name: str) -> None:
    io = load_file(golden(f"comfyui/mmdit_{name}_tiny_io.safetensors"))
    seen: dict[str, Tensor] = {}
    model = comfy_model(name)

    def note(key: str, part: int | None = None) -> object:
        def hook(_module: object, _arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[key] = output if part is None else output[part]

        return hook

    block = model.get_submodule("joint_blocks.0")
    block.register_forward_hook(note("joint_blocks.0.context", 0))
    block.register_forward_hook(note("joint_blocks.0.x", 1))
    for key in ("context_embedder", "t_embedder", "y_embedder"):
        model.get_submodule(key).register_forward_hook(note(key))

    case = "nonsquare_b2"
    modulation = model.modulation(io[f"{case}/in/timestep"], io[f"{case}/in/y"])
    model(io[f"{case}/in/x"], io[f"{case}/in/context"], modulation)
    recorded = [key.removeprefix(f"{case}/mid/") for key in io if key.startswith(f"{case}/mid/")]
    assert recorded
    for key in recorded:
        torch.testing.assert_close(seen[key], io[f"{case}/mid/{key}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["large", "medium"])
def test_skipped_blocks_and_control_residuals_equal_comfyui(name: str) -> None:
    io = load_file(golden(f"comfyui/mmdit_{name}_tiny_io.safetensors"))
    case = "nonsquare_b2"
    model = comfy_model(name)
    modulation = model.modulation(io[f"{case}/in/timestep"], io[f"{case}/in/y"])
    x, context = io[f"{case}/in/x"], io[f"{case}/in/context"]
    skipped = model(x, context, modulation, skip_layers={0})
    torch.testing.assert_close(skipped, io[f"{case}/out_skip_layer_0"], atol=2e-5, rtol=0)
    control = [io[f"{case}/control/{i}"] for i in range(2)]
    steered = model(x, context, modulation, control=control)
    torch.testing.assert_close(steered, io[f"{case}/out_control"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(("name", "skipped"), [("large", 1), ("medium", 0)])
def test_velocity_equals_diffusers(name: str, skipped: int) -> None:
    io = load_file(golden(f"diffusers/transformer_{name}_tiny_io.safetensors"))
    model = diffusers_model(name)
    modulation = model.modulation(io["in.timestep"], io["in.pooled_projections"])
    arguments = (io["in.hidden_states"], io["in.encoder_hidden_states"], modulation)
    torch.testing.assert_close(model(*arguments), io["out.sample"], atol=2e-5, rtol=0)
    without = model(*arguments, skip_layers=(skipped,))
    torch.testing.assert_close(without, io[f"out.sample_skip_layers_{skipped}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("dual", [(), (0,)])
def test_rows_of_a_batch_do_not_influence_each_other(qk_norm: bool, dual: tuple[int, ...]) -> None:
    """Unlike timesteps, prompts and pictures in one batch give what each gives alone, up to summation order."""
    model = random_model(replace(TINY, qk_norm=qk_norm, dual_attention=dual)).double()
    generator = torch.Generator().manual_seed(1)
    x, context, pooled = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 16, 6, 10), (3, 5, 96), (3, 48))
    )
    modulation = model.modulation(torch.tensor([1.0, 500.0, 999.5]), pooled)
    together = model(x, context, modulation)
    for i, own in enumerate(modulation.each()):
        row = slice(i, i + 1)
        alone = model(x[row], context[row], own)
        torch.testing.assert_close(together[row], alone, atol=1e-12, rtol=0)


def test_tables_made_for_a_whole_run_equal_those_made_step_by_step() -> None:
    model = random_model(TINY)
    timesteps, pooled = torch.linspace(1000, 1, 7), torch.randn(7, 48)
    whole = model.modulation(timesteps, pooled)
    for i, rows in enumerate(whole.each()):
        single = model.modulation(timesteps[i : i + 1], pooled[i : i + 1])
        for ours, theirs in zip(
            (*rows.image, *rows.context, rows.final), (*single.image, *single.context, single.final), strict=True
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "weights"),
    [(MMDiTConfig.large(), 8.1e9), (MMDiTConfig.medium(), 2.5e9), (MMDiTConfig.sd3_medium(), 2.0e9)],
)
def test_released_models_are_built_on_the_meta_device_at_their_published_size(
    config: MMDiTConfig, weights: float
) -> None:
    """Sizes as the model cards give them: 8.1 B, 2.5 B and 2 B, so within 5 % of the last digit."""
    with torch.device("meta"):
        model = MMDiT(config)
    total = sum(p.numel() for p in model.parameters())
    assert total == pytest.approx(weights, rel=0.05)
    assert all(p.is_meta for p in model.parameters())


def test_keys_are_those_of_the_single_files() -> None:
    """The key list of FACTS: two streams of attn, mlp and adaLN; a last context block without proj and mlp."""
    with torch.device("meta"):
        keys = set(MMDiT(MMDiTConfig.medium()).state_dict())
    linears = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    expected = {"pos_embed"}
    for stream in ("x_block", "context_block"):
        for i in range(24):
            ends = stream == "context_block" and i == 23
            names = ["attn.qkv", "adaLN_modulation.1"] if ends else list(linears)
            norms = ["attn.ln_q", "attn.ln_k"]
            if stream == "x_block" and i < 13:
                names += ["attn2.qkv", "attn2.proj"]
                norms += ["attn2.ln_q", "attn2.ln_k"]
            base = f"joint_blocks.{i}.{stream}"
            expected |= {f"{base}.{name}.{kind}" for name in names for kind in ("weight", "bias")}
            expected |= {f"{base}.{name}.weight" for name in norms}
    outside = ["x_embedder.proj", "context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    outside += [f"{name}.mlp.{i}" for name in ("t_embedder", "y_embedder") for i in (0, 2)]
    expected |= {f"{name}.{kind}" for name in outside for kind in ("weight", "bias")}
    assert keys == expected


def test_bfloat16_stays_within_its_rounding_of_float32() -> None:
    io = load_file(golden("comfyui/mmdit_large_tiny_io.safetensors"))
    case = "nonsquare_b2"
    model = comfy_model("large").bfloat16()
    modulation = model.modulation(io[f"{case}/in/timestep"], io[f"{case}/in/y"].bfloat16())
    out = model(io[f"{case}/in/x"].bfloat16(), io[f"{case}/in/context"].bfloat16(), modulation).float()
    error = (out - io[f"{case}/out"]).norm() / io[f"{case}/out"].norm()
    assert error < 1e-2
