"""What `octavo pull` knows by name: published files, where they go in a models tree, and under which licence.

Data only; `hub` fetches. Sizes are those seen when the table was written, for a first impression; the hub's own
size and hash are what a download is held to.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from octavo.errors import RequestError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class License:
    """The terms of some weights, in one line, with the place of the full text."""

    name: str
    terms: str
    url: str
    must_accept: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """One file on the hub and its folder in a models tree."""

    repo: str
    path: str  # inside the repository
    folder: str  # inside the models tree
    bytes: int  # when the table was written
    licenses: tuple[License, ...]
    gated: bool = False  # the hub wants a token of an account that accepted the licence

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What one name stands for."""

    name: str
    about: str
    files: tuple[PublishedFile, ...]
    wants_encoders: bool = False  # of no use without text encoders, which are files of their own

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


STABILITY = License(
    name="Stability AI Community License",
    terms="free for research, private use and businesses with less than USD 1 million of yearly revenue; "
    "others need a licence from Stability AI",
    url="https://stability.ai/community-license-agreement",
    must_accept=True,
)
CLIP_L = License(name="MIT (CLIP-L, OpenAI)", terms="free for any use", url="https://github.com/openai/CLIP")
CLIP_G = License(name="MIT (CLIP-G, LAION)", terms="free for any use", url="https://github.com/mlfoundations/open_clip")
T5 = License(
    name="Apache-2.0 (T5-XXL, Google)",
    terms="free for any use, with its notice",
    url="https://www.apache.org/licenses/LICENSE-2.0",
)


_ALL = (STABILITY, CLIP_L, CLIP_G, T5)


def _stability(
    repo: str, path: str, bytes: int, folder: str = "checkpoints", licenses: tuple[License, ...] = (STABILITY,)
) -> PublishedFile:
    repo = f"stabilityai/{repo}"
    return PublishedFile(repo=repo, path=path, folder=folder, bytes=bytes, licenses=licenses, gated=True)


def _repacked(path: str, bytes: int, folder: str, licenses: tuple[License, ...]) -> PublishedFile:
    repo = "Comfy-Org/stable-diffusion-3.5-fp8"
    return PublishedFile(repo=repo, path=path, folder=folder, bytes=bytes, licenses=licenses)


_CLIPS = (
    _repacked("text_encoders/clip_l.safetensors", 246_144_152, "text_encoders", (CLIP_L,)),
    _repacked("text_encoders/clip_g.safetensors", 1_389_382_176, "text_encoders", (CLIP_G,)),
)
_T5_FP16 = _repacked("text_encoders/t5xxl_fp16.safetensors", 9_787_841_024, "text_encoders", (T5,))
_T5_FP8 = _repacked("text_encoders/t5xxl_fp8_e4m3fn_scaled.safetensors", 5_157_348_688, "text_encoders", (T5,))
_CONTROLNETS = {
    kind: _stability(
        "stable-diffusion-3.5-controlnets", f"sd3.5_large_controlnet_{kind}.safetensors", 8_654_590_644, "controlnet"
    )
    for kind in ("blur", "canny", "depth")
}

RELEASES = {
    release.name: release
    for release in (
        Release(
            name="sd3.5-large",
            about="8.1B, 16 bits: the best pictures",
            files=(_stability("stable-diffusion-3.5-large", "sd3.5_large.safetensors", 16_460_379_262),),
            wants_encoders=True,
        ),
        Release(
            name="sd3.5-large-turbo",
            about="8.1B, 16 bits: pictures in four steps",
            files=(_stability("stable-diffusion-3.5-large-turbo", "sd3.5_large_turbo.safetensors", 16_460_374_454),),
            wants_encoders=True,
        ),
        Release(
            name="sd3.5-medium",
            about="2.5B, 16 bits: for smaller cards",
            files=(_stability("stable-diffusion-3.5-medium", "sd3.5_medium.safetensors", 5_107_104_286),),
            wants_encoders=True,
        ),
        Release(
            name="sd3-medium",
            about="2B, 16 bits: the first SD3",
            files=(_stability("stable-diffusion-3-medium", "sd3_medium.safetensors", 4_340_000_000),),
            wants_encoders=True,
        ),
        Release(
            name="sd3.5-large-fp8",
            about="Large with all text encoders in one file, model and T5 in 8 bits",
            files=(_repacked("sd3.5_large_fp8_scaled.safetensors", 14_934_922_866, "checkpoints", _ALL),),
        ),
        Release(
            name="sd3.5-medium-fp8",
            about="Medium with all text encoders in one file, T5 in 8 bits",
            files=(
                _repacked(
                    "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors",
                    11_638_004_202,
                    "checkpoints",
                    _ALL,
                ),
            ),
        ),
        Release(
            name="sd3-medium-fp8",
            about="SD3 Medium with all text encoders in one file, T5 in 8 bits",
            files=(
                _stability("stable-diffusion-3-medium", "sd3_medium_incl_clips_t5xxlfp8.safetensors", 10_867_168_284),
            ),
        ),
        Release(
            name="text-encoders", about="CLIP-L, CLIP-G and T5-XXL in 16 bits, for every SD3", files=(*_CLIPS, _T5_FP16)
        ),
        Release(name="text-encoders-fp8", about="CLIP-L and CLIP-G in 16 bits, T5-XXL in 8", files=(*_CLIPS, _T5_FP8)),
        Release(name="controlnets", about="all three below, for SD3.5 Large", files=tuple(_CONTROLNETS.values())),
        *(
            Release(name=f"controlnet-{kind}", about=f"SD3.5 Large follows a {kind} picture", files=(file,))
            for kind, file in _CONTROLNETS.items()
        ),
    )
}


def named(names: Iterable[str]) -> list[Release]:
    """The releases of these names, each once, in the order given.

    Raises:
        RequestError: there is no such name.
    """
    found: dict[str, Release] = {}
    for name in names:
        spelled = name.strip().lower().replace("_", "-")
        if spelled not in RELEASES:
            raise RequestError(
                f"'{name}' is not a name that octavo pull knows.{did_you_mean(spelled, RELEASES)} "
                f"Known are {', '.join(RELEASES)}; 'octavo pull --list' shows what they are."
            )
        found[spelled] = RELEASES[spelled]
    return list(found.values())
