"""Operations as torch counts them, bytes moved as an observer of every operation counts them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from octavo.fp8 import LinearSpec, Scaled, fuse, prepare
from octavo.fp8.int8 import quantize_int8
from octavo.fp8.modulate import DEFINITIONS, Kernels, Stream
from octavo.fp8.scale import quantize_input
from octavo.models import VAE, ClipConfig, ClipTextEncoder, MMDiT, MMDiTConfig, T5Config, T5Encoder, VAEConfig
from octavo.models import attention as attention_module
from octavo.models.ops import PLAIN, QKV, use_ops
from octavo.placement import costs
from octavo.placement.cards import CARDS
from octavo.placement.costs import Cost, Passes
from octavo.placement.shapes import Shapes
from octavo.placement.work import Work
from octavo.quantize import convert
from tests.placement.live import Live

WORK = Work(width=256, height=192, rows=2, tokens=130, steps=3)
CONFIGS = [
    MMDiTConfig(depth=3, width=128, heads=2, dual_attention=dual, context_width=64, pooled_width=32, pos_embed_size=64)
    for dual in ((), (0, 1))
]
T5 = T5Config(width=64, layers=2, heads=4, head_width=16, mlp_width=160, vocab_size=100)
CLIP = ClipConfig(width=64, layers=2, heads=4, mlp_width=256, activation="gelu", vocab_size=100)
SMALL_VAE = VAEConfig(channels=(16, 32, 64, 64), groups=8)


@pytest.fixture(autouse=True)
def written_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention as products that a counter sees."""
    monkeypatch.setattr(attention_module, "FEW", 0)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        yield


def inputs(config: MMDiTConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    height, width = WORK.latents
    return (
        torch.randn(WORK.rows, config.in_channels, height, width),
        torch.randn(WORK.rows, WORK.tokens, config.context_width),
        torch.rand(WORK.rows),
        torch.randn(WORK.rows, config.pooled_width),
    )


def whole_step(config: MMDiTConfig, model: nn.Module, passes: Passes = "plain") -> Cost:
    part = Shapes.of({"mmdit": model}, torch.float32).parts["mmdit"]
    total = Cost()
    for i in range(config.depth):
        total += costs.mmdit_block(config, i, WORK, part, passes=passes)
    return total


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "dual"])
def test_a_steps_operations_are_those_that_torch_counts(config: MMDiTConfig) -> None:
    model = MMDiT(config)
    latents, context, timestep, pooled = inputs(config)
    table = model.modulation(timestep, pooled)
    with FlopCounterMode(display=False) as counter:
        model(latents, context, table)
    cost = whole_step(config, model) + costs.mmdit_ends(config, WORK)
    assert cost.products + cost.attention == counter.get_total_flops()


