"""Train the embedded model's Canny ControlNet: edges in, residuals for the frozen MMDiT out.

What to follow is drawn here: things anywhere, of any size, letters among them, so that the net cannot guess from what
the model knows of shapes and places. Most captions name colours alone, so that only the edges tell the shape. Edges are
found in the drawing, as a user's are in a photo.

Source: Zhang et al. 2023 (arXiv 2302.05543): the net begins as a part of the model it steers, its outputs as zeros.
"""

from __future__ import annotations

import json
import math
import random
import string
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from octavo.checkpoint.layout import pieces_in
from octavo.checkpoint.save import save_safetensors
from octavo.models import MMDiT, MMDiTConfig
from octavo.models.controlnet import ControlNet, ControlNetConfig, ImageBlock, spread
from octavo.models.mmdit import JointBlock
from octavo.pipeline.components import Components
from octavo.pipeline.decode import encode_image
from octavo.pipeline.edges import GREY, canny
from octavo.pipeline.encode import encode
from octavo.pipeline.hints import encode_hint
from octavo.sampling.flow import shift_sigma
from octavo.train.captions import caption
from octavo.train.demo import short_attention
from octavo.train.drawing import draw
from octavo.train.export import fp8_tensors
from octavo.train.loop import Budget, Progress, Report, train
from octavo.train.optimizer import OptimizerSettings
from octavo.train.scenes import MORE_COLOURS, MORE_SHAPES, PALETTE, Scene, Thing

NAME = "octavo-demo-canny"
LOW, HIGH = 0.4, 0.8  # thresholds of Canny's edges, as the node has them
CONTRAST = 0.4  # of brightness, least that a thing has: what is fainter has no edge at these thresholds


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlRecipe:
    """How the embedded ControlNet is trained; the defaults are those of the one in the package."""

    mlp_ratio: int = 2  # half of the MMDiT's: 0.7 MB in FP8
    pictures: int = 4096  # drawn and encoded once
    size: int = 128  # pixels a side
    batch: int = 32
    shift: float = 3.0  # of the noise levels, as the model's
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)


@dataclass(frozen=True, slots=True)
class Lessons:
    """N pictures, their edges and what is said of them."""

    latents: Tensor  # [N, 16, h, w] as the MMDiT sees them
    hints: Tensor  # [2, N, 16, h, w] of the edges: in the released nets' numbers, and in ComfyUI's
    context: Tensor  # [N, L, C]
    pooled: Tensor  # [N, P]


def lesson_scene(rng: random.Random) -> Scene:
    """One thing, or two apart from each other, anywhere in the picture, bright on dark or dark on bright."""
    count = rng.choice((1, 1, 2))
    while True:
        background, *colours = rng.sample(MORE_COLOURS, 1 + count)
        if min(abs(_brightness(background) - _brightness(colour)) for colour in colours) >= CONTRAST:
            break
    while True:
        things = []
        for colour in colours:
            radius = rng.uniform(0.12, 0.38 if count == 1 else 0.22)
            x, y = (rng.uniform(radius, 1 - radius) for _ in range(2))
            shape = rng.choice(MORE_SHAPES if rng.random() < 0.7 else string.ascii_uppercase)
            things.append(Thing(shape, colour, x, y, radius))
        if count == 1 or _apart(*things):
            return Scene("single" if count == 1 else "pair", tuple(things), background)


def _brightness(colour: str) -> float:
    return sum(weight * level / 255 for weight, level in zip(GREY, PALETTE[colour], strict=True))


def _apart(a: Thing, b: Thing) -> bool:
    return math.hypot(a.x - b.x, a.y - b.y) > 1.1 * (a.radius + b.radius)


def lesson_caption(scene: Scene, rng: random.Random) -> str:
    """What is said of it: mostly nothing of shapes, sometimes nothing at all."""
    chance = rng.random()
    if chance < 0.12:
        return ""
    if chance < 0.6 or scene.kind == "pair" or scene.things[0].shape not in MORE_SHAPES:
        return unshaped(scene)
    return caption(scene, rng)


