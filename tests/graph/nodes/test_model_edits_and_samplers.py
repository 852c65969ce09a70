"""Edits of how a model is sampled from, and samplers with constants of their own."""

from typing import Any

import pytest
import torch

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes import model_edits, samplers
from octavo.graph.nodes.types import ModelLink
from octavo.graph.spec import NodeSpec
from octavo.sampling import SAMPLERS, SamplerSpec, sample
from tests.graph.nodes.runs import MODEL, context_with, write_recorded_model
from tests.sampling.flows import denoise, geometric

NOWHERE: Any = None  # these nodes use nothing of their context


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelLink:
    context: Context = context_with(write_recorded_model(tmp_path_factory.mktemp("models")))
    return ModelLink.of(context.shelf.diffusion_model(MODEL))


def edited(spec: NodeSpec, model: ModelLink, **inputs: Any) -> ModelLink:
    outputs = spec.run(NOWHERE, model=model, **inputs)
    assert isinstance(outputs, tuple)
    (link,) = outputs
    assert isinstance(link, ModelLink)
    assert link.model is model.model
    return link


SD3 = {"layers": "0, 1", "scale": 3.0, "start_percent": 0.01, "end_percent": 0.15}
DIT = {
    "double_layers": "0, 1", "single_layers": "7, 8, 9", "scale": 3.0, "start_percent": 0.01, "end_percent": 0.15,
    "rescaling_scale": 0.0,
}  # fmt: skip


def test_edits_add_up_and_leave_the_original_as_it_was(model: ModelLink) -> None:
    all_of_them = edited(model_edits.model_sampling_sd3, model, shift=4.0)
    all_of_them = edited(model_edits.rescale_cfg, all_of_them, multiplier=0.3)
    all_of_them = edited(model_edits.skip_layer_guidance_sd3, all_of_them, **SD3)
    assert (all_of_them.shift, all_of_them.rescale) == (4.0, 0.3)
    assert all_of_them.skip_layers is not None
    assert (all_of_them.skip_layers.guidance.layers, all_of_them.skip_layers.shift) == ((0, 1), 4.0)
    assert (model.shift, model.rescale, model.skip_layers) == (3.0, 0.0, None)


@pytest.mark.parametrize("layers", ["1, 0", "0,1", "0 1", " 1;0,1 "])
def test_layers_are_read_however_they_are_parted(model: ModelLink, layers: str) -> None:
    link = edited(model_edits.skip_layer_guidance_dit, model, **{**DIT, "double_layers": layers})
    assert link.skip_layers is not None
    assert link.skip_layers.guidance.layers == (0, 1)


@pytest.mark.parametrize("layers", ["", "  "])
def test_no_layers_are_no_guidance(model: ModelLink, layers: str) -> None:
    assert edited(model_edits.skip_layer_guidance_sd3, model, **{**SD3, "layers": layers}) is model


REFUSED: list[tuple[NodeSpec, dict[str, Any], str]] = [
    (model_edits.model_sampling_sd3, {"shift": 0.0}, "above 0"),
    (model_edits.skip_layer_guidance_sd3, {**SD3, "layers": "2"}, "layers 0 to 1"),
    (model_edits.skip_layer_guidance_sd3, {**SD3, "layers": "all"}, "7, 8, 9"),
    (model_edits.skip_layer_guidance_sd3, {**SD3, "layers": "-1"}, "7, 8, 9"),
    (model_edits.skip_layer_guidance_sd3, {**SD3, "start_percent": 0.5, "end_percent": 0.5}, "start"),
    (model_edits.skip_layer_guidance_dit, {**DIT, "single_layers": "none"}, "single_layers"),
    (model_edits.skip_layer_guidance_dit, {**DIT, "rescaling_scale": 2.0}, "rescale"),
]