def test_operations_of_sd35_large_are_those_of_the_closed_formula() -> None:
    """GEMM 2 b D² (12 L n + (12 (L - 1) + 3) t), attention 4 b D L (n + t)²: 47.7 and 14.5 TFLOP a step."""
    config, work = MMDiTConfig.large(), Work(rows=2)
    part = Shapes.of({"mmdit": _on_meta(config)}).parts["mmdit"]
    total = Cost()
    for i in range(config.depth):
        total += costs.mmdit_block(config, i, work, part, passes="8 bits")
    b, D, L, n, t = 2, config.width, config.depth, 4096, 333
    assert total.products == 2 * b * D * D * (12 * L * n + (12 * (L - 1) + 3) * t)
    assert total.attention == 4 * b * D * L * (n + t) ** 2
    assert total.products == pytest.approx(47.7e12, rel=0.01)
    assert total.attention == pytest.approx(14.5e12, rel=0.01)


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "dual"])
def test_passes_move_the_bytes_that_operations_read_and_write(
    config: MMDiTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 a step moves twice what the costs of 16 bits say, but for the small vectors of modulation."""
    monkeypatch.setattr("octavo.models.ops.attention", lambda q, k, v: (q + k + v).flatten(2))
    model = MMDiT(config)
    latents, context, timestep, pooled = inputs(config)
    table = model.modulation(timestep, pooled)
    with Live() as live:
        model(latents, context, table)
    tokens = WORK.rows * (WORK.image_tokens(config) * (1 + len(config.dual_attention) / config.depth) + WORK.tokens)
    stand_in = config.depth * tokens * config.width * 4 * 6  # two sums for each attention
    assert 2 * whole_step(config, model).moved == pytest.approx(live.moved - stand_in, rel=0.15)


def test_rounding_by_torch_one_operation_after_the_other_moves_the_bytes_that_the_docs_say() -> None:
    """abs 4, amax 2, to float32 6, division 8, clamp 8, cast 5; to INT8 it is rounded by an operation of its own."""
    x = torch.randn(64, 1024).bfloat16()
    for rounding, nbytes in ((lambda: quantize_input(x, None), 33), (lambda: quantize_int8(x), 41)):
        with Live() as live:
            rounding()
        assert live.moved / x.numel() == pytest.approx(nbytes, rel=0.01)  # but for the rows' scales


class Reading:
    """Definitions of the fused steps that count the bytes of tokens which a kernel reads and writes at least once."""

    def __init__(self) -> None:
        self.nbytes = 0
        names = ("modulated", "residual_modulated", "gelu", "residual", "heads")
        self.kernels = Kernels(name="reading", **{name: self._counted(getattr(DEFINITIONS, name)) for name in names})

    def _counted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            out = step(*arguments)
            given = [each.qkv if isinstance(each, Stream) else each for each in arguments]
            self.count(*given, *(out if isinstance(out, list | tuple) else [out]))
            return out

        return run

    def count(self, *tensors: Any) -> None:
        """Vectors of modulation and scales of rows are small things, if the model is not."""
        whole = [each.q if isinstance(each, Scaled) else each for each in tensors if isinstance(each, Scaled | Tensor)]
        self.nbytes += sum(each.nbytes for each in whole if each.numel() >= WORK.tokens * CONFIGS[0].width)


@pytest.mark.parametrize("fp8", [False, True], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "dual"])
def test_fused_passes_read_and_write_their_bytes_once(config: MMDiTConfig, fp8: bool) -> None:
    """What each kernel is given and gives; GELU without FP8 is torch's, and projections' inputs are rounded alone."""
    model: nn.Module = MMDiT(config).bfloat16()
    if fp8:
        names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "blocks" in name]
        convert(model, dict.fromkeys(names, LinearSpec(granularity="row")))
        prepare(model, "cpu", torch.bfloat16, backend="plain-w8a8")
    reading = Reading()
    cpu = torch.device("cpu")
    ops = fuse(model, PLAIN, QKV, device=cpu, dtype=torch.bfloat16, kernels=reading.kernels, needs=(), measure=False)
    use_ops(model, ops)
    for name, layer in model.named_modules():
        if fp8 and name.endswith("proj") and "blocks" in name:
            layer.register_forward_pre_hook(lambda _layer, given: reading.count(given[0], given[0].to(torch.int8)))
        if not fp8 and name.endswith("mlp.fc2"):
            layer.register_forward_pre_hook(lambda _layer, given: reading.count(given[0], given[0]))
    latents, context, timestep, pooled = (each.bfloat16() for each in inputs(config))
    model(latents, context, model.modulation(timestep, pooled))  # type: ignore[operator]
    told = whole_step(config, model, "8 bits" if fp8 else "16 bits").moved
    assert reading.nbytes == told


def test_attention_in_eight_bits_is_faster_where_there_are_units_for_it() -> None:
    work = Cost(attention=1e15)
    assert work.seconds(CARDS["h200"], fp8=True, attention_8bit=True) < work.seconds(CARDS["h200"], fp8=True)
    for card in (CARDS["a10g-24gb"], CARDS["t4-16gb"]):
        assert work.seconds(card, fp8=True, attention_8bit=True) == work.seconds(card, fp8=True)


def test_modulation_and_encoders_take_the_operations_that_torch_counts() -> None:
    config = CONFIGS[1]
    mmdit = MMDiT(config)
    part = Shapes.of({"mmdit": mmdit}, torch.float32).parts["mmdit"]
    *_, timestep, pooled = inputs(config)
    with FlopCounterMode(display=False) as counter:
        mmdit.modulation(timestep.repeat(5), pooled.repeat(5, 1))
    of_tables = sum(costs.modulation(part, n, Work(steps=5 * WORK.rows), itemsize=4).products for n in part.modulation)
    # Biases are counted as weights; embedders and the final layer are not: small things, if the model is not.
    embedders = 2 * 5 * WORK.rows * config.width * (256 + 2 * config.width + config.pooled_width + 2 * config.width)
    assert of_tables == pytest.approx(counter.get_total_flops() - embedders, rel=0.01)

    t5, clip = T5Encoder(T5), ClipTextEncoder(CLIP)
    shapes = Shapes.of({"mmdit": mmdit, "t5": t5, "clip_l": clip}, torch.float32)
    with FlopCounterMode(display=False) as counter:
        t5(torch.zeros(1, WORK.tokens - 77 + 24, dtype=torch.long))
    of_layer = costs.encoder_layer(T5, shapes.parts["t5"].units[0], WORK)
    assert T5.layers * (of_layer.products + of_layer.attention) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        clip(torch.zeros(1, 77, dtype=torch.long), end=torch.tensor([3]))
    of_layer = costs.encoder_layer(CLIP, shapes.parts["clip_l"].units[0], WORK)
    assert CLIP.layers * (of_layer.products + of_layer.attention) == counter.get_total_flops()


def test_decoding_takes_the_convolutions_that_torch_counts() -> None:
    vae = VAE(SMALL_VAE)
    height, width = 6, 10
    with FlopCounterMode(display=False) as counter:
        vae.decode(torch.randn(1, 16, height, width))
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    expected = sum(c.operations for c in costs.decoder_convolutions(SMALL_VAE, height, width))
    assert counted["aten.convolution"] == expected
    assert sum(counted.values()) - expected == 4 * (height * width) ** 2 * SMALL_VAE.channels[-1]


def test_decoding_a_picture_of_1024_pixels_takes_ten_tera_operations() -> None:
    config = VAEConfig()
    with torch.device("meta"):
        part = Shapes.of({"vae": VAE(config), "mmdit": _on_meta(CONFIGS[0])}).parts["vae"]
    cost = costs.vae_decode(config, part, Work())
    assert cost.convolutions + cost.attention == pytest.approx(10.5e12, rel=0.05)


def test_time_is_that_of_the_slower_of_products_and_weights_and_falls_with_better_cards() -> None:
    card = CARDS["h200"]
    products, weights = Cost(products=1e15), Cost(weights=1e12)
    assert products.seconds(card, fp8=False) == pytest.approx(1e15 / card.bf16)
    assert products.seconds(card, fp8=True) == pytest.approx(1e15 / (card.fp8 or 0))
    assert weights.seconds(card, fp8=True) == pytest.approx(1e12 / card.bandwidth)
    both = Cost(products=1e15, weights=1e12).seconds(card, fp8=True)
    assert both == max(products.seconds(card, fp8=True), weights.seconds(card, fp8=True))
    no_units = CARDS["a10g-24gb"]
    assert products.seconds(no_units, fp8=True) == products.seconds(no_units, fp8=False)


def _on_meta(config: MMDiTConfig) -> MMDiT:
    with torch.device("meta"):
        model: nn.Module = MMDiT(config)
    assert isinstance(model, MMDiT)
    return model
