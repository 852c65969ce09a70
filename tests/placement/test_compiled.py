"""Compiled blocks: they are, they give what the model gives, and nothing that looks on is overlooked."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from octavo.errors import RequestError
from octavo.fp8 import Choice, Fp8Linear, LinearSpec, watch
from octavo.fp8.matmul import CPU_BLAS, PLAIN, TORCH, TORCH_TRITON
from octavo.models import MMDiTConfig
from octavo.models.adapter import adapted
from octavo.models.ops import PLAIN as PLAIN_OPS
from octavo.placement.attention import ATTENTION_BACKENDS
from octavo.placement.compiled import compile_blocks, compile_refusal
from octavo.placement.graphs import captured_by, through
from octavo.placement.running import Running, attend, start
from tests.placement.test_graphs import CONFIG, Replayed, inputs, lora, made

CPU = torch.device("cpu")
compiles = pytest.mark.skipif(compile_refusal(CPU, "eager") is not None, reason="torch.compile does not run here")
# What torch says of itself while it traces.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the blocks' methods, one for each call of a compiled one."""
    calls: list[str] = []
    real = torch.compile

    def spying(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
        compiled = real(function, backend=backend)

        def call(*args: Any) -> Any:
            calls.append(function.__qualname__)
            return compiled(*args)

        return call

    from octavo.placement import compiled

    compiled._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", spying)
    yield calls
    compiled._compiled.cache_clear()
    torch._dynamo.reset()


@compiles
def test_compiled_blocks_give_what_the_model_gives(traced: list[str]) -> None:
    """Traced and run by torch's own operators: the same numbers; FP8 layers as ever, by what compilers know or not."""
    model = made(MMDiTConfig(**{**{f: getattr(CONFIG, f) for f in CONFIG.__slots__}, "dual_attention": (0,)}))
    model.joint_blocks[0].x_block.mlp.fc1 = layer = Fp8Linear(128, 512, LinearSpec(granularity="row"))
    layer.q, layer.choice = torch.randn(512, 128).to(layer.q.dtype), Choice(PLAIN, {})
    model.joint_blocks[0].x_block.mlp.fc2 = other = Fp8Linear(512, 128, LinearSpec(granularity="row"))
    other.q, other.choice = torch.randn(128, 512).to(layer.q.dtype), Choice(CPU_BLAS, {})
    args = inputs(model)
    expected = model(*args)
    assert compile_blocks(model, CPU, "aot_eager") == 2
    assert torch.allclose(model(*args), expected, rtol=1e-5, atol=1e-5)
    assert traced == ["JointBlock.forward"] * 2
    assert other.choice.backend.name == "cpu-blas"


@compiles
def test_rounding_in_one_pass_is_left_to_the_compiler(traced: list[str]) -> None:
    """A kernel of ours would cut the compiled code in two at each such layer."""
    model = made()
    model.joint_blocks[0].x_block.attn.proj = layer = Fp8Linear(128, 128, LinearSpec(granularity="row"))
    layer.choice = Choice(TORCH_TRITON, {})
    compile_blocks(model, CPU, "eager")
    assert layer.choice.backend is TORCH
    assert not traced


@compiles
def test_blocks_share_what_is_compiled(traced: list[str]) -> None:
    """However many there are: the deeper model has more blocks, and the same code."""
    compilations = []
    for depth in (3, 6):
        torch._dynamo.reset()
        count = []

        def counting(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor], count: list[int] = count) -> Any:
            count.append(1)
            return graph.forward

        model = made(MMDiTConfig(**{f: getattr(CONFIG, f) for f in CONFIG.__slots__} | {"depth": depth}))
        compile_blocks(model, CPU, counting)  # type: ignore[arg-type]  # torch takes functions, too
        model(*inputs(model))
        compilations.append(len(count))
    assert 0 < compilations[0] == compilations[1]
    assert len(traced) == 9


@compiles
def test_a_lora_goes_uncompiled(traced: list[str]) -> None:
    """Compiled code does not see hooks that come later, and would leave it out without a word."""
    model, adapter = made(), lora()
    args = inputs(model)
    with adapted(model, ((adapter, 1.0),)):
        expected = model(*args)
    compile_blocks(model, CPU, "eager")
    plain = model(*args)
    assert len(traced) == 2
    with adapted(model, ((adapter, 1.0),)):
        assert torch.equal(model(*args), expected)
    assert len(traced) == 3  # the block without it is compiled still
    with watch(model):
        assert torch.equal(model(*args), plain)
    assert len(traced) == 3


@compiles
def test_compiled_blocks_keep_no_model_alive(traced: list[str]) -> None:
    model = made()
    compile_blocks(model, CPU, "eager")
    gone = weakref.ref(model.joint_blocks[0])
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert not traced


@compiles
def test_compiled_blocks_are_captured_too(traced: list[str]) -> None:
    model = made()
    expected = [model(*inputs(model, seed)) for seed in range(4)]
    told = start(model, CPU, "exact", Running(compile="eager"), seam=Replayed())
    assert told == [
        "2 blocks compiled by eager at the first step of each shape",
        "CUDA graphs: captured at call 2 of a shape",
    ]

    for seed in range(4):
        assert torch.allclose(through(model)(*inputs(model, seed)), expected[seed], rtol=1e-5, atol=1e-5)
    graphs = captured_by(model)
    assert graphs is not None
    assert graphs.replays == 3
    assert traced


def test_where_nothing_can_be_compiled_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RequestError, match=r"--compile is of no use here: it needs a C\+\+ compiler"):
        compile_blocks(model, CPU)
    assert compile_refusal(torch.device("mps")) == "it makes code for CUDA devices and CPUs, this is mps"
    assert "C++ compiler" in str(Running(compile=True).refusal(CPU, torch.float32, 64))


def test_by_default_nothing_changes_on_a_cpu() -> None:
    model = made()
    assert attend(model, CPU, "fast", Running()) == []
    assert start(model, CPU, "fast", Running()) == []
    assert all(block.ops is PLAIN_OPS for block in model.joint_blocks)
    assert captured_by(model) is None
    assert "forward" not in vars(model.joint_blocks[0])


def test_an_attention_that_is_asked_for_is_put_on_or_refused() -> None:
    model = made()
    assert attend(model, CPU, "exact", Running(attention="plain-int8")) == ["attention: plain-int8"]
    assert model.joint_blocks[0].ops is not PLAIN_OPS
    with pytest.raises(RequestError, match="'triton-fp8' was asked for, but runs on cuda"):
        attend(model, CPU, "exact", Running(attention="triton-fp8"))
    assert Running(attention="triton-fp8").refusal(CPU, torch.float32, 64) == (
        "--attention triton-fp8: runs on cuda, this is cpu"
    )
    assert Running(attention="plain-fp8").refusal(CPU, torch.float32, 64) is None
    with pytest.raises(RequestError, match="There is no attention 'flash'"):
        Running(attention="flash")
    assert len({backend.name for backend in ATTENTION_BACKENDS}) == len(ATTENTION_BACKENDS)
