"""Numbers that go wrong in company are one request's failure and nobody else's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo import load
from octavo.errors import NumericsError
from octavo.fp8 import Choice, Fp8Linear
from octavo.fp8.matmul import PLAIN_WIDE
from octavo.pipeline.conditions import Condition
from octavo.pipeline.denoise import Question, denoise
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.finite import denoise_each, denoise_finite
from octavo.pipeline.run import Run, solve
from octavo.pipeline.tables import Tables
from octavo.sampling import get_sampler
from tests.pipeline.recorded import plain, tiny_mmdit, told
from tests.tiny_tree import write_tiny_tree


def question(seed: int, *, broken: bool = False) -> Question:
    track = plain()
    if broken:
        pos = told("pos")
        nothing = Conditioning(pos.context * float("nan"), pos.pooled)
        track = replace(track, positive=[Condition(conditioning=nothing)], tables={}, arranged={})
    return Question(torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed)), 0.5, track)


def test_only_the_failing_question_gets_the_error() -> None:
    questions = [question(0), question(1, broken=True), question(2)]
    cache = Tables()
    cache.get(tiny_mmdit(), told("pos").pooled, [0.5])
    answers = denoise_each(tiny_mmdit(), questions, evaluations=[4, 7, 1], retry_bf16=[False, True, False], cache=cache)
    assert len(cache) == 0  # a table may be what was wrong
    error = answers[1]
    assert isinstance(error, NumericsError)
    assert "evaluation 7" in str(error)
    assert "context_embedder" in str(error)
    for i in (0, 2):
        (alone,) = denoise(tiny_mmdit(), [questions[i]])
        answer = answers[i]
        assert not isinstance(answer, NumericsError)
        torch.testing.assert_close(answer.denoised, alone.denoised, atol=2e-5, rtol=1e-5)


def test_no_questions_have_no_answers() -> None:
    assert denoise_each(tiny_mmdit(), [], evaluations=[], retry_bf16=[]) == []


def test_what_only_a_cfg_pp_sampler_reads_is_looked_at_too() -> None:
    """Without guidance the negative's estimate does not reach the guided one, but the sampler goes by it."""
    neg = told("neg")
    nothing = [Condition(conditioning=Conditioning(neg.context * float("inf"), neg.pooled))]
    asked = question(0)
    broken = replace(asked, track=replace(plain(1.0), negative=nothing), needs_uncond=True)
    with pytest.raises(NumericsError, match="evaluation 3"):
        denoise_finite(tiny_mmdit(), broken, evaluation=3)


def run_of(seed: int = 0) -> Run:
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Run(
        mmdit=tiny_mmdit, track=plain(), sampler=get_sampler("dpmpp_2m"), sigmas=[1, 0.75, 0.5, 0.25, 0], x=x, seed=1
    )


def test_looking_late_changes_no_number() -> None:
    assert torch.equal(solve(run_of(), lambda _: None, late=True), solve(run_of(), lambda _: None, late=False))


@pytest.mark.parametrize("broken", [1, 2, 4])
def test_what_goes_wrong_is_named_one_evaluation_late(broken: int) -> None:
    """The evaluation and the layer are those of the first number that was not finite; after the last one, too."""
    asked: list[int] = []
    model = tiny_mmdit()
    layer = model.joint_blocks[1].x_block.mlp.fc1

    def spoil(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        return output * torch.inf if len(asked) >= broken else None

    handles = [
        model.register_forward_pre_hook(lambda *_: asked.append(1)),
        layer.register_forward_hook(spoil),
    ]
    try:
        with pytest.raises(
            NumericsError, match=rf"in evaluation {broken}\. The first NaN .* 'joint_blocks.1.x_block.mlp.fc1'"
        ):
            solve(run_of(), lambda _: None, late=True)
    finally:
        for handle in handles:
            handle.remove()
    assert len(asked) == min(broken + 1, 4) + 2  # the next one was under way; then again, and once more, watched


def test_a_device_that_makes_mistakes_is_told() -> None:
    """Not finite once, finite when asked again: the model is not to blame."""
    asked: list[int] = []

    def once(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        asked.append(1)
        return output * torch.nan if len(asked) == 2 else None

    handle = tiny_mmdit().register_forward_hook(once)
    try:
        with pytest.raises(NumericsError, match="evaluation 2, and finite numbers when it was asked again"):
            solve(run_of(), lambda _: None, late=True)
    finally:
        handle.remove()


@pytest.mark.parametrize("most_rows", [1, 2, 3, 100])
def test_a_call_may_have_fewer_rows_than_could_share_it(most_rows: int) -> None:
    questions = [question(seed) for seed in range(3)]
    sizes: list[int] = []
    model = tiny_mmdit()
    handle = model.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    try:
        answers = denoise(model, questions, most_rows=most_rows)
    finally:
        handle.remove()
    assert sum(sizes) == 6
    assert max(sizes) == min(most_rows, 6)
    for asked, answer in zip(questions, answers, strict=True):
        torch.testing.assert_close(answer.denoised, denoise(model, [asked])[0].denoised, atol=2e-5, rtol=1e-5)


def test_a_layer_of_the_modulation_goes_on_in_more_bits(tmp_path: Path) -> None:
    """Weights beyond float16 though neither inputs nor outputs are: its tables are made anew once it is wide."""
    components = load(
        "tiny", models_dir=write_tiny_tree(tmp_path / "models"), device="cpu", dtype="float16", force_fp8=True,
        backend="plain",
    )  # fmt: skip
    model = components.mmdit()
    layer, into = (model.get_submodule(f"y_embedder.mlp.{i}") for i in (2, 0))
    assert isinstance(layer, Fp8Linear)
    assert isinstance(into, Fp8Linear)
    assert into.bias is not None
    into.scale *= 1e-4
    into.bias.mul_(1e-4)
    layer.scale *= 1e7
    config = model.config
    like = {"dtype": torch.float16, "generator": torch.Generator().manual_seed(0)}
    prompt = Conditioning(
        torch.randn(1, 5, config.context_width, **like),
        torch.randn(1, config.pooled_width, **like),  # type: ignore[arg-type]
    )
    run = Run(
        mmdit=components.mmdit,
        track=replace(plain(1.0), positive=[Condition(conditioning=prompt)]),
        sampler=get_sampler("euler"),
        sigmas=[1.0, 0.5, 0.0],
        x=torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1)),
        seed=1,
        retry_bf16=True,
    )
    with pytest.raises(NumericsError, match=r"y_embedder\.mlp\.2.*--retry-bf16"):
        solve(replace(run, retry_bf16=False), lambda _step: None)
    retried = solve(run, lambda _step: None)
    assert layer.choice == Choice(PLAIN_WIDE, {})
    assert retried.isfinite().all()
