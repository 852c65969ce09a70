"""Blocks take fused steps where that was decided, and give what the plain steps give; whatever is refused says why."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from octavo.fp8 import E4M3FN, Fp8Linear, LinearSpec, Problem, at_sigmas, prepare, quantize, watch
from octavo.fp8.backends import Backend, Choice, UnusableError
from octavo.fp8.fused import FusedOps, fuse, fused_paths
from octavo.fp8.int8 import quantize_int8
from octavo.fp8.matmul import BACKENDS, PLAIN_WIDE, TORCH_INT8
from octavo.fp8.modulate import DEFINITIONS, Kernels, triton_kernels
from octavo.fp8.needs import Package
from octavo.fp8.scale import Scaled, quantize_input
from octavo.fp8.timing import Timings
from octavo.fp8.verdicts import unfit
from octavo.models import MMDiT, MMDiTConfig
from octavo.models.adapter import Adapter, LayerChange, LowRank, adapted
from octavo.models.controlnet import ControlNet, ControlNetConfig
from octavo.models.ops import PLAIN, QKV, use_ops
from octavo.quantize import convert
from tests.fp8.weights import weight

CPU = torch.device("cpu")
CONFIG = MMDiTConfig(
    depth=2, width=48, heads=2, dual_attention=(0,), pos_embed_size=8, context_width=24, pooled_width=16
)
Call = Callable[[], Tensor]


def model(*, step_sigmas: tuple[float, ...] = (), calibrated: bool = False) -> MMDiT:
    """In FP8 by row throughout, multiplying as GPUs do, by the definition."""
    torch.manual_seed(0)
    made = MMDiT(CONFIG)
    for parameter in made.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    weights = {name: layer.weight.clone() for name, layer in made.named_modules() if isinstance(layer, nn.Linear)}
    spec = LinearSpec(granularity="row", input_scale=calibrated or bool(step_sigmas), step_sigmas=step_sigmas)
    convert(made, dict.fromkeys(weights, spec))
    for name, layer in made.named_modules():
        if isinstance(layer, Fp8Linear):
            scaled = quantize(weights[name], E4M3FN, "row")
            layer.q.copy_(scaled.q)
            layer.scale.copy_(scaled.scale)
            if layer.input_scale is not None:
                layer.input_scale.copy_(torch.rand(layer.input_scale.shape) * 0.01 + 0.005)
    prepare(made, CPU, torch.float32, backend="plain-w8a8")
    return made


def call(mmdit: MMDiT, *, tokens: int = 3, size: tuple[int, int] = (4, 6)) -> Call:
    """Two rows at two levels."""
    torch.manual_seed(1)
    latents, context = torch.randn(2, 16, *size), torch.randn(2, tokens, CONFIG.context_width)
    table = mmdit.modulation(torch.tensor([900.0, 200.0]), torch.randn(2, CONFIG.pooled_width))
    return lambda: mmdit(latents, context, table)


def put_on(mmdit: MMDiT, kernels: Kernels = DEFINITIONS, measure: bool = False) -> FusedOps[QKV]:
    ops = fuse(mmdit, PLAIN, QKV, device=CPU, dtype=torch.float32, kernels=kernels, needs=(), measure=measure)
    use_ops(mmdit, ops)
    return ops


def plain(mmdit: MMDiT, run: Call) -> Tensor:
    """What the plain steps give now; the fused ones are back after."""
    ops = mmdit.joint_blocks[0].ops
    use_ops(mmdit, PLAIN)
    result = run()
    use_ops(mmdit, ops)
    return result


class Counting:
    """`DEFINITIONS`, which count how often each is asked, and for how many layers in 8 bits."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.kernels = replace(
            DEFINITIONS, **{name: self._counted(name) for name in ("modulated", "residual_modulated", "gelu", "heads")}
        )

    def _counted(self, name: str) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            result = getattr(DEFINITIONS, name)(*arguments)
            parts = result if isinstance(result, list | tuple) else [result]
            self.calls[name] = self.calls.get(name, 0) + sum(isinstance(each, Scaled) for each in parts)
            return result

        return run


