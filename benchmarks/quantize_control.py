"""How near an FP8 ControlNet comes to the 16-bit one, by recipe: velocities and pictures of the embedded model.

The net is the embedded one in 16 bits, as its training leaves it beside the FP8 file (`octavo train controlnet`); each
recipe makes a file of it. Asked are drawings that neither training nor calibration saw: at three noise levels of each,
the relative error of the velocity that the steered model gives (root mean square, against the 16-bit net's), and of
what the net adds to it; and PSNR of whole pictures of the same seed. Inputs are rounded as GPUs do (`plain-w8a8`).

    python -m benchmarks.quantize_control runs/controlnet/octavo-demo-canny-fp16.safetensors
    python -m benchmarks.quantize_control NET --recipes row best --count 16
"""

import argparse
import random
import tempfile
from pathlib import Path
from statistics import mean

import torch
from PIL import Image
from torch import Tensor

import octavo
from benchmarks.common import report
from octavo import GenerateRequest
from octavo.checkpoint.folders import EMBEDDED, Folders
from octavo.compress import gate
from octavo.compress.job import quantize_checkpoint
from octavo.compress.settings import QuantizeSettings
from octavo.errors import RequestError
from octavo.models.controlnet import ControlNet, spread
from octavo.pipeline.components import Arithmetic, Components
from octavo.pipeline.control_request import ControlImage
from octavo.pipeline.controlnets import ControlNets, config_of, control_pixels
from octavo.pipeline.encode import encode
from octavo.pipeline.hints import encode_hint
from octavo.pipeline.latents import latents_of
from octavo.quantize import load_recipe
from octavo.sampling.flow import add_noise, timestep
from octavo.sampling.noise import initial_noise
from octavo.train.controlnet import lesson_scene, unshaped
from octavo.train.drawing import draw, to_bytes

RECIPES = ("cast", "tensor", "row", "comfy", "static", "best")
SIGMAS = (0.9, 0.6, 0.3)


def main() -> None:
    arguments = _arguments()
    components = octavo.load(device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = _pictures(folder, arguments.count)
        exact = _answers(components, arguments.net, asked, backend=None)
        without = _answers(components, None, asked, backend=None)
        for recipe in arguments.recipes:
            out = folder / f"{recipe}.safetensors"
            form = "comfyui" if recipe in ("cast", "tensor", "comfy") else "octavo"
            settings = QuantizeSettings(recipe=recipe, form=form, gate=0, device="cpu", dtype="float32")  # type: ignore[arg-type]
            quantize_checkpoint(arguments.net, out, settings)
            found = _answers(components, out, asked, backend=gate.ARITHMETIC)
            conditions = {
                "recipe": load_recipe(recipe).name,
                "form": form,
                "bytes": out.stat().st_size,
                "of_bytes": arguments.net.stat().st_size,
                "pictures": arguments.count,
                "arithmetic": gate.ARITHMETIC,
            }
            velocity = _norm(found[0] - exact[0]) / _norm(exact[0])
            added = _norm(found[0] - exact[0]) / _norm(exact[0] - without[0])
            report("controlnet_velocity_error", "relative", velocity, of_what_it_adds=added, **conditions)
            decibels = gate.compare(exact[1], found[1])
            report("controlnet_pictures", "dB", mean(decibels), lowest=min(decibels), **conditions)


def _pictures(folder: Path, count: int) -> list[tuple[str, Path]]:
    """Prompts of colours alone, each with a drawing whose edges are to be followed."""
    rng = random.Random("examination of quantized nets")
    scenes = [lesson_scene(rng) for _ in range(count)]
    asked = []
    for i, pixels in enumerate(to_bytes(draw(scenes, 128))):
        place = folder / f"{i}.png"
        Image.fromarray(pixels).save(place)
        asked.append((unshaped(scenes[i]), place))
    return asked


def _answers(
    components: Components, net: Path | None, asked: list[tuple[str, Path]], *, backend: str | None
) -> tuple[Tensor, list[Image.Image]]:
    """Velocities of all drawings at all levels, and what is drawn."""
    arithmetic = Arithmetic(backend=backend)
    nets = ControlNets(Folders.standard(EMBEDDED), components.device, components.dtype, arithmetic)
    components.controlnets = nets
    velocities, drawn = [], []
    for i, (prompt, place) in enumerate(asked):
        told = () if net is None else (ControlImage(image=str(place), model=str(net.absolute()), preprocess="canny"),)
        request = GenerateRequest(prompt=prompt, seed=i, controls=told)
        drawn.append(octavo.generate(components, request)[0].image)
        for sigma in SIGMAS:
            velocities.append(_velocity(components, nets, net, place, prompt, sigma, i))
    return torch.cat(velocities), drawn


@torch.inference_mode()
def _velocity(
    components: Components, nets: ControlNets, path: Path | None, place: Path, prompt: str, sigma: float, seed: int
) -> Tensor:
    vae, mmdit = components.vae(), components.mmdit()
    clean = latents_of(Image.open(place), vae, width=128, height=128)
    x = add_noise(clean, initial_noise((1, 16, 16, 16), seed), sigma)
    told, time = encode(components.text, prompt), timestep(torch.tensor([sigma]))
    control: list[Tensor | None] = []
    if path is not None:
        part = nets.part(str(path.absolute()))
        net: ControlNet = part()
        wish = ControlImage(image=str(place), type="canny", preprocess="canny")
        hint = encode_hint(vae, control_pixels(wish, (128, 128)), config_of(part))
        added = net(x, hint, told.context, net.modulation(time, told.pooled), embed=mmdit.embed_image)
        control = spread(added, mmdit.config.depth, last=net.config.last)
    velocity: Tensor = mmdit(x, told.context, mmdit.modulation(time, told.pooled), control=control)
    return velocity


def _norm(x: Tensor) -> float:
    return float(x.double().norm())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How near an FP8 ControlNet comes to the 16-bit one.")
    parser.add_argument("net", type=Path, help="the embedded ControlNet in 16 bits")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--count", type=int, default=32, help="pictures")
    arguments = parser.parse_args()
    if not arguments.net.is_file():
        raise RequestError(f"'{arguments.net}' is not there: 'octavo train controlnet' makes it.")
    return arguments


if __name__ == "__main__":
    main()