@pytest.mark.parametrize(("spec", "inputs", "reason"), REFUSED)
def test_edits_without_meaning_are_refused(
    model: ModelLink, spec: NodeSpec, inputs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        edited(spec, model, **inputs)


def test_a_second_skip_layer_guidance_is_refused(model: ModelLink) -> None:
    first = edited(model_edits.skip_layer_guidance_sd3, model, **SD3)
    with pytest.raises(RequestError, match="already"):
        edited(model_edits.skip_layer_guidance_dit, first, **DIT)


# Samplers


def sampler(spec: NodeSpec, **inputs: Any) -> SamplerSpec:
    outputs = spec.run(NOWHERE, **inputs)
    assert isinstance(outputs, tuple)
    (found,) = outputs
    assert isinstance(found, SamplerSpec)
    return found


def walked(spec: SamplerSpec) -> torch.Tensor:
    """A short run with noise that depends on the step alone."""
    x = torch.tensor([0.9, -1.8], dtype=torch.float64)

    def noise(sigma: float, sigma_next: float) -> torch.Tensor:
        return torch.tensor([sigma, sigma_next], dtype=torch.float64)

    return sample(spec(x, [*geometric(0.9, 0.05, 6), 0.0], noise=noise), denoise)


NOISY = {"eta": 0.6, "s_noise": 0.9}
SA = {
    "model": None, "eta": 0.6, "sde_start_percent": 0.1, "sde_end_percent": 0.9, "s_noise": 0.9, "predictor_order": 2,
    "corrector_order": 3, "use_pece": False, "simple_order_2": False,
}  # fmt: skip
OPTIONS: list[tuple[NodeSpec, dict[str, Any], str, dict[str, Any]]] = [
    (samplers.ksampler_select, {"sampler_name": "deis"}, "deis", {}),
    (samplers.sampler_euler_ancestral, NOISY, "euler_ancestral", NOISY),
    (
        samplers.sampler_dpmpp_2m_sde,
        {**NOISY, "solver_type": "midpoint", "noise_device": "cpu"},
        "dpmpp_2m_sde",
        NOISY,
    ),
    (
        samplers.sampler_dpmpp_2m_sde,
        {**NOISY, "solver_type": "heun", "noise_device": "gpu"},
        "dpmpp_2m_sde_heun_gpu",
        NOISY,
    ),
    (samplers.sampler_dpmpp_3m_sde, {**NOISY, "noise_device": "gpu"}, "dpmpp_3m_sde_gpu", NOISY),
    (samplers.sampler_dpmpp_sde, {**NOISY, "r": 0.3, "noise_device": "cpu"}, "dpmpp_sde", {**NOISY, "r": 0.3}),
    (samplers.sampler_lms, {"order": 2}, "lms", {"order": 2}),
    (
        samplers.sampler_er_sde,
        {"solver_type": "ER-SDE", "max_stage": 2, "eta": 0.5, "s_noise": 0.9},
        "er_sde",
        {"order": 2, "s_noise": 0.9},
    ),
    (
        samplers.sampler_er_sde,
        {"solver_type": "Reverse-time SDE", "max_stage": 3, **NOISY},
        "er_sde",
        {"law": "reverse", **NOISY},
    ),
    (
        samplers.sampler_er_sde,
        {"solver_type": "ODE", "max_stage": 3, **NOISY},
        "er_sde",
        {"law": "reverse", "eta": 0.0, "s_noise": 0.0},
    ),
    (
        samplers.sampler_sa_solver,
        SA,
        "sa_solver",
        {**NOISY, "eta_start": 0.1, "eta_end": 0.9, "predictor_order": 2, "corrector_order": 3},
    ),
    (
        samplers.sampler_sa_solver,
        {**SA, "use_pece": True},
        "sa_solver_pece",
        {**NOISY, "eta_start": 0.1, "eta_end": 0.9, "predictor_order": 2, "corrector_order": 3},
    ),
]


@pytest.mark.parametrize(("spec", "inputs", "name", "options"), OPTIONS)
def test_a_sampler_has_the_constants_that_its_node_says(
    spec: NodeSpec, inputs: dict[str, Any], name: str, options: dict[str, Any]
) -> None:
    torch.testing.assert_close(walked(sampler(spec, **inputs)), walked(SAMPLERS[name].with_options(**options)))


def test_the_constants_matter() -> None:
    plain = walked(SAMPLERS["euler_ancestral"])
    assert not torch.allclose(walked(sampler(samplers.sampler_euler_ancestral, **NOISY)), plain)


def test_an_ode_draws_no_noise() -> None:
    inputs = {"solver_type": "ODE", "max_stage": 3, "eta": 1.0, "s_noise": 1.0}
    of_node = sampler(samplers.sampler_er_sde, **inputs)
    torch.testing.assert_close(walked(of_node), walked(of_node.with_options(s_noise=0.0)))


@pytest.mark.parametrize(
    ("spec", "inputs", "reason"),
    [
        (samplers.sampler_lms, {"order": 9}, "orders 1 to 8"),
        (samplers.sampler_dpmpp_sde, {**NOISY, "r": 0.0, "noise_device": "cpu"}, "fraction"),
        (samplers.sampler_dpmpp_sde, {**NOISY, "r": 1.5, "noise_device": "cpu"}, "fraction"),
        (samplers.sampler_sa_solver, {**SA, "corrector_order": 0}, "corrector_order"),
        (samplers.sampler_sa_solver, {**SA, "simple_order_2": True}, "simple_order_2"),
    ],
)
def test_constants_that_a_sampler_does_not_have_are_refused(
    spec: NodeSpec, inputs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        sampler(spec, **inputs)
