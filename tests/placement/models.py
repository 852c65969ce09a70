"""Small models of every kind that streams, with inputs; each call gives what it computes as one list of tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.fp8 import LinearSpec, prepare
from octavo.fp8.linear import Fp8Linear
from octavo.models import (
    ClipConfig,
    ClipTextEncoder,
    ControlNet,
    ControlNetConfig,
    MMDiT,
    MMDiTConfig,
    T5Config,
    T5Encoder,
)
from octavo.models.adapter import Adapter, LayerChange, LowRank

WIDTH, HEADS, CONTEXT, POOLED = 64, 2, 24, 16


@dataclass(frozen=True, slots=True)
class Example:
    """A model, and a use of it that touches every unit."""

    model: nn.Module
    run: Callable[[nn.Module], list[Tensor]]


def filled(model: nn.Module) -> nn.Module:
    """The model with numbers that keep activations near one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        numbers = torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False).copy_(
            numbers / max(1, parameter[0].numel() if parameter.ndim > 1 else 4) ** 0.5
        )
    return model.eval()


def draw(*shape: int) -> Tensor:
    """Normal noise, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def mmdit(depth: int = 5, dual: tuple[int, ...] = (0, 1)) -> MMDiT:
    """Blocks with and without a second attention; the last one ends the text."""
    config = MMDiTConfig(
        depth=depth,
        width=WIDTH,
        heads=HEADS,
        dual_attention=dual,
        context_width=CONTEXT,
        pooled_width=POOLED,
        pos_embed_size=8,
    )
    model = filled(MMDiT(config))
    assert isinstance(model, MMDiT)
    return model


def evaluate(model: nn.Module, skip: tuple[int, ...] = (), scale: float = 1.0) -> list[Tensor]:
    """Modulation, then one evaluation."""
    assert isinstance(model, MMDiT)
    table = model.modulation(torch.tensor([800.0, 30.0]), draw(2, POOLED))
    return [model(scale * draw(2, 16, 6, 8), draw(2, 5, CONTEXT), table, skip_layers=skip), table.flat]


def controlnet(*, joint: bool) -> Example:
    config = ControlNetConfig(
        depth=3,
        width=WIDTH,
        heads=HEADS,
        joint=joint,
        qk_norm=joint,
        context_width=CONTEXT,
        pooled_width=POOLED,
        pos_embed_size=8 if joint else 0,
    )
    base = mmdit(2, ())

    def run(model: nn.Module) -> list[Tensor]:
        assert isinstance(model, ControlNet)
        table = model.modulation(torch.tensor([500.0]), draw(1, POOLED))
        latents, hint = draw(1, 16, 6, 8), draw(1, 16, 6, 8) / 2
        return list(model(latents, hint, draw(1, 5, CONTEXT), table, embed=base.to(latents.device).embed_image))

    return Example(filled(ControlNet(config)), run)


def clip() -> Example:
    config = ClipConfig(
        width=32, layers=4, heads=2, mlp_width=48, activation="gelu", vocab_size=40, positions=9, projection=24
    )

    def run(model: nn.Module) -> list[Tensor]:
        tokens = torch.arange(18).view(2, 9)
        return list(model(tokens, end=torch.tensor([8, 3]), vectors={(0, 2): draw(32)}))

    return Example(filled(ClipTextEncoder(config)), run)


def t5() -> Example:
    config = T5Config(width=32, layers=4, heads=2, head_width=16, mlp_width=48, vocab_size=40)
    return Example(filled(T5Encoder(config)), lambda model: [model(torch.arange(20).view(2, 10))])


EXAMPLES: dict[str, Callable[[], Example]] = {
    "mmdit": lambda: Example(mmdit(), evaluate),
    "mmdit skipping": lambda: Example(mmdit(), lambda model: evaluate(model, (1, 3)) + evaluate(model)),
    "controlnet": lambda: controlnet(joint=False),
    "joint controlnet": lambda: controlnet(joint=True),
    "clip": clip,
    "t5": t5,
}


def in_fp8(model: nn.Module, spec: LinearSpec, *, rank: int = 0) -> None:
    """Every linear layer inside of blocks in FP8 by `spec`, with a low-rank branch where there is a rank."""
    from octavo.fp8 import quantize

    for name, layer in list(model.named_modules()):
        if not (isinstance(layer, nn.Linear) and ("block" in name or "layers" in name)):
            continue
        bias = layer.bias is not None
        fp8 = Fp8Linear(layer.in_features, layer.out_features, spec, bias=bias)
        scaled = quantize(layer.weight, spec.format, spec.granularity, block=spec.block)
        fp8.q, fp8.scale = scaled.q, scaled.scale
        if bias and fp8.bias is not None:
            fp8.bias.copy_(layer.bias)
        if rank:
            fp8.set_low_rank(draw(rank, layer.in_features) / 20, draw(layer.out_features, rank) / 20)
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, fp8)
    prepare(model, "cpu", torch.float32, mode="exact")


def adapter(model: nn.Module, *, dora: bool) -> Adapter:
    """A LoRA, or a DoRA, of every linear layer of the blocks."""
    changes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Fp8Linear) and "block" in name:
            out, into = layer.out_features, layer.in_features
            change = LowRank(draw(3, into) / 5, draw(out, 3) / 5)
            changes[name] = LayerChange((change,), draw(out).abs() + 0.5 if dora else None)
    return Adapter("test", changes)