def test_all_inputs_that_can_be_in_8_bits_are() -> None:
    """Five qkv layers (one of them a second attention's), three of fc1 and of fc2: the last text block ends early."""
    mmdit, counting = model(), Counting()
    put_on(mmdit, counting.kernels)
    call(mmdit)()
    assert counting.calls == {"modulated": 5, "residual_modulated": 3, "gelu": 3, "heads": 0}
    paths = fused_paths(mmdit)
    assert paths is not None
    assert str(paths) == "11 of 20 steps fused into 8 bits, 9 in 16"
    assert paths.reasons == {}


@pytest.mark.parametrize("levels", [None, (0.9, 0.9), (0.9, 0.2)], ids=["unsaid", "alike", "mixed"])
@pytest.mark.parametrize("spec", [{}, {"calibrated": True}, {"step_sigmas": (0.5,)}], ids=["rows", "one", "by step"])
def test_fused_steps_give_the_plain_steps_numbers(spec: dict[str, object], levels: tuple[float, float] | None) -> None:
    """In float32 the definitions are the same operations in the same order, scales and their groups included."""
    mmdit = model(**spec)  # type: ignore[arg-type]
    run = call(mmdit)
    put_on(mmdit)
    if levels is None:
        assert torch.equal(run(), plain(mmdit, run))
        return
    with at_sigmas(mmdit, levels):
        mixed = run()
        assert torch.equal(mixed, plain(mmdit, run))
    if "step_sigmas" in spec:
        assert not torch.equal(mixed, run())  # the levels matter


