"""The table of samplers: every algorithm by ComfyUI's name for it, with what a caller must know before it starts.

Names that end in `_gpu` are the same samplers: Octavo draws all noise on the CPU, so that a seed gives one picture.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from octavo.sampling import ancestral, cfg_pp, multistep, sde, singlestep
from octavo.sampling.er_sde import er_sde
from octavo.sampling.names import SAMPLER_ALIASES, look_up
from octavo.sampling.protocol import SamplerSpec
from octavo.sampling.sa_solver import sa_solver
from octavo.sampling.unipc import uni_pc

_ADAMS = "Hairer, Nørsett, Wanner, Solving Ordinary Differential Equations I"
_ANCESTRAL = "Song et al. 2021, arXiv 2011.13456; Katherine Crowson's k-diffusion"
_CFG_PP = "Chung et al. 2024, arXiv 2406.08070"
_DDIM = "Song et al. 2021, arXiv 2010.02502"
_DDPM = "Ho et al. 2020, arXiv 2006.11239"
_DEIS = "Zhang and Chen 2022, arXiv 2204.13902"
_DPM_SOLVER = "Lu et al. 2022, arXiv 2206.00927"
_DPM_SOLVER_PP = "Lu et al. 2022, arXiv 2211.01095"
_ER_SDE = "Cui et al. 2023, arXiv 2309.06169"
_GRADIENT = "Permenter and Yuan 2023, arXiv 2306.04848"
_HEUN_PP = "no paper; after Karras et al. 2022, arXiv 2206.00364"
_IPNDM_V = "Zhou et al. 2023, arXiv 2312.00094"
_KARRAS = "Karras et al. 2022, arXiv 2206.00364"
_LCM = "Luo et al. 2023, arXiv 2310.04378"
_RES = "Zhang et al. 2023, arXiv 2308.02157"
_SA_SOLVER = "Xue et al. 2023, arXiv 2309.05019"
_SEEDS = "Gonzalez et al. 2023, arXiv 2305.14267"
_UNI_PC = "Zhao et al. 2023, arXiv 2302.04867"

_SPECS = (
    SamplerSpec(name="euler", steps=singlestep.euler, paper=_KARRAS),
    SamplerSpec(name="euler_cfg_pp", steps=cfg_pp.euler_cfg_pp, paper=_CFG_PP, needs_uncond=True),
    SamplerSpec(name="euler_ancestral", steps=ancestral.euler_ancestral, paper=_ANCESTRAL, stochastic="default"),
    SamplerSpec(
        name="euler_ancestral_cfg_pp",
        steps=cfg_pp.euler_ancestral_cfg_pp,
        paper=_CFG_PP,
        stochastic="default",
        needs_uncond=True,
    ),
    SamplerSpec(name="heun", steps=singlestep.heun, paper=_KARRAS),
    SamplerSpec(name="heunpp2", steps=singlestep.heunpp2, paper=_HEUN_PP),
    SamplerSpec(name="exp_heun_2_x0", steps=sde.exp_heun_2_x0, paper=_SEEDS, needs_shift=True),
    SamplerSpec(
        name="exp_heun_2_x0_sde",
        steps=sde.seeds_2,
        paper=_SEEDS,
        stochastic="default",
        needs_shift=True,
        options={"r": 1.0, "rule": "exact"},
    ),
    SamplerSpec(name="dpm_2", steps=singlestep.dpm_2, paper=_KARRAS, discard_penultimate=True),
    SamplerSpec(
        name="dpm_2_ancestral",
        steps=ancestral.dpm_2_ancestral,
        paper=_ANCESTRAL,
        stochastic="default",
        discard_penultimate=True,
    ),
    SamplerSpec(name="lms", steps=multistep.lms, paper=_ADAMS),
    SamplerSpec(name="dpm_fast", steps=singlestep.dpm_fast, paper=_DPM_SOLVER),
    SamplerSpec(name="dpm_adaptive", steps=singlestep.dpm_adaptive, paper=_DPM_SOLVER, adaptive=True),
    SamplerSpec(
        name="dpmpp_2s_ancestral", steps=ancestral.dpmpp_2s_ancestral, paper=_DPM_SOLVER_PP, stochastic="default"
    ),
    SamplerSpec(
        name="dpmpp_2s_ancestral_cfg_pp",
        steps=cfg_pp.dpmpp_2s_ancestral_cfg_pp,
        paper=_CFG_PP,
        stochastic="default",
        needs_uncond=True,
    ),
    SamplerSpec(name="dpmpp_sde", steps=sde.dpmpp_sde, paper=_DPM_SOLVER_PP, stochastic="brownian", needs_shift=True),
    SamplerSpec(name="dpmpp_2m", steps=multistep.dpmpp_2m, paper=_DPM_SOLVER_PP),
    SamplerSpec(name="dpmpp_2m_cfg_pp", steps=cfg_pp.dpmpp_2m_cfg_pp, paper=_CFG_PP, needs_uncond=True),
    SamplerSpec(
        name="dpmpp_2m_sde", steps=sde.dpmpp_2m_sde, paper=_DPM_SOLVER_PP, stochastic="brownian", needs_shift=True
    ),
    SamplerSpec(
        name="dpmpp_2m_sde_heun",
        steps=sde.dpmpp_2m_sde,
        paper=_DPM_SOLVER_PP,
        stochastic="brownian",
        needs_shift=True,
        options={"rule": "exact"},
    ),
    SamplerSpec(
        name="dpmpp_3m_sde", steps=sde.dpmpp_3m_sde, paper=_DPM_SOLVER_PP, stochastic="brownian", needs_shift=True
    ),
    SamplerSpec(name="ddpm", steps=ancestral.ddpm, paper=_DDPM, stochastic="default"),
    SamplerSpec(name="lcm", steps=ancestral.lcm, paper=_LCM, stochastic="default"),
    SamplerSpec(name="ipndm", steps=multistep.ipndm, paper=_DEIS),
    SamplerSpec(name="ipndm_v", steps=multistep.ipndm_v, paper=_IPNDM_V),
    SamplerSpec(name="deis", steps=multistep.deis, paper=_DEIS),
    SamplerSpec(name="res_multistep", steps=multistep.res_multistep, paper=_RES),
    SamplerSpec(name="res_multistep_cfg_pp", steps=cfg_pp.res_multistep_cfg_pp, paper=_CFG_PP, needs_uncond=True),
    SamplerSpec(
        name="res_multistep_ancestral", steps=ancestral.res_multistep_ancestral, paper=_RES, stochastic="default"
    ),
    SamplerSpec(
        name="res_multistep_ancestral_cfg_pp",
        steps=cfg_pp.res_multistep_ancestral_cfg_pp,
        paper=_CFG_PP,
        stochastic="default",
        needs_uncond=True,
    ),
    SamplerSpec(name="gradient_estimation", steps=multistep.gradient_estimation, paper=_GRADIENT),
    SamplerSpec(
        name="gradient_estimation_cfg_pp", steps=cfg_pp.gradient_estimation_cfg_pp, paper=_CFG_PP, needs_uncond=True
    ),
    SamplerSpec(name="er_sde", steps=er_sde, paper=_ER_SDE, stochastic="default", needs_shift=True),
    SamplerSpec(name="seeds_2", steps=sde.seeds_2, paper=_SEEDS, stochastic="default", needs_shift=True),
    SamplerSpec(name="seeds_3", steps=sde.seeds_3, paper=_SEEDS, stochastic="default", needs_shift=True),
    SamplerSpec(name="sa_solver", steps=sa_solver, paper=_SA_SOLVER, stochastic="default", needs_shift=True),
    SamplerSpec(
        name="sa_solver_pece",
        steps=sa_solver,
        paper=_SA_SOLVER,
        stochastic="default",
        needs_shift=True,
        options={"evaluate_again": True},
    ),
    SamplerSpec(name="ddim", steps=singlestep.euler, paper=_DDIM),
    SamplerSpec(name="uni_pc", steps=uni_pc, paper=_UNI_PC, discard_penultimate=True),
    SamplerSpec(name="uni_pc_bh2", steps=uni_pc, paper=_UNI_PC, discard_penultimate=True, options={"variant": "bh2"}),
)
_GPU_NAMES = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")

SAMPLERS: Mapping[str, SamplerSpec] = MappingProxyType(
    {
        each.name: each
        for spec in _SPECS
        for each in (spec, *([replace(spec, name=f"{spec.name}_gpu")] if spec.name in _GPU_NAMES else []))
    }
)
"""All samplers by name, in ComfyUI's order."""


def get_sampler(name: str) -> SamplerSpec:
    """The sampler that `name` stands for, in ComfyUI's spelling or another program's ("DPM++ 2M", "Euler a").

    Raises:
        RequestError: no such sampler.
    """
    return look_up("sampler", name, SAMPLERS, SAMPLER_ALIASES)
