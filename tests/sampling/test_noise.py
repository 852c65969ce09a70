"""Noise of a seed: the recorded numbers, and the laws it must keep."""

import hashlib
import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file

from octavo.errors import MissingExtraError, RequestError
from octavo.sampling import SAMPLERS, sample, schedule
from octavo.sampling.noise import brownian_noise, default_noise, for_run, initial_noise
from tests.goldens import golden


def test_first_noise_equals_comfyui_bit_for_bit() -> None:
    recorded = json.loads(golden("comfyui/noise.json").read_text())["cases"]
    for case, facts in recorded.items():
        seed, what = case.removeprefix("seed").split("/")
        if what.startswith("batch_index"):
            pictures = json.loads(what.removeprefix("batch_index"))
            noise = initial_noise((len(pictures), 16, 8, 8), int(seed), pictures)
        elif "x" in what:
            noise = initial_noise([int(size) for size in what.split("x")], int(seed))
        else:
            continue
        assert noise.flatten()[:16].tolist() == facts["first16"], case
        assert hashlib.sha256(noise.numpy().tobytes()).hexdigest() == facts["sha256_float32_le"], case


def test_default_noise_equals_comfyui_bit_for_bit() -> None:
    recorded = load_file(golden("comfyui/samplers.safetensors"))["default_noise_draws_seed42"]
    draw = default_noise(recorded[0], 42)
    assert torch.equal(torch.stack([draw(1.0, 0.5) for _ in recorded]), recorded)


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"])
def test_brownian_noise_equals_comfyui(name: str, case: str) -> None:
    facts = json.loads(golden("comfyui/samplers.json").read_text())["cases"][f"{name}/{case}"]
    recorded = load_file(golden("comfyui/samplers.safetensors"))[f"{name}/{case}/noise_draws"]
    draw = brownian_noise(recorded[0], facts["seed"], facts["sigmas"])
    drawn = torch.stack([draw(sigma, sigma_next) for sigma, sigma_next in facts["noise_sigma_pairs"]])
    torch.testing.assert_close(drawn, recorded, atol=2e-6, rtol=0)


def test_a_brownian_step_is_the_sum_of_its_parts() -> None:
    draw = brownian_noise(torch.zeros(1, 4, 8, 8), 7, [1.0, 0.5, 0.1, 0.0])
    whole = math.sqrt(0.9) * draw(1.0, 0.1)
    parts = math.sqrt(0.6) * draw(1.0, 0.4) + math.sqrt(0.3) * draw(0.4, 0.1)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sigma", [1.0, 0.9999995, 0.5, 0.4999996, 0.1])
def test_noise_of_steps_closer_than_the_path_is_resolved_is_noise_still(sigma: float) -> None:
    draw = brownian_noise(torch.zeros(1, 16, 16, 16), 7, [1.0, sigma, sigma - 6e-8, 0.1 - 1e-7, 0.0])
    assert draw(sigma, sigma - 6e-8).std().item() == pytest.approx(1, abs=0.05)  # 4096 numbers: 1 / sqrt(8192) is 0.011


def test_a_run_between_two_levels_closer_than_that_has_noise_as_well() -> None:
    draw = brownian_noise(torch.zeros(1, 16, 16, 16), 7, [0.5, 0.5 - 6e-8, 0.0])
    assert draw(0.5, 0.5 - 6e-8).std().item() == pytest.approx(1, abs=0.05)


def test_a_brownian_path_does_not_depend_on_the_order_of_reading() -> None:
    steps = [(1.0, 0.7), (0.7, 0.4), (0.7, 0.2), (0.2, 0.1)]
    like, sigmas = torch.zeros(1, 4, 8, 8), [1.0, 0.1, 0.0]
    forwards, backwards = brownian_noise(like, 7, sigmas), brownian_noise(like, 7, sigmas)
    in_order = [forwards(*step) for step in steps]
    in_reverse = [backwards(*step) for step in reversed(steps)]
    assert all(torch.equal(a, b) for a, b in zip(in_order, reversed(in_reverse), strict=True))


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
def test_noise_has_mean_0_and_variance_1(name: str) -> None:
    """65536 numbers: five deviations are 5 / 256 of the mean and 5 * sqrt(2) / 256 of the variance."""
    like, sigmas = torch.zeros(1, 16, 64, 64), schedule("karras", 5)
    draw = for_run(SAMPLERS[name], like, sigmas, seed=3)
    assert draw is not None
    noise = draw(sigmas[0], sigmas[1])
    assert abs(noise.mean().item()) < 5 / 256
    assert abs(noise.var().item() - 1) < 5 * math.sqrt(2) / 256


