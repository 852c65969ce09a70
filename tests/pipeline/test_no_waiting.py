"""Within a step the host never waits for the device, so that it is a step ahead of it.

The part of a GPU is played by torch's meta device, whose tensors have no numbers: whatever asks for one, `.item()`,
`.tolist()`, `bool()`, `nonzero`, a mask of booleans, `.cpu()`, fails there. What is brought to the device is seen by a
dispatch mode, and by standing in for `torch.tensor` and `Tensor.new_tensor`, which it does not see. From the second
evaluation on, for what is constant may be brought once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from octavo.fp8 import Choice, Fp8Linear, LinearSpec
from octavo.fp8.matmul import PLAIN_W8A8
from octavo.models import MMDiT, MMDiTConfig
from octavo.models.adapter import Adapter, LayerChange, LowRank, _Ready
from octavo.pipeline import control as control_module
from octavo.pipeline import finite as finite_module
from octavo.pipeline.conditions import Condition
from octavo.pipeline.denoise import Question, Track, denoise, make_tables
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.finite import Late
from octavo.pipeline.run import Run, Walk
from octavo.sampling import SAMPLERS, ClassifierFree, Guidance, SkipLayerGuidance
from octavo.sampling import noise as noise_module

CONFIG = MMDiTConfig(depth=2, width=128, heads=2, context_width=32, pooled_width=16, pos_embed_size=16)
SIGMAS = [0.9, 0.7, 0.4, 0.0]


class Crossings(TorchDispatchMode):
    """Names of the operators that had to do with both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        # A single number beside a tensor is an argument of the kernel; only copies of it are copies.
        copies = any(word in str(func) for word in ("to", "copy"))
        if len({leaf.device.type for leaf in leaves if leaf.dim() or leaf.is_meta or copies}) > 1:
            self.found.append(str(func))
        return out


@contextmanager
def crossings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What crosses in between; noise and the like may, in its turn."""
    mode = Crossings()
    made = {torch: "tensor", Tensor: "new_tensor"}

    def spy(name: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            result = real(*args, **kwargs)
            if result.device.type != "cpu":
                mode.found.append(name)
            return result

        return call

    def moved(x: Tensor, like: Tensor) -> Tensor:
        assert x.device.type == "cpu"
        return torch.empty(x.shape, device=like.device, dtype=like.dtype)

    with monkeypatch.context() as patch, mode:
        for owner, name in made.items():
            patch.setattr(owner, name, spy(name, getattr(owner, name)))
        for module in (noise_module, control_module):
            patch.setattr(module, "moved", moved)
        yield mode.found


def model() -> MMDiT:
    with torch.device("meta"):
        return MMDiT(CONFIG)


def prompt(tokens: int) -> Conditioning:
    return Conditioning(context=torch.empty(1, tokens, 32, device="meta"), pooled=torch.empty(1, 16, device="meta"))


def latents(rows: int = 1) -> Tensor:
    return torch.empty(rows, 16, 8, 8, device="meta")


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.copy_(torch.ones(16)),
        lambda x: torch.tensor([0, 1], device=x.device),
        lambda x: x.new_tensor([0.5]),
    ],
)
def test_what_waits_is_noticed(monkeypatch: pytest.MonkeyPatch, waits: Callable[[Tensor], object]) -> None:
    x = torch.empty(16, device="meta")
    try:
        with crossings(monkeypatch) as found:
            waits(x)
    except (RuntimeError, NotImplementedError) as error:
        found = [str(error)]
    assert found


@pytest.mark.parametrize("name", [name for name, spec in SAMPLERS.items() if not spec.adaptive])
def test_no_sampler_waits(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Adaptive samplers do: they choose the next level by how large an error is."""
    mmdit = model()
    guidance = Guidance(classifier_free=ClassifierFree(rescale=0.5), skip_layers=SkipLayerGuidance(layers=(1,)))
    track = Track.of(prompt(5), prompt(7), guidance, 3.0)
    with torch.inference_mode():
        with crossings(monkeypatch):
            walk = Walk(
                Run(mmdit=lambda: mmdit, track=track, sampler=SAMPLERS[name], sigmas=SIGMAS, x=latents(), seed=1)
            )
            assert walk.question is not None
            walk.answer(denoise(mmdit, [walk.question])[0])
        with crossings(monkeypatch) as found:
            while walk.question is not None:
                walk.answer(denoise(mmdit, [walk.question])[0])
    assert not found
    assert walk.step.done == walk.step.total > 1


def test_soundness_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step is started before the last one's flag is read, and that is the only number which is."""
    mmdit, told = model(), list[str]()
    track = Track.of(prompt(5), prompt(5), Guidance(), 3.0)

    class Flag:
        def __init__(self, sound: Tensor) -> None:
            assert sound.shape == ()
            told.append("begun")

        def item(self) -> bool:
            told.append("read")
            return True

    monkeypatch.setattr(finite_module, "Arriving", Flag)
    with torch.inference_mode():
        make_tables(mmdit, track, SIGMAS[:-1])
        checks = Late()
        checks.ask(mmdit, Question(latents(), 0.9, track), evaluation=1)
        with crossings(monkeypatch) as found:
            for number in (1, 2):
                checks.ask(mmdit, Question(latents(), SIGMAS[number], track), evaluation=number + 1)
        checks.settle(mmdit)
    assert not found
    assert told == ["begun", "begun", "read", "begun", "read", "read"]


def test_nothing_waits_in_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests at unlike levels, texts of unlike lengths, LoRAs, masks, calibrated scales that follow the schedule."""
    mmdit = model()
    spec = LinearSpec(granularity="row", input_scale=True, step_sigmas=(0.7, 0.3))
    for block in mmdit.joint_blocks:
        with torch.device("meta"):
            block.x_block.mlp.fc1 = layer = Fp8Linear(128, 512, spec)
        layer.choice = Choice(PLAIN_W8A8, {})
    down, up = (torch.empty(shape, device="meta") for shape in ((4, 128), (128, 4)))
    lora = Adapter("hands", {"joint_blocks.0.x_block.attn.proj": LayerChange((LowRank(down, up),))})
    # It asks where the weights are that are not on meta; here all are.
    monkeypatch.setattr(Adapter, "change", lambda *_: _Ready((LowRank(down, up),), None))
    masked = Condition(conditioning=prompt(9), mask=torch.ones(1, 8, 8), area=(0.5, 1.0, 0.0, 0.0))
    tracks = [
        Track.of(prompt(5), prompt(5), Guidance(), 3.0, ((lora, 0.8),)),
        Track.of(prompt(6), prompt(4), Guidance(), 3.0, ((lora, 0.8),)),
        Track(
            positive=[Condition(conditioning=prompt(5)), masked],
            negative=[Condition(conditioning=prompt(5))],
            guidance=Guidance(),
            shift=3.0,
        ),
    ]
    xs = [latents(), latents(2), latents()]
    with torch.inference_mode():
        for track in tracks:
            make_tables(mmdit, track, SIGMAS[:-1])

        def questions(*sigmas: float) -> list[Question]:
            return [Question(x, sigma, track) for x, sigma, track in zip(xs, sigmas, tracks, strict=True)]

        denoise(mmdit, questions(0.9, 0.5, 0.7))
        with crossings(monkeypatch) as found:
            answers = denoise(mmdit, questions(0.9, 0.5, 0.7))
    assert not found
    assert [answer.denoised.shape[0] for answer in answers] == [1, 2, 1]
