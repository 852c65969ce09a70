"""A loaded model's FP8 layers get their backends once, keep them, and tell."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo.errors import RequestError
from octavo.fp8 import (
    BACKENDS,
    E4M3FN,
    E5M2,
    Fp8Linear,
    LinearSpec,
    choose_backend,
    dequantize,
    paths,
    prepare,
    quantize,
)
from octavo.fp8.backends import Backend
from octavo.fp8.matmul import PLAIN, plain_matmul
from octavo.fp8.needs import Capability, DivisibleBy, Mode, OnDevice, Problem
from octavo.fp8.scale import Scaled
from octavo.fp8.timing import Timings
from octavo.models import MMDiT, MMDiTConfig, T5Config, T5Encoder
from octavo.quantize import convert

CPU = torch.device("cpu")


def small_model(spec: LinearSpec | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 8))
    convert(model, {"0": spec or LinearSpec(), "2": LinearSpec(format=E5M2, granularity="row")})
    return model


def all_linears(model: nn.Module) -> dict[str, LinearSpec]:
    return {name: LinearSpec() for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_unprepared_layers_follow_the_definition_and_say_so() -> None:
    assert str(paths(small_model())) == "2 of 3 linears in FP8: 2 by plain (not prepared)"


def test_on_a_cpu_the_cpu_path_is_on_and_gives_the_definitions_numbers() -> None:
    model = small_model()
    x = torch.randn(3, 5, 48)
    before = model(x)
    report = prepare(model, CPU, torch.float32)
    linear = model[0]
    assert isinstance(linear, Fp8Linear)
    assert linear.choice is not None
    assert linear.choice.backend.name in {"cpu", "cpu-blas"}
    assert report.fp8 == 2
    assert PLAIN.name not in report.layers
    assert f"multiplied by {linear.choice.backend.name}" in repr(linear)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_scales_by_block_are_served_by_exact_paths_and_refused_by_the_others() -> None:
    """A scale that changes along the sum cannot be applied to the product."""
    model = nn.Sequential(nn.Linear(48, 64))
    convert(model, {"0": LinearSpec(granularity="block", block=(24, 40))})
    x = torch.randn(5, 48)
    before = model(x)
    report = prepare(model, CPU, torch.float32, mode="fast")
    assert set(report.layers) <= {"cpu", "cpu-blas"}
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    layer = model[0]
    assert isinstance(layer, Fp8Linear)
    on_gpu = replace(layer.problem(torch.bfloat16, "fast"), device="cuda", capability=(9, 0), N=64, K=64)
    refused = [choose_backend(BACKENDS, p).reasons for p in (layer.problem(torch.float32, "fast"), on_gpu)]
    reason = "takes scales by tensor or row, not by block"
    assert all(refused[0][name] == reason for name in ("cpu-int8", "cpu-bf16"))
    assert all(refused[1][name] == reason for name in ("torch", "triton-w8a8", "triton-w8a16", "torch-int8"))


def test_reasons_are_counted_over_the_layers() -> None:
    picky = Backend(name="picky", run=plain_matmul, needs=(DivisibleBy("K", 48),))
    absent = Backend(name="absent", run=plain_matmul, needs=(OnDevice("cuda"),))
    report = prepare(small_model(), CPU, torch.float32, backends=[absent, picky, PLAIN])
    assert report.layers == {"picky": 1, "plain": 1}
    assert report.reasons == {
        "absent": {"runs on cuda, this is cpu": 2},
        "picky": {"K=64 is not divisible by 48": 1},
        "plain": {"'picky' comes before it": 1},
    }


def test_measuring_never_leaves_a_slower_path() -> None:
    def sleepy(*arguments: object) -> torch.Tensor:
        time.sleep(0.02)
        return plain_matmul(*arguments)  # type: ignore[arg-type]

    slow = Backend(name="slow", run=sleepy)
    report = prepare(small_model(), CPU, torch.float32, measure=True, backends=[slow, PLAIN])
    assert report.layers == {"plain": 2}
    assert all("times as slow as 'plain'" in reason for reason in report.reasons["slow"])


def test_a_backend_asked_for_by_name_serves_every_layer_that_it_can() -> None:
    """Exact layers keep their exact path; nothing takes the definition of W8A8 without being told."""
    model = small_model(LinearSpec(full_precision=True))
    report = prepare(model, CPU, torch.float32, backend="plain-w8a8")
    exact = paths(model).layers.keys() - {"plain-w8a8"}
    assert report.layers == {exact.pop(): 1, "plain-w8a8": 1}
    assert report.reasons["plain-w8a8"] == {"rounds the input to e4m3fn, where the file asks for full precision": 1}
    assert report.reasons["plain"]["'plain-w8a8' was asked for"] == 1
    unasked = prepare(small_model(), CPU, torch.float32, mode="fast")
    assert "plain-w8a8" not in unasked.layers
    assert unasked.reasons["plain-w8a8"] == {"is taken only when asked for by name": 2}


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("plain-w8a", r"no backend 'plain-w8a'\. Use one of cpu, .* Did you mean 'plain-w8a8'"),
        ("torch", r"None of the model's 2 FP8 layers can use the backend 'torch': runs on cuda, this is cpu \(2 lay"),
    ],
)
def test_a_name_of_no_use_is_refused_with_reasons(backend: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        prepare(small_model(), CPU, torch.float32, backend=backend)
    with pytest.raises(RequestError, match=r"no backend|the model has none"):
        prepare(nn.Linear(2, 2), CPU, torch.float32, backend=backend)


def test_layers_are_told_by_group() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4)))
    convert(model, all_linears(model))
    report = prepare(model, CPU, torch.float32, backends=[PLAIN])
    assert report.details == ["* [8, 8], 2: plain", "*.* [4, 8], 1: plain"]
    model = small_model()
    with_gpu_names = prepare(model, CPU, torch.float32).details
    assert any(line.startswith("not torch, torch-triton, triton-w8a8, triton-w8a16, ") for line in with_gpu_names)
    assert any(line.endswith(" for 2: runs on cuda, this is cpu") for line in with_gpu_names)


def test_a_gpu_that_is_said_to_multiply_in_fp8_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU plays a GPU of compute capability 8.0 here."""
    monkeypatch.setattr(Fp8Linear, "problem", lambda *_: GPU)

    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("no such instruction\nand more")

    works = Backend(name="works", run=plain_matmul, needs=(Capability(8, 9),))
    broken = Backend(name="broken", run=fails, needs=(Capability(8, 9),))
    GPU = Problem(N=16, K=16, format=E4M3FN, granularity="row", dtype=torch.float32, device="cpu", capability=(8, 0))
    assert prepare(small_model(), CPU, torch.float32, backends=[works, PLAIN]).layers == {"plain": 2}
    assumed = prepare(small_model(), CPU, torch.float32, backends=[works, PLAIN], assume_fp8_compute=True)
    assert assumed.layers == {"works": 2}
    with pytest.raises(RequestError, match=r"but 'broken' fails when tried: no such instruction\. Leave"):
        prepare(small_model(), CPU, torch.float32, backends=[broken, PLAIN], assume_fp8_compute=True)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int], Mapping[str, float]], None]:
    """The CPU plays a GPU: of some compute capability, on which ways to multiply take given times, others 9."""
    pytest.importorskip("triton", reason="triton is not installed")

    def play(capability: tuple[int, int], times: Mapping[str, float]) -> None:
        def problem(layer: Fp8Linear, dtype: torch.dtype, mode: Mode = "exact", _device: object = None) -> Problem:
            return Problem(
                N=layer.out_features, K=layer.in_features, format=layer.spec.format, dtype=dtype, mode=mode,
                granularity=layer.spec.granularity, device="cuda", capability=capability,
            )  # fmt: skip

        monkeypatch.setattr(Fp8Linear, "problem", problem)
        monkeypatch.setattr(Timings, "__call__", lambda _self, backend, _problem: times.get(backend.name, 9.0))

    return play


