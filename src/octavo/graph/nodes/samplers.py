"""Nodes that name a sampler, some with constants of its own.

`noise_device` of the SDE samplers changes nothing: Octavo draws all noise on the CPU, so that a seed gives one picture
on every machine.
"""

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes.types import ModelLink
from octavo.graph.spec import BOOLEAN, COMBO, FLOAT, INT, LINK, NodeSpec, node
from octavo.sampling import SAMPLERS, SamplerSpec, get_sampler
from octavo.sampling.protocol import check_order

_MODULE = "comfy_extras.nodes_custom_sampler"
_CATEGORY = "sampling/custom_sampling/samplers"
_ETA = FLOAT(1.0, min=0.0, max=100.0, step=0.01, round=False)
_S_NOISE = FLOAT(1.0, min=0.0, max=100.0, step=0.01, round=False)
_NOISE_DEVICE = COMBO(("gpu", "cpu"))


@node(
    "KSamplerSelect",
    module=_MODULE,
    category=_CATEGORY,
    description="A sampler by name.",
    inputs={"sampler_name": COMBO(tuple(SAMPLERS))},
    outputs=("SAMPLER",),
)
def ksampler_select(_context: Context, sampler_name: str) -> tuple[SamplerSpec]:
    """With the constants it usually has."""
    return (get_sampler(sampler_name),)


@node(
    "SamplerEulerAncestral",
    module=_MODULE,
    category=_CATEGORY,
    description="euler_ancestral: eta is the share of fresh noise, s_noise a factor on it.",
    inputs={"eta": _ETA, "s_noise": _S_NOISE},
    outputs=("SAMPLER",),
)
def sampler_euler_ancestral(_context: Context, eta: float, s_noise: float) -> tuple[SamplerSpec]:
    """See `sampling.ancestral.euler_ancestral`."""
    return (get_sampler("euler_ancestral").with_options(eta=eta, s_noise=s_noise),)


@node(
    "SamplerDPMPP_2M_SDE",
    module=_MODULE,
    category=_CATEGORY,
    description="dpmpp_2m_sde, or with heun dpmpp_2m_sde_heun.",
    inputs={
        "solver_type": COMBO(("midpoint", "heun")),
        "eta": _ETA,
        "s_noise": _S_NOISE,
        "noise_device": _NOISE_DEVICE,
    },
    outputs=("SAMPLER",),
)
def sampler_dpmpp_2m_sde(
    _context: Context, solver_type: str, eta: float, s_noise: float, noise_device: str
) -> tuple[SamplerSpec]:
    """See `sampling.sde.dpmpp_2m_sde`."""
    sampler = _drawing("dpmpp_2m_sde_heun" if solver_type == "heun" else "dpmpp_2m_sde", noise_device)
    return (sampler.with_options(eta=eta, s_noise=s_noise),)


@node(
    "SamplerDPMPP_3M_SDE",
    module=_MODULE,
    category=_CATEGORY,
    description="dpmpp_3m_sde.",
    inputs={"eta": _ETA, "s_noise": _S_NOISE, "noise_device": _NOISE_DEVICE},
    outputs=("SAMPLER",),
)
def sampler_dpmpp_3m_sde(_context: Context, eta: float, s_noise: float, noise_device: str) -> tuple[SamplerSpec]:
    """See `sampling.sde.dpmpp_3m_sde`."""
    return (_drawing("dpmpp_3m_sde", noise_device).with_options(eta=eta, s_noise=s_noise),)


@node(
    "SamplerDPMPP_SDE",
    module=_MODULE,
    category=_CATEGORY,
    description="dpmpp_sde: r is where in the step the model is asked a second time.",
    inputs={
        "eta": _ETA,
        "s_noise": _S_NOISE,
        "r": FLOAT(0.5, min=0.0, max=100.0, step=0.01, round=False),
        "noise_device": _NOISE_DEVICE,
    },
    outputs=("SAMPLER",),
)
def sampler_dpmpp_sde(_context: Context, eta: float, s_noise: float, r: float, noise_device: str) -> tuple[SamplerSpec]:
    """See `sampling.sde.dpmpp_sde`.

    Raises:
        RequestError: the second question would not lie within the step.
    """
    if not 0 < r <= 1:
        raise RequestError(f"r {r}: need a fraction of the step, above 0 and at most 1.")
    return (_drawing("dpmpp_sde", noise_device).with_options(eta=eta, s_noise=s_noise, r=r),)