def unshaped(scene: Scene) -> str:
    """A caption of its colours alone."""
    return f"{' and '.join(thing.colour for thing in scene.things)} on a {scene.background} background"


def make_lessons(components: Components, folder: Path, recipe: ControlRecipe, report: Report = print) -> Lessons:
    """The lessons of a run, from its folder or newly made there."""
    path = folder / f"lessons-{recipe.pictures}-{recipe.size}.safetensors"
    if not path.exists():
        report(f"drawing and encoding {recipe.pictures} pictures …")
        folder.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode():
            save_file(_lessons(components, recipe), path)
    return Lessons(**load_file(path))


def _lessons(components: Components, recipe: ControlRecipe) -> dict[str, Tensor]:
    rng = random.Random("canny lessons")
    vae, config = components.vae(), control_config(_config_of(components), recipe)
    made: dict[str, list[Tensor]] = {"latents": [], "hints": [], "context": [], "pooled": []}
    for first in range(0, recipe.pictures, 32):
        scenes = [lesson_scene(rng) for _ in range(min(32, recipe.pictures - first))]
        pixels = draw(scenes, recipe.size)
        edges = edges_of(pixels)
        made["latents"].append(encode_image(vae, pixels).bfloat16())
        both = [encode_hint(vae, edges, config, comfyui=comfyui).bfloat16() for comfyui in (False, True)]
        made["hints"].append(torch.stack(both))
        for scene in scenes:
            said = encode(components.text, lesson_caption(scene, rng), 2)
            made["context"].append(said.context.bfloat16())
            made["pooled"].append(said.pooled.bfloat16())
    return {name: torch.cat(parts, dim=1 if name == "hints" else 0) for name, parts in made.items()}


def edges_of(pixels: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] → their edges, likewise in [0, 1]."""
    return canny((pixels + 1) / 2, LOW, HIGH).expand(-1, 3, -1, -1)


def control_config(mmdit: MMDiTConfig, recipe: ControlRecipe) -> ControlNetConfig:
    """One block of the MMDiT's width, of the kind released for SD3.5 Large."""
    return ControlNetConfig(
        depth=1,
        width=mmdit.width,
        heads=mmdit.heads,
        qk_norm=mmdit.qk_norm,
        mlp_ratio=recipe.mlp_ratio,
        patch_size=mmdit.patch_size,
        context_width=0,
        pooled_width=mmdit.pooled_width,
        control_type="canny",
    )


def _config_of(components: Components) -> MMDiTConfig:
    config = components.mmdit.config
    assert isinstance(config, MMDiTConfig)
    return config


class Steered(nn.Module):
    """A ControlNet, to be trained, and a frozen copy of the MMDiT that follows it, in bfloat16."""

    def __init__(self, mmdit: MMDiT, recipe: ControlRecipe) -> None:
        super().__init__()
        # In a list, so that it is no part of what is trained and kept.
        self._frozen = [deepcopy(mmdit).bfloat16().requires_grad_(False)]
        self.net = ControlNet(control_config(mmdit.config, recipe))
        begin_like(self.net, mmdit)

    def forward(self, latents: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor, hint: Tensor) -> Tensor:
        """Velocity [B, 16, h, w] at noisy `latents` of level `sigma` [B], following `hint`, latents of edges."""
        (mmdit,) = self._frozen
        timestep = 1000 * sigma
        told = self.net.modulation(timestep, pooled)
        residuals = self.net(latents, hint, context, told, embed=mmdit.embed_image)
        steered = spread(residuals, mmdit.config.depth, last=self.net.config.last)
        velocity: Tensor = mmdit(latents, context, mmdit.modulation(timestep, pooled), control=steered)
        return velocity