ONE_PASS = {"torch": 2.0, "torch-triton": 1.0, "torch-int8": 2.0, "torch-int8-triton": 1.0, "F.linear in bfloat16": 3.0}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is off")
@pytest.mark.parametrize(
    ("capability", "mode", "chosen"), [((9, 0), "fp8", "torch-triton"), ((8, 0), "fast", "torch-int8-triton")]
)
def test_where_one_pass_is_faster_layers_round_their_input_in_it(
    played: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    mode: Mode,
    chosen: str,
) -> None:
    """With no fused step before them, such as a projection after attention, and while a LoRA looks on."""
    from octavo.fp8.kernels import quantize as kernels

    played(capability, ONE_PASS)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 50))  # the second's outputs fit into no 8 nor 16
    convert(model, dict.fromkeys("01", LinearSpec(granularity="row")))
    for layer in model:
        layer.q.copy_(quantize(torch.randn(layer.q.shape), E4M3FN).q)
    x = torch.randn(20, 48).bfloat16()
    exact = model[0](x)
    report = prepare(model, CPU, torch.bfloat16, mode=mode, measure=True)
    assert report.layers[chosen] == 1
    assert report.reasons[chosen] == {f"N=50 is not divisible by {16 if capability == (9, 0) else 8}": 1}
    assert f"measured 2.00 times as slow as '{chosen}'" in report.reasons[chosen.removesuffix("-triton")]
    launches, real = [], kernels.quantize_rows

    def counted(*arguments: Any, **named: Any) -> Scaled:
        launches.append(arguments)
        return real(*arguments, **named)

    monkeypatch.setattr(kernels, "quantize_rows", counted)
    y = model[0](x)
    hook = model[0].register_forward_hook(lambda _layer, _x, out: out)
    assert torch.equal(model[0](x), y)
    hook.remove()
    assert len(launches) == 2
    assert not torch.equal(y, exact)
    assert (y - exact).float().norm() < 0.04 * exact.float().norm()  # what 3 bits after the point leave