@node(
    "SamplerLMS",
    module=_MODULE,
    category=_CATEGORY,
    description="lms: order is how many steps are remembered, at most 8.",
    inputs={"order": INT(4, min=1, max=100)},
    outputs=("SAMPLER",),
)
def sampler_lms(_context: Context, order: int) -> tuple[SamplerSpec]:
    """See `sampling.multistep.lms`.

    Raises:
        RequestError: more steps than polynomials can be passed through without harm.
    """
    check_order(order, most=8)
    return (get_sampler("lms").with_options(order=order),)


@node(
    "SamplerER_SDE",
    module=_MODULE,
    category=_CATEGORY,
    description="er_sde, up to the order max_stage. The reverse-time SDE renews eta of the noise, the ODE none; ER-SDE "
    "follows a law of its own.",
    inputs={
        "solver_type": COMBO(("ER-SDE", "Reverse-time SDE", "ODE")),
        "max_stage": INT(3, min=1, max=3),
        "eta": FLOAT(1.0, min=0.0, max=100.0, step=0.01, round=False, tooltip="For the reverse-time SDE only."),
        "s_noise": _S_NOISE,
    },
    outputs=("SAMPLER",),
)
def sampler_er_sde(
    _context: Context, solver_type: str, max_stage: int, eta: float, s_noise: float
) -> tuple[SamplerSpec]:
    """See `sampling.er_sde`."""
    law = {"ER-SDE": "extended", "Reverse-time SDE": "reverse", "ODE": "reverse"}[solver_type]
    renewed = 0.0 if solver_type == "ODE" else eta
    return (get_sampler("er_sde").with_options(order=max_stage, law=law, eta=renewed, s_noise=s_noise),)


@node(
    "SamplerSASolver",
    module=_MODULE,
    category=_CATEGORY,
    description="sa_solver: eta is the share of noise that is renewed between the percents. It corrects every step, by "
    "exact coefficients.",
    inputs={
        "model": LINK("MODEL"),
        "eta": FLOAT(1.0, min=0.0, max=10.0, step=0.01, round=False),
        "sde_start_percent": FLOAT(0.2, min=0.0, max=1.0, step=0.001),
        "sde_end_percent": FLOAT(0.8, min=0.0, max=1.0, step=0.001),
        "s_noise": _S_NOISE,
        "predictor_order": INT(3, min=1, max=6),
        "corrector_order": INT(4, min=0, max=6),
        "use_pece": BOOLEAN(),
        "simple_order_2": BOOLEAN(),
    },
    outputs=("SAMPLER",),
)
def sampler_sa_solver(
    _context: Context,
    model: ModelLink,
    eta: float,
    sde_start_percent: float,
    sde_end_percent: float,
    s_noise: float,
    predictor_order: int,
    corrector_order: int,
    use_pece: bool,
    simple_order_2: bool,
) -> tuple[SamplerSpec]:
    """See `sampling.sa_solver`. The percents are of the schedule of the model that is sampled from.

    Raises:
        RequestError: a way of solving that Octavo's sa_solver does not have.
    """
    del model  # its shift is that of the run
    if corrector_order == 0:
        raise RequestError(
            "corrector_order 0 leaves out the correction, which sa_solver always makes here; use 1 to 6."
        )
    if simple_order_2:
        raise RequestError("simple_order_2 approximates coefficients that are exact here; set it to false.")
    sampler = get_sampler("sa_solver_pece" if use_pece else "sa_solver")
    return (
        sampler.with_options(
            eta=eta,
            eta_start=sde_start_percent,
            eta_end=sde_end_percent,
            s_noise=s_noise,
            predictor_order=predictor_order,
            corrector_order=corrector_order,
        ),
    )


def _drawing(name: str, noise_device: str) -> SamplerSpec:
    """The sampler by the name that says where it draws; see the head of the module."""
    return get_sampler(f"{name}_gpu" if noise_device == "gpu" else name)


NODES: tuple[NodeSpec, ...] = (
    ksampler_select,
    sampler_euler_ancestral,
    sampler_dpmpp_2m_sde,
    sampler_dpmpp_3m_sde,
    sampler_dpmpp_sde,
    sampler_lms,
    sampler_er_sde,
    sampler_sa_solver,
)