@torch.no_grad()
def begin_like(net: ControlNet, mmdit: MMDiT) -> None:
    """First weights: the MMDiT's own as far as they fit, outputs zero, so that at first nothing is steered."""
    net.t_embedder.load_state_dict(mmdit.t_embedder.state_dict())
    net.y_embedder.load_state_dict(mmdit.y_embedder.state_dict())
    for i, block in enumerate(net.blocks):
        assert isinstance(block, ImageBlock)
        joint = mmdit.joint_blocks[i]
        assert isinstance(joint, JointBlock)
        for name, weight in block.named_parameters():
            theirs = joint.x_block.get_parameter(name)
            weight.copy_(theirs[tuple(slice(side) for side in weight.shape)])  # a narrower MLP: its first channels
    for output in net.outputs:
        nn.init.zeros_(output.weight)
        output.bias.zero_()
    nn.init.normal_(net.control_embedder.proj.weight, std=0.05)
    if net.control_embedder.proj.bias is not None:
        nn.init.zeros_(net.control_embedder.proj.bias)


def train_controlnet(
    components: Components,
    folder: Path,
    *,
    budget: Budget,
    recipe: ControlRecipe,
    seed: int = 0,
    report: Report = print,
) -> tuple[ControlNet, Progress]:
    """Train, or go on where the folder stands; the net has its averaged weights at the end."""
    lessons = make_lessons(components, folder, recipe, report)
    torch.manual_seed(seed)
    model = Steered(components.mmdit(), recipe)
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2 and ("blocks" in name or "outputs" in name)}

    def loss_of_step(step: int) -> Tensor:
        return control_loss(model, lessons, random.Random(f"{seed} {step}"), recipe)

    progress = train(
        model,
        loss_of_step,
        matrices=matrices,
        settings=recipe.optimizer,
        budget=budget,
        folder=folder,
        phase="canny",
        report=report,
    )
    return model.net, progress


def control_loss(model: Steered, lessons: Lessons, rng: random.Random, recipe: ControlRecipe) -> Tensor:
    """Mean squared error of the velocity, as the embedded model was trained; in bfloat16."""
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    rows = torch.randint(len(lessons.latents), (recipe.batch,), generator=generator)
    clean = lessons.latents[rows].float()
    noise = torch.randn(clean.shape, generator=generator)
    sigma = shift_sigma(torch.sigmoid(torch.randn(recipe.batch, generator=generator)), recipe.shift)
    level = sigma[:, None, None, None]
    noisy = clean * (1 - level) + noise * level
    comfyui = (torch.rand(recipe.batch, generator=generator) < 0.25).long()
    low = {name: parameter.bfloat16() for name, parameter in model.named_parameters()}
    inputs = (noisy.bfloat16(), sigma, lessons.context[rows], lessons.pooled[rows], lessons.hints[comfyui, rows])
    with short_attention("cpu"):
        velocity = functional_call(model, low, inputs)
    loss: Tensor = ((velocity.float() - (noise - clean)) ** 2).mean()
    return loss


def export_controlnet(net: ControlNet, path: Path, *, fp8: bool = True) -> Path:
    """Write it as a file for use, named as the released ControlNets' tensors are.

    Args:
        fp8: its linears in FP8; else all of it in float16, as `octavo quantize` takes it.
    """
    tensors = {"control_type": torch.tensor([1])}
    kept = fp8_tensors(net, "") if fp8 else {name: tensor.half() for name, tensor in net.state_dict().items()}
    for name, tensor in kept.items():
        module, _, ending = name.rpartition(".")
        (piece,) = pieces_in("controlnet", "single-file", f"{module}.weight")
        tensors[f"{piece.name.removesuffix('.weight')}.{ending}"] = tensor
    about = {
        "octavo.domain": "Makes the embedded model follow the edges of a picture.",
        "octavo.canny": json.dumps({"low": LOW, "high": HIGH}),
        "license": "Apache-2.0",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(path, tensors, about)
    return path
