"""Noise levels: against recordings, and what every schedule must keep."""

import json
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import MissingExtraError, RequestError
from octavo.sampling import SCHEDULES, get_schedule, schedule
from tests.goldens import golden


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(golden("comfyui/sigmas.json").read_text())
    return found


def recorded_case(key: str) -> tuple[str, int, float, float, bool]:
    """Name, steps, shift, denoise and whether the last but one level is left out, from a key of the recording."""
    parts = key.split("/")
    shift = float(parts.pop(0).removeprefix("shift")) if parts[0].startswith("shift") else 3.0
    name, steps, denoise, *kind = parts
    return (
        name,
        int(steps.removeprefix("steps")),
        shift,
        float(denoise.removeprefix("denoise")),
        kind == ["discard_penultimate"],
    )


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("ddim_uniform", "kl_optimal")])
def test_levels_equal_comfyui(recorded: dict[str, Any], name: str) -> None:
    checked = 0
    for key, sigmas in (recorded["schedules"] | recorded["other_shifts"]).items():
        case, steps, shift, denoise, discard_penultimate = recorded_case(key)
        if case == name:
            got = schedule(name, steps, shift, denoise, discard_penultimate)
            assert got == pytest.approx(sigmas, abs=1e-7), key
            checked += 1
    assert checked == 39


def test_kl_optimal_equals_comfyui_but_for_one_step_where_that_divides_by_zero(recorded: dict[str, Any]) -> None:
    for key, sigmas in (recorded["schedules"] | recorded["other_shifts"]).items():
        case, steps, shift, denoise, discard_penultimate = recorded_case(key)
        if case == "kl_optimal":
            got = schedule(case, steps, shift, denoise, discard_penultimate)
            assert got == pytest.approx([1.0, 0.0] if None in sigmas else sigmas, abs=1e-7), key
    assert schedule("kl_optimal", 1) == [1.0, 0.0]


def test_ddim_uniform_equals_comfyui_but_for_its_top_and_its_surplus_step(recorded: dict[str, Any]) -> None:
    """The recording's lowest levels are kept, as many as were asked for but one; the top level is 1."""
    for key, sigmas in (recorded["schedules"] | recorded["other_shifts"]).items():
        name, steps, shift, denoise, discard_penultimate = recorded_case(key)
        if name != "ddim_uniform":
            continue
        got = schedule(name, steps, shift, denoise, discard_penultimate)
        assert len(got) == steps + 1
        kept = steps if denoise == 1 or steps == 1 else steps + 1
        assert got[-kept:] == pytest.approx(sigmas[-kept:], abs=1e-7), key
        if kept == steps:
            assert got[0] == 1.0, key


def test_normal_equals_diffusers() -> None:
    recorded = json.loads(golden("diffusers/flow_match_euler.json").read_text())
    for key, case in recorded.items():
        shift, steps = key.removeprefix("shift").split("_steps")
        sigmas = schedule("normal", int(steps), shift=float(shift))
        assert sigmas == pytest.approx(case["sigmas"], abs=2e-7), key
        assert [1000 * sigma for sigma in sigmas[:-1]] == pytest.approx(case["timesteps"], abs=2e-4), key


@given(
    name=st.sampled_from(list(SCHEDULES)),
    steps=st.one_of(st.integers(1, 100), st.sampled_from([500, 501, 999, 1000, 1001])),
    shift=st.floats(0.05, 100),
    discard_penultimate=st.booleans(),
)
@settings(deadline=None)
def test_a_whole_run_falls_from_one_to_zero_in_as_many_steps_as_asked(
    name: str, steps: int, shift: float, discard_penultimate: bool
) -> None:
    sigmas = schedule(name, steps, shift, discard_penultimate=discard_penultimate)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert all(sigma > sigma_next for sigma, sigma_next in pairwise(sigmas))


@given(name=st.sampled_from(list(SCHEDULES)), steps=st.integers(1, 60), denoise=st.floats(0.1, 1))
@settings(deadline=None)
def test_denoise_walks_the_end_of_a_longer_run(name: str, steps: int, denoise: float) -> None:
    sigmas = schedule(name, steps, denoise=denoise)
    assert sigmas == schedule(name, int(steps / denoise))[-(steps + 1) :]
    assert len(sigmas) == steps + 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_longest_run_has_no_two_equal_levels(name: str) -> None:
    for shift in (0.1, 3.0, 100.0):
        sigmas = schedule(name, 10_000, shift)
        assert all(sigma > sigma_next for sigma, sigma_next in pairwise(sigmas))


@pytest.mark.parametrize("name", SCHEDULES)
def test_denoise_zero_visits_no_level(name: str) -> None:
    assert schedule(name, 20, denoise=0.0) == []


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, "at least 1 step"),
        ({"shift": 0.0}, "above 0"),
        ({"shift": float("nan")}, "above 0"),
        ({"shift": 101.0}, "at most 100"),
        ({"denoise": 1.5}, "denoise=1.5"),
        ({"denoise": -0.1}, "denoise=-0.1"),
        ({"denoise": float("nan")}, "denoise=nan"),
        ({"denoise": 1e-9}, "at most 10000"),
        ({"steps": 20_000}, "at most 10000"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        schedule("simple", **{"steps": 20, **settings})


@pytest.mark.parametrize(
    ("spelling", "name"), [("SGM Uniform", "sgm_uniform"), ("Karras", "karras"), ("DDIM", "ddim_uniform")]
)
def test_other_spellings_are_understood(spelling: str, name: str) -> None:
    assert get_schedule(spelling) is SCHEDULES[name]


def test_an_unknown_name_is_answered_with_the_closest_one() -> None:
    with pytest.raises(RequestError, match=r"no schedule 'karas'\. Did you mean 'karras'\?"):
        schedule("karas", 20)


def test_without_scipy_beta_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(MissingExtraError, match="pip install scipy"):
        schedule("beta", 20)
