"""Samplers as generators: pausing, mixing and counting change nothing."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.errors import RequestError
from octavo.sampling import SAMPLERS, SCHEDULES, Guided, SamplerSpec, get_sampler, sample, schedule
from octavo.sampling.noise import for_run, initial_noise

SHAPE = (1, 4, 6, 6)
PLANNED = [name for name, spec in SAMPLERS.items() if not spec.adaptive]


def model(x: Tensor, sigma: float) -> Tensor:
    """A smooth, bounded function of each number alone."""
    return 0.8 * torch.tanh(x * (1 - sigma / 2)) + 0.1 * sigma


def answer(spec: SamplerSpec, x: Tensor, sigma: float) -> Tensor | Guided:
    return Guided(model(x, sigma), 0.7 * model(x, sigma)) if spec.needs_uncond else model(x, sigma)


def run(spec: SamplerSpec, x: Tensor, sigmas: list[float], seed: int = 1, shift: float = 3.0) -> Tensor:
    noise = for_run(spec, x, sigmas, seed) if len(sigmas) > 1 else lambda *_: x
    return sample(spec(x, sigmas, noise=noise, shift=shift), lambda x, sigma: answer(spec, x, sigma))


def sigmas_for(spec: SamplerSpec, steps: int = 6) -> list[float]:
    return schedule("normal", steps, discard_penultimate=spec.discard_penultimate)


def test_euler_equals_a_plain_loop() -> None:
    x = initial_noise(SHAPE, 1)
    sigmas = schedule("simple", 6)
    expected = x
    for sigma, sigma_next in pairwise(sigmas):
        expected = expected + (expected - model(expected, sigma)) / sigma * (sigma_next - sigma)
    torch.testing.assert_close(run(SAMPLERS["euler"], x, sigmas), expected)


def test_heun_equals_a_plain_loop() -> None:
    x = initial_noise(SHAPE, 1)
    sigmas = schedule("simple", 6)
    expected = x
    for sigma, sigma_next in pairwise(sigmas):
        first = (expected - model(expected, sigma)) / sigma
        guess = expected + first * (sigma_next - sigma)
        second = (guess - model(guess, sigma_next)) / sigma_next if sigma_next else first
        expected = expected + (first + second) / 2 * (sigma_next - sigma)
    torch.testing.assert_close(run(SAMPLERS["heun"], x, sigmas), expected)


def test_lcm_equals_a_plain_loop() -> None:
    x = initial_noise(SHAPE, 1)
    sigmas = schedule("simple", 6)
    noise = for_run(SAMPLERS["lcm"], x, sigmas, 1)
    assert noise is not None
    expected = x
    for sigma, sigma_next in pairwise(sigmas):
        expected = model(expected, sigma)
        if sigma_next:
            expected = (1 - sigma_next) * expected + sigma_next * noise(sigma, sigma_next)
    torch.testing.assert_close(run(SAMPLERS["lcm"], x, sigmas), expected)


def test_samplers_taking_turns_get_what_they_get_alone() -> None:
    """As a server runs them: every round, all open questions are answered, then all go on."""
    starts = {name: initial_noise(SHAPE, seed) for seed, name in enumerate(SAMPLERS)}
    open_runs = {}
    for seed, (name, x) in enumerate(starts.items()):
        spec, sigmas = SAMPLERS[name], sigmas_for(SAMPLERS[name], steps=3 + seed % 5)
        open_runs[name] = spec(x, sigmas, noise=for_run(spec, x, sigmas, seed))
    questions = {name: next(sampler) for name, sampler in open_runs.items()}
    results: dict[str, Tensor] = {}
    while questions:
        answers = {name: answer(SAMPLERS[name], *question) for name, question in questions.items()}
        for name, sent in answers.items():
            try:
                questions[name] = open_runs[name].send(sent)
            except StopIteration as end:
                results[name] = end.value
                del questions[name]
    for seed, (name, x) in enumerate(starts.items()):
        alone = run(SAMPLERS[name], x, sigmas_for(SAMPLERS[name], steps=3 + seed % 5), seed)
        assert torch.equal(results[name], alone), name


@pytest.mark.parametrize("name", PLANNED)
def test_rows_of_a_batch_do_not_mix(name: str) -> None:
    spec = SAMPLERS[name]
    sigmas = sigmas_for(spec)
    rows = [initial_noise(SHAPE, seed) for seed in (1, 2)]
    sources = [for_run(spec, row, sigmas, seed) for seed, row in enumerate(rows)]

    def together(sigma: float, sigma_next: float) -> Tensor:
        return torch.cat([source(sigma, sigma_next) for source in sources if source is not None])

    batch = sample(spec(torch.cat(rows), sigmas, noise=together), lambda x, sigma: answer(spec, x, sigma))
    for seed, row in enumerate(rows):
        torch.testing.assert_close(batch[seed : seed + 1], run(spec, row, sigmas, seed), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_calls_are_known_beforehand_bit_for_bit(name: str, steps: int) -> None:
    spec = SAMPLERS[name]
    sigmas = sigmas_for(spec, steps)
    x = initial_noise(SHAPE, 1)
    asked: list[float] = []

    def listen(x: Tensor, sigma: float) -> Tensor | Guided:
        asked.append(sigma)
        return answer(spec, x, sigma)

    sample(spec(x, sigmas, noise=for_run(spec, x, sigmas, 1), shift=2.0), listen)
    assert spec.calls(sigmas, shift=2.0) == asked
    assert all(0 < sigma <= 1 for sigma in asked)


def test_calls_of_an_adaptive_sampler_cannot_be_known() -> None:
    with pytest.raises(AssertionError, match="chooses its sigmas"):
        SAMPLERS["dpm_adaptive"].calls([1.0, 0.5, 0.0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_start_is_not_written_to(name: str) -> None:
    spec, x = SAMPLERS[name], initial_noise(SHAPE, 1)
    before = x.clone()
    run(spec, x, sigmas_for(spec))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigmas", [[], [1.0], [0.4], [0.0]])
def test_without_a_step_the_start_comes_back(name: str, sigmas: list[float]) -> None:
    x = initial_noise(SHAPE, 1)
    assert torch.equal(run(SAMPLERS[name], x, sigmas), x)


STOP_ABOVE_ZERO = {"dpm_fast", "dpm_adaptive", "uni_pc", "uni_pc_bh2"}


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in STOP_ABOVE_ZERO])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_run_down_to_zero_ends_in_the_last_answer(name: str, steps: int) -> None:
    spec, x = SAMPLERS[name], initial_noise(SHAPE, 1)
    sigmas = sigmas_for(spec, steps)
    answers: list[Tensor] = []

    def listen(x: Tensor, sigma: float) -> Tensor | Guided:
        answers.append(model(x, sigma))
        return answer(spec, x, sigma)

    result = sample(spec(x, sigmas, noise=for_run(spec, x, sigmas, 1)), listen)
    torch.testing.assert_close(result, answers[-1], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(STOP_ABOVE_ZERO))
def test_one_step_goes_all_the_way_down(name: str) -> None:
    x = initial_noise(SHAPE, 1)
    torch.testing.assert_close(run(SAMPLERS[name], x, [1.0, 0.0]), model(x, 1.0), atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "euler_cfg_pp"])
def test_a_run_of_a_sampler_without_memory_can_be_cut_in_two(name: str) -> None:
    spec, x = SAMPLERS[name], initial_noise(SHAPE, 1)
    sigmas = sigmas_for(spec)
    half = run(spec, x, sigmas[:4])
    assert torch.equal(run(spec, half, sigmas[3:]), run(spec, x, sigmas))


@given(
    name=st.sampled_from(list(SAMPLERS)),
    levels=st.sampled_from(list(SCHEDULES)),
    steps=st.integers(1, 30),
    shift=st.floats(0.2, 15),
    denoise=st.floats(0.05, 1),
)
@settings(max_examples=100, deadline=None)
def test_any_sampler_on_any_schedule_gives_finite_numbers(
    name: str, levels: str, steps: int, shift: float, denoise: float
) -> None:
    spec = SAMPLERS[name]
    sigmas = schedule(levels, steps, shift, denoise, discard_penultimate=spec.discard_penultimate)
    result = run(spec, initial_noise((1, 1, 4, 4), 1), sigmas, shift=shift)
    assert result.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_close_to_pure_noise_give_finite_numbers(name: str) -> None:
    """Above where SDE samplers usually move a first level of 1."""
    sigmas = [1.0, 0.999999, 0.99999, 0.5, 0.0]
    assert run(SAMPLERS[name], initial_noise(SHAPE, 1), sigmas).isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_close_to_clean_data_give_finite_numbers(name: str) -> None:
    sigmas = [0.5, 1e-4, 1e-5, 1e-6, 0.0]
    assert run(SAMPLERS[name], initial_noise(SHAPE, 1), sigmas).isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_dtype_of_the_start_is_kept(name: str) -> None:
    spec, x = SAMPLERS[name], initial_noise(SHAPE, 1).double()
    assert run(spec, x, sigmas_for(spec)).dtype == torch.float64


def test_a_sampler_that_draws_noise_says_so_when_none_is_given() -> None:
    with pytest.raises(RequestError, match="euler_ancestral draws noise"):
        SAMPLERS["euler_ancestral"](torch.zeros(SHAPE), [1.0, 0.0])


def test_the_model_s_shift_moves_where_sde_samplers_start() -> None:
    first = [SAMPLERS["dpmpp_2m_sde"].calls([1.0, 0.5, 0.0], shift=shift)[0] for shift in (1.0, 3.0, 6.0)]
    assert first == [pytest.approx(1 - 1e-4 / (shift - (shift - 1) * 1e-4), abs=1e-9) for shift in (1.0, 3.0, 6.0)]


def test_gpu_names_are_the_same_samplers() -> None:
    for name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"):
        assert SAMPLERS[f"{name}_gpu"].steps is SAMPLERS[name].steps
        assert SAMPLERS[f"{name}_gpu"].options == SAMPLERS[name].options


def test_options_change_the_algorithm_s_constants() -> None:
    x, sigmas = initial_noise(SHAPE, 1), schedule("simple", 6)
    still = SAMPLERS["euler_ancestral"].with_options(eta=0.0)
    torch.testing.assert_close(run(still, x, sigmas), run(SAMPLERS["euler"], x, sigmas))
    assert SAMPLERS["euler_ancestral"].options == {}
    first_order = SAMPLERS["lms"].with_options(order=1)
    torch.testing.assert_close(run(first_order, x, sigmas), run(SAMPLERS["euler"], x, sigmas))


def test_an_unknown_option_is_refused_with_a_hint() -> None:
    with pytest.raises(RequestError, match=r"no option 's_noize'\. Did you mean 's_noise'\?"):
        SAMPLERS["euler_ancestral"].with_options(s_noize=1.0)
    with pytest.raises(RequestError, match="It has: none"):
        SAMPLERS["euler"].with_options(eta=1.0)


@pytest.mark.parametrize("order", [0, 9])
@pytest.mark.parametrize("name", ["lms", "deis", "ipndm", "ipndm_v", "uni_pc", "er_sde"])
def test_an_order_that_a_sampler_does_not_have_is_refused(name: str, order: int) -> None:
    with pytest.raises(RequestError, match=f"order={order}: this sampler has orders 1 to"):
        run(SAMPLERS[name].with_options(order=order), initial_noise(SHAPE, 1), [1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("euler", "euler"),
        ("Euler a", "euler_ancestral"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun"),
        ("DPM++ 2S a", "dpmpp_2s_ancestral"),
        ("DPM2 a", "dpm_2_ancestral"),
        ("UniPC", "uni_pc"),
        ("FlowMatchEulerDiscreteScheduler", "euler"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
    ],
)
def test_other_spellings_are_understood(spelling: str, name: str) -> None:
    assert get_sampler(spelling) is SAMPLERS[name]


def test_an_unknown_name_is_answered_with_the_closest_one_or_all() -> None:
    with pytest.raises(RequestError, match=r"no sampler 'dpmp_2m'\. Did you mean 'dpmpp_2m'\?"):
        get_sampler("dpmp_2m")
    with pytest.raises(RequestError, match="There are: euler, "):
        get_sampler("xyzzy")


def test_an_error_of_the_model_reaches_the_caller() -> None:
    def broken(_x: Tensor, _sigma: float) -> Tensor:
        raise StopIteration("not the sampler's end")

    with pytest.raises(StopIteration, match="not the sampler's end"):
        sample(SAMPLERS["euler"](torch.zeros(SHAPE), [1.0, 0.0]), broken)


def test_every_sampler_names_its_source() -> None:
    assert all(spec.paper for spec in SAMPLERS.values())
    assert all(spec.steps.__doc__ for spec in SAMPLERS.values())
