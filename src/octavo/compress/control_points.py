"""What a ControlNet is calibrated on: pictures that the steered model draws, their edges, depth or blur, and noise.

For each prompt the model draws a picture without control. Of this picture are made what the net is to follow, and, with
noise of some levels of the schedule mixed in, what it is to follow it on: the inputs that nets are trained with.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.tensors import open_tensors
from octavo.compress.calibrate import Setup
from octavo.compress.control_blocks import ControlStream
from octavo.compress.points import GROUPS, IDENTITY, TOKENS_AT_ONCE, choose_steps
from octavo.compress.progress import Report
from octavo.compress.stages import Batch
from octavo.devices import whole_processor
from octavo.errors import CheckpointError, ModelNotFoundError
from octavo.models import ControlNetConfig
from octavo.pipeline.components import Components
from octavo.pipeline.control_request import ControlImage
from octavo.pipeline.edges import GREY, bell, canny, convolved
from octavo.pipeline.encode import encode
from octavo.pipeline.generate import generate
from octavo.pipeline.hints import encode_hint
from octavo.pipeline.latents import latent_shape, latents_of, pixels_of
from octavo.pipeline.request import GenerateRequest
from octavo.sampling.flow import add_noise
from octavo.sampling.noise import initial_noise

BLUR = 3.0  # pixels, of the bell that control pictures of the kind blur are convolved with


@dataclass(frozen=True, slots=True)
class ControlPoints:
    """P rows that a net is asked: the positive and, where there is guidance, the negative prompt of each point.

    Attributes:
        latents: [P, 16, h, w] float32, on the CPU, as all.
        hints: [P, 16, h, w] float32.
        sigmas: [P] float32.
        groups: [P] int64, the part of the schedule.
        context: [P, L, C], filled up with zeros; L is 0 for nets that read no text.
        lengths: [P] int64, text tokens of each.
        pooled: [P, W].
    """

    latents: Tensor
    hints: Tensor
    sigmas: Tensor
    groups: Tensor
    context: Tensor
    lengths: Tensor
    pooled: Tensor

    @property
    def digest(self) -> str:
        """A hash of all of it, hexadecimal."""
        state = sha256()
        for name in self.__slots__:
            state.update(getattr(self, name).contiguous().view(torch.uint8).numpy().data)
        return state.hexdigest()

    @torch.inference_mode()
    def batches(self, components: Components, device: torch.device, dtype: torch.dtype, *, own: bool) -> list[Batch]:
        """Rows of one part of the schedule and of equal length together, at the beginning of the net.

        Args:
            components: of the steered model.
            device, dtype: of the arithmetic.
            own: whether the net has patches of its own; else the model's are taken.
        """
        mmdit = None if own else components.mmdit()
        height, width = self.latents.shape[-2:]
        size = max(1, TOKENS_AT_ONCE // (height * width // 4 + self.context.shape[1]))
        batches = []
        for group, length in sorted(set(zip(self.groups.tolist(), self.lengths.tolist(), strict=True))):
            alike = (self.groups == group) & (self.lengths == length)
            for rows in alike.nonzero().flatten().split(size):
                latents = self.latents[rows].to(device)
                batch = Batch(
                    latents,
                    self.sigmas[rows].to(device),
                    self.context[rows, :length].to(device, dtype),
                    self.pooled[rows].to(device, dtype),
                    group,
                    hint=self.hints[rows].to(device),
                )
                if mmdit is not None:
                    batch.image = mmdit.embed_image(latents.to(components.dtype)).to(dtype)
                batches.append(batch)
        return batches

    def save(self, path: Path, identity: str) -> None:
        """Write them to `path`, to be read again by whoever asks for the same `identity`."""
        save_safetensors(
            path, {name: getattr(self, name).contiguous() for name in self.__slots__}, {IDENTITY: identity}
        )

    @classmethod
    def read(cls, path: Path, identity: str) -> "ControlPoints | None":
        """What `save` wrote with this identity; None if there is nothing, or something else."""
        try:
            with open_tensors(path) as file:
                if file.metadata.get(IDENTITY) != identity:
                    return None
                return cls(**{name: file.read(name) for name in cls.__slots__})
        except (CheckpointError, ModelNotFoundError):
            return None


def find_control_points(
    stream: ControlStream, components: Components, setup: Setup, *, folder: Path, source: str, report: Report
) -> ControlPoints:
    """The points of a net; what `folder` holds of them is not made again.

    Args:
        stream: of the net.
        components: the model that it steers.
        setup: how that draws.
        source: tells both models' files from others.

    Raises:
        NumericsError: the model gave NaN or infinity.
    """
    said = json.dumps([source, list(setup.prompts), repr(setup.runs), str(stream.device), str(stream.dtype)])
    identity, path = sha256(said.encode()).hexdigest(), folder / "control-points.safetensors"
    points = ControlPoints.read(path, identity)
    if points is None:
        points = _made(stream.config, components, setup, report)
        points.save(path, identity)
    return points


def control_picture(picture: Tensor, config: ControlNetConfig) -> Tensor:
    """What a net is given to follow in calibrations, of a drawn picture [1, 3, H, W] in [0, 1]: the same shape.

    A net that does not say what it follows is given edges. For depth the brightness stands in: it is smooth where depth
    is, and jumps where things end, too.
    """
    if config.control_type == "blur":
        reach = torch.arange(-9.0, 10.0)
        return convolved(picture, bell(reach, BLUR))
    if config.control_type == "depth":
        grey = torch.tensor(GREY).view(1, 3, 1, 1)
        return (picture * grey).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    default = ControlImage(image="-", type="canny")
    return canny(picture, default.low, default.high).expand(-1, 3, -1, -1)


def request_of(setup: Setup, prompt: str, seed: int, controls: Sequence[ControlImage] = ()) -> GenerateRequest:
    """A picture as the steered model draws it best."""
    runs = setup.runs
    return GenerateRequest(
        prompt=prompt,
        width=runs.width,
        height=runs.height,
        steps=runs.steps,
        guidance_scale=runs.guidance_scale,
        sampler=setup.preset.sampler,
        schedule=runs.schedule,
        shift=runs.shift,
        seed=seed,
        skip_layer_guidance=runs.skip_layers,
        controls=tuple(controls),
    )


@torch.inference_mode()
@whole_processor()
def _made(config: ControlNetConfig, components: Components, setup: Setup, report: Report) -> ControlPoints:
    runs, shape = setup.runs, latent_shape(setup.runs.width, setup.runs.height)
    negative = encode(components.text, "") if runs.guidance_scale != 1 else None
    picks = choose_steps(len(setup.prompts), runs.steps, tokens=shape[-2] * shape[-1] // 4)
    rows: dict[str, list[Tensor]] = {name: [] for name in ControlPoints.__slots__}
    for number, (prompt, picked) in enumerate(zip(setup.prompts, picks, strict=True)):
        report("trajectories", number, len(setup.prompts))
        if not picked:
            continue
        image = generate(components, request_of(setup, prompt, runs.seed + number))[0].image
        vae = components.vae()
        clean = latents_of(image, vae, width=runs.width, height=runs.height).float().cpu()
        hint = encode_hint(vae, control_picture((pixels_of(image) + 1) / 2, config), config).cpu()
        told = [each for each in (encode(components.text, prompt), negative) if each is not None]
        for step in sorted(picked):
            sigma = runs.sigmas[step]
            noise = initial_noise(shape, runs.seed + number * runs.steps + step)
            for each in told:
                rows["latents"].append(add_noise(clean, noise, sigma))
                rows["hints"].append(hint)
                rows["sigmas"].append(torch.tensor([sigma], dtype=torch.float32))
                rows["groups"].append(torch.tensor([step * GROUPS // runs.steps]))
                rows["context"].append(each.context.cpu() if config.joint else each.context[:, :0].cpu())
                rows["lengths"].append(torch.tensor([rows["context"][-1].shape[1]]))
                rows["pooled"].append(each.pooled.cpu())
    report("trajectories", len(setup.prompts), len(setup.prompts))
    longest = max(context.shape[1] for context in rows["context"])
    rows["context"] = [F.pad(context, (0, 0, 0, longest - context.shape[1])) for context in rows["context"]]
    return ControlPoints(**{name: torch.cat(parts) for name, parts in rows.items()})