@pytest.mark.parametrize("kind", ["default", "brownian"])
def test_numbers_of_a_seed_do_not_depend_on_the_dtype(kind: str) -> None:
    sampler = SAMPLERS["euler_ancestral" if kind == "default" else "dpmpp_sde"]
    drawn = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        draw = for_run(sampler, torch.zeros(1, 4, 8, 8, dtype=dtype), [1.0, 0.5, 0.0], seed=11)
        assert draw is not None
        noise = draw(1.0, 0.5)
        assert noise.dtype == dtype
        drawn.append(noise)
    assert torch.equal(drawn[0].double(), drawn[1])
    assert torch.equal(drawn[0].bfloat16(), drawn[2])


def test_noise_is_drawn_on_the_cpu_whatever_the_device_of_the_latents() -> None:
    """The meta device has no numbers; the CPU's generator moves on all the same."""
    with_meta = default_noise(torch.zeros(1, 4, 8, 8, device="meta"), 5)
    assert with_meta(1.0, 0.5).device.type == "meta"
    assert brownian_noise(torch.zeros(1, 4, 8, 8, device="meta"), 5, [1.0, 0.5, 0.0])(1.0, 0.5).device.type == "meta"


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "er_sde", "sa_solver"])
def test_a_seed_gives_one_result_and_another_seed_another(name: str) -> None:
    def run(seed: int) -> torch.Tensor:
        x, sigmas = initial_noise((1, 4, 8, 8), seed), schedule("simple", 8)
        spec = SAMPLERS[name]
        return sample(spec(x, sigmas, noise=for_run(spec, x, sigmas, seed)), lambda x, sigma: x * (1 - sigma) / 2)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    initial_noise((1, 4, 8, 8), 1)
    default_noise(torch.zeros(4), 1)(1.0, 0.5)
    brownian_noise(torch.zeros(4), 1, [1.0, 0.5, 0.0])(1.0, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_picture_k_of_a_seed_does_not_depend_on_its_company() -> None:
    alone = initial_noise((1, 16, 8, 8), 9, [2])
    assert torch.equal(initial_noise((3, 16, 8, 8), 9, [0, 2, 1])[1:2], alone)


def test_the_last_seed_is_as_good_as_any() -> None:
    noise = default_noise(torch.zeros(1, 4, 8, 8), 2**64 - 1)(1.0, 0.5)
    assert torch.equal(noise, initial_noise((1, 4, 8, 8), 0))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    like = torch.zeros(1, 4, 8, 8)
    for draw in (
        lambda: initial_noise((1, 4, 8, 8), seed),
        lambda: default_noise(like, seed),
        lambda: brownian_noise(like, seed, [1.0, 0.5]),
    ):
        with pytest.raises(RequestError, match="whole number from 0 to 18446744073709551615"):
            draw()


@pytest.mark.parametrize("pictures", [[0], [0, 1, 2], [0, -1]])
def test_a_wrong_batch_index_is_refused(pictures: list[int]) -> None:
    with pytest.raises(RequestError, match="need 2 numbers"):
        initial_noise((2, 16, 8, 8), 1, pictures)


def test_samplers_that_draw_nothing_get_no_source() -> None:
    assert for_run(SAMPLERS["euler"], torch.zeros(4), [1.0, 0.0], seed=1) is None


def test_without_torchsde_the_sde_samplers_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(MissingExtraError, match="pip install torchsde"):
        for_run(SAMPLERS["dpmpp_sde"], torch.zeros(4), [1.0, 0.0], seed=1)