def test_texts_of_unlike_lengths_are_taken() -> None:
    from octavo.models.packed import pack

    mmdit = model(step_sigmas=(0.5,))
    torch.manual_seed(1)
    texts = pack([torch.randn(1, length, CONFIG.context_width) for length in (2, 5)])
    latents = torch.randn(2, 16, 4, 4)
    table = mmdit.modulation(torch.tensor([900.0, 200.0]), torch.randn(2, CONFIG.pooled_width))
    put_on(mmdit)
    assert not isinstance(texts, Tensor)
    with at_sigmas(mmdit, [0.9, 0.2], tokens=texts.rows):
        assert torch.equal(mmdit(latents, texts, table), plain(mmdit, lambda: mmdit(latents, texts, table)))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is off")
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_a_whole_model_through_triton_gives_the_definitions_numbers() -> None:
    """Each step is held beside its definition on the same numbers; nothing but ties that float32 decides may differ.

    Such a tie moves one of some fifty products of a sum by a code's step, 2⁻⁴ of it at most: far from 2⁻⁶ of the whole,
    which an error in any step exceeds, be it one shift that belongs to another row.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    mmdit, triton = model(), triton_kernels()
    codes = other = 0

    def beside(name: str) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            nonlocal codes, other
            ours, theirs = getattr(triton, name)(*arguments), getattr(DEFINITIONS, name)(*arguments)
            pairs = zip(ours, theirs, strict=True) if isinstance(ours, list | tuple) else [(ours, theirs)]
            for a, b in pairs:
                if isinstance(a, Scaled):
                    torch.testing.assert_close(a.scale, b.scale, rtol=1e-6, atol=0)
                    codes += a.q.numel()
                    other += int((a.q.float() != b.q.float()).sum())
                else:
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            return ours

        return run

    names = ("modulated", "residual", "residual_modulated", "gelu", "heads")
    put_on(mmdit, Kernels(name="beside", **{name: beside(name) for name in names}))
    run = call(mmdit, tokens=2, size=(2, 4))
    result, expected = run(), plain(mmdit, run)
    assert codes > 3000
    assert other <= codes / 1000
    assert (result - expected).norm() < expected.norm() * 2.0**-6


def test_a_lora_and_a_low_rank_branch_get_16_bits_and_only_for_their_layer() -> None:
    mmdit, counting = model(), Counting()
    run = call(mmdit)
    put_on(mmdit, counting.kernels)
    name = "joint_blocks.0.x_block.mlp.fc1"
    change = LayerChange((LowRank(torch.randn(2, 48), torch.randn(192, 2)),))
    with adapted(mmdit, [(Adapter("style", {name: change}), 1.0)]):
        with_lora = run()
        paths = fused_paths(mmdit)
        assert torch.equal(with_lora, plain(mmdit, run))
    assert counting.calls["residual_modulated"] == 2
    assert paths is not None
    assert paths.reasons == {"a LoRA or an observer looks at its input": 1}
    assert paths.count("8 bits") == 10
    without = run()
    assert not torch.equal(with_lora, without)
    layer = mmdit.joint_blocks[0].x_block.attn.qkv
    assert isinstance(layer, Fp8Linear)
    layer.set_low_rank(torch.randn(2, 48), torch.randn(144, 2))
    assert torch.equal(run(), plain(mmdit, run))
    assert not torch.equal(run(), without)
    layer.set_low_rank(None, None)
    assert torch.equal(run(), without)


@pytest.mark.parametrize("name", ["attn.qkv", "mlp.fc1", "mlp.fc2", "attn.ln_q"])
def test_a_layer_that_gives_nan_is_named_through_fused_steps(name: str) -> None:
    mmdit = model()
    run = call(mmdit)
    put_on(mmdit)
    part = mmdit.get_submodule(f"joint_blocks.1.x_block.{name}")
    (part.scale if isinstance(part, Fp8Linear) else part.weight)[0] = float("nan")
    assert not torch.isfinite(run()).all()
    with watch(mmdit) as culprit:
        run()
    assert culprit.name == f"joint_blocks.1.x_block.{name}"


def test_a_layer_that_multiplies_in_another_way_by_now_gets_16_bits() -> None:
    mmdit = model()
    run = call(mmdit)
    put_on(mmdit)
    layer = mmdit.joint_blocks[0].x_block.mlp.fc2
    assert isinstance(layer, Fp8Linear)
    layer.use(Choice(PLAIN_WIDE, {}))
    assert torch.equal(run(), plain(mmdit, run))
    paths = fused_paths(mmdit)
    assert paths is not None
    assert paths.reasons == {"it multiplies in another way by now": 1}


@pytest.mark.gradients
def test_gradients_go_through_the_plain_steps() -> None:
    with torch.no_grad():
        mmdit = model()
        run = call(mmdit)
    put_on(mmdit)
    mmdit.joint_blocks[0].x_block.attn.ln_q.weight.grad = None
    run().square().sum().backward()
    assert mmdit.joint_blocks[0].x_block.attn.ln_q.weight.grad is not None


def test_int8_rows_are_by_row_and_take_no_calibrated_scale() -> None:
    mmdit = model(calibrated=True)
    for layer in mmdit.modules():
        if isinstance(layer, Fp8Linear) and layer.in_features % 8 == 0 and layer.out_features % 8 == 0:
            layer.use(Choice(TORCH_INT8, {}))
    run = call(mmdit)
    put_on(mmdit)
    paths = fused_paths(mmdit)
    assert paths is not None
    assert paths.count("8 bits") == 11
    assert torch.equal(run(), plain(mmdit, run))


def test_layers_in_16_bits_still_get_fused_norms() -> None:
    mmdit = MMDiT(CONFIG)
    for parameter in mmdit.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    run = call(mmdit)
    put_on(mmdit)
    paths = fused_paths(mmdit)
    assert paths is not None
    assert str(paths) == "0 of 20 steps fused into 8 bits, 17 in 16, 3 plain"
    assert paths.reasons == {"its weight is not in FP8": 11}
    torch.testing.assert_close(run(), plain(mmdit, run))


@pytest.mark.parametrize("joint", [False, True])
def test_controlnets_take_fused_steps_too(joint: bool) -> None:
    torch.manual_seed(0)
    config = ControlNetConfig(
        depth=2, width=48, heads=2, joint=joint, context_width=24, pooled_width=16, pos_embed_size=8
    )
    net = ControlNet(config)
    for parameter in net.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    names = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    convert(net, dict.fromkeys(names, LinearSpec()))
    for layer in net.modules():
        if isinstance(layer, Fp8Linear):
            layer.q.copy_(torch.randn(layer.q.shape))
    prepare(net, CPU, torch.float32, backend="plain-w8a8")
    latents, context, pooled = torch.randn(2, 16, 4, 4), torch.randn(2, 3, 24), torch.randn(2, 16)
    table = net.modulation(torch.tensor([900.0, 200.0]), pooled)
    expected = net(latents, latents, context, table, embed=lambda x: x)
    use_ops(net, fuse(net, PLAIN, QKV, device=CPU, dtype=torch.float32, kernels=DEFINITIONS, needs=(), measure=False))
    paths = fused_paths(net)
    assert paths is not None
    assert paths.count("8 bits") == (12 if joint else 6)
    for ours, theirs in zip(net(latents, latents, context, table, embed=lambda x: x), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_backend_that_takes_16_bits_is_named() -> None:
    mmdit = model()
    prepare(mmdit, CPU, torch.float32)
    name = mmdit.joint_blocks[0].x_block.mlp.fc1.choice.backend.name  # type: ignore[union-attr]
    put_on(mmdit)
    paths = fused_paths(mmdit)
    assert paths is not None
    assert paths.count("8 bits") == 0
    assert paths.reasons == {f"'{name}' takes its input in 16 bits": 11}
    assert f"not for 11: '{name}' takes its input in 16 bits" in paths.details


def test_a_cpu_is_told_why_not_and_computes_as_ever() -> None:
    mmdit = model()
    run = call(mmdit)
    before = run()
    assert unfit(CPU, torch.float32) == "runs on cuda, this is cpu"
    use_ops(mmdit, fuse(mmdit, PLAIN, QKV, device=CPU, dtype=torch.float32))
    assert torch.equal(run(), before)
    paths = fused_paths(mmdit)
    assert paths is not None
    assert paths.count("plain") == 20
    assert paths.reasons == {"runs on cuda, this is cpu": 20}


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_fused_step_is_taken_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    asked = set[str]()

    def clock(_self: Timings, backend: Backend, _problem: Problem) -> float:
        asked.add(backend.name)
        return factor if "fused" in backend.name else 1.0

    monkeypatch.setattr(Timings, "__call__", clock)
    mmdit = model()
    run = call(mmdit)
    put_on(mmdit, measure=True)
    paths = fused_paths(mmdit)
    assert paths is not None
    assert {"gelu, fused, plain-w8a8", "gelu, plain, plain-w8a8", "heads, fused, 16 bits"} <= asked
    if factor < 1:
        assert (paths.count("8 bits"), paths.count("16 bits"), paths.reasons) == (11, 9, {})
    else:
        assert paths.count("plain") == 20
        assert paths.reasons == {"measured 2.00 times as slow as the plain step": 20}
    assert torch.equal(run(), plain(mmdit, run))


def test_steps_are_timed_and_the_times_kept(tmp_path: Path) -> None:
    mmdit = model()
    put_on(mmdit, measure=True)
    kept = (tmp_path / "cache" / "fp8-times.json").read_text()
    for step in ("modulated", "residual_modulated", "gelu"):
        assert f"{step}, fused, plain-w8a8" in kept
        assert f"{step}, plain, plain-w8a8" in kept
    for step in ("residual", "heads", "modulated"):
        assert f"{step}, fused, 16 bits" in kept


def test_a_kernel_that_fails_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(_self: Timings, backend: Backend, _problem: Problem) -> float:
        if backend.name.startswith("gelu, fused"):
            raise UnusableError("fails when tried: out of registers")
        return 1.0 if "fused" in backend.name else 2.0

    monkeypatch.setattr(Timings, "__call__", clock)
    mmdit = model()
    put_on(mmdit, measure=True)
    paths = fused_paths(mmdit)
    assert paths is not None
    assert paths.reasons == {"fails when tried: out of registers": 3}
    assert paths.steps["gelu", "plain"] == 3


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.run_scaled is not None], ids=lambda b: b.name)
def test_rows_in_8_bits_multiply_as_their_backend_does(backend: Backend) -> None:
    """`run` is rounding, then `run_scaled`."""
    by_kernel = Package("triton") in backend.needs
    if by_kernel:
        pytest.importorskip("triton", reason="triton is not installed")
        from octavo.fp8.kernels.quantize import quantize_rows
    x, bias = torch.randn(32, 48), torch.randn(16)
    for scale in (None, torch.tensor(0.01), torch.rand(32, 1) * 0.01 + 0.001):
        scaled = weight(16, 48, granularity="row")
        ready = scaled if backend.twin is None else backend.twin(scaled)
        assert backend.form is not None
        if by_kernel:
            rows = quantize_rows(x, scale, backend.form)
        else:
            rows = quantize_input(x, scale) if backend.form == "e4m3fn" else quantize_int8(x)
        assert torch.equal(backend.run_scaled(rows, ready, bias, x.dtype), backend.run(x, ready, bias, scale))  # type: ignore[misc]