@pytest.mark.parametrize("slower", ["torch-triton", "torch-int8-triton"])
def test_one_pass_that_is_not_faster_is_not_taken(played: Callable[..., None], slower: str) -> None:
    played((9, 0), ONE_PASS | {slower: 2.5} | {"torch": 2.0 if slower == "torch-triton" else 4.0})
    model = nn.Sequential(nn.Linear(48, 64))
    convert(model, {"0": LinearSpec(granularity="row")})
    report = prepare(model, CPU, torch.bfloat16, mode="fp8" if slower == "torch-triton" else "fast", measure=True)
    assert slower not in report.layers


@pytest.mark.parametrize(
    ("capability", "dtype", "missing", "reason"),
    [
        ((9, 0), torch.bfloat16, True, "the package triton is not installed"),
        ((8, 0), torch.bfloat16, False, "needs compute capability 8.9, this device has 8.0"),
        ((9, 0), torch.float16, False, "takes bfloat16, not float16"),
    ],
)
def test_what_rounding_in_one_pass_needs_is_said(
    played: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    missing: bool,
    reason: str,
) -> None:
    played(capability, ONE_PASS)
    if missing:
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    model = nn.Sequential(nn.Linear(48, 64))
    convert(model, {"0": LinearSpec(granularity="row")})
    report = prepare(model, CPU, dtype, mode="fp8", measure=True)
    assert "torch-triton" not in report.layers
    assert report.reasons["torch-triton"] == {reason: 1}


def test_moving_keeps_the_choice_on_the_device_and_undoes_it_elsewhere() -> None:
    model = small_model()
    prepare(model, CPU, torch.float32)
    model.to(CPU)
    assert "not prepared" not in str(paths(model))
    model.to("meta")
    assert "not prepared" in str(paths(model))


@pytest.mark.gradients
def test_gradients_are_those_of_the_definition_on_any_path() -> None:
    gradients = []
    for prepared in (False, True):
        model = small_model()
        if prepared:
            prepare(model, CPU, torch.float32)
        linear = model[0]
        assert isinstance(linear, Fp8Linear)
        assert linear.bias is not None
        linear.bias.requires_grad_(True)
        x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model(x).square().sum().backward()
        assert x.grad is not None
        assert linear.bias.grad is not None
        gradients.append((x.grad, linear.bias.grad))
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def by_wide_twin(
    x: torch.Tensor, weight: Scaled, bias: torch.Tensor | None, _input_scale: torch.Tensor | None
) -> torch.Tensor:
    assert weight.q.dtype == torch.float32
    return F.linear(x, weight.q, bias)


WIDE = Backend(name="wide", run=by_wide_twin, twin=lambda weight: Scaled(dequantize(weight), torch.ones(())))


@pytest.mark.gradients
def test_a_twin_takes_the_place_of_the_weight() -> None:
    model = small_model()
    x = torch.randn(5, 48)
    before = model(x)
    prepare(model, CPU, torch.float32, backends=[WIDE, PLAIN])
    linear = model[0]
    assert isinstance(linear, Fp8Linear)
    assert linear.q.is_meta
    assert linear.q.dtype == E4M3FN.dtype
    torch.testing.assert_close(model(x), before)
    model.to(CPU).bfloat16().float()
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)  # the biases went through bfloat16
    prepare(model, CPU, torch.float32, backends=[WIDE, PLAIN])
    with pytest.raises(RequestError, match="given up for the 'wide' form"):
        prepare(model, CPU, torch.float32)
    with pytest.raises(RequestError, match="given up for the 'wide' form"):
        model(x.requires_grad_())
    with pytest.raises(RequestError, match="given up for the 'wide' form"):
        model.to("meta")


@pytest.mark.parametrize("which", ["mmdit", "t5"])
@torch.no_grad()
def test_whole_models_give_the_same_on_the_cpu_path(which: str) -> None:
    torch.manual_seed(0)
    run: object
    if which == "mmdit":
        config = MMDiTConfig(
            depth=2,
            width=128,
            heads=2,
            dual_attention=(0,),
            qk_norm=True,
            context_width=64,
            pooled_width=32,
            pos_embed_size=8,
        )
        mmdit = MMDiT(config)
        latents, context, pooled = torch.randn(2, 16, 6, 4), torch.randn(2, 7, 64), torch.randn(2, 32)
        model: nn.Module = mmdit

        def run() -> torch.Tensor:
            return mmdit(latents, context, mmdit.modulation(torch.tensor([900.0, 30.0]), pooled))
    else:
        t5 = T5Encoder(T5Config(width=64, layers=2, heads=4, head_width=16, mlp_width=96, vocab_size=50))
        model = t5
        tokens = torch.randint(50, (2, 9))

        def run() -> torch.Tensor:
            return t5(tokens)

    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    specs = all_linears(model)
    convert(model, specs)
    expected = run()
    report = prepare(model, "cpu", torch.float32)
    assert report.fp8 == len(specs) == report.linears
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)
