"""Teach the embedded model a word it does not know. `python examples/teach_a_word.py` writes flowers/ and flower.png.

Ten seconds on one core; `docs/lora.md` says how much is learned.
"""

from itertools import product
from pathlib import Path

from PIL import Image

from octavo import GenerateRequest, Lora, generate, load
from octavo.train.drawing import draw, to_bytes
from octavo.train.lora import LoraRecipe, train_lora
from octavo.train.scenes import Scene, single_thing

# 30 pictures with their captions
folder = Path("flowers")
folder.mkdir(exist_ok=True)
pairs = list(
    product(("red", "blue", "yellow", "white", "black", "pink"), ("green", "purple", "gray", "orange", "brown"))
)
for i, (colour, background) in enumerate(pairs):
    scene = Scene("single", (single_thing("flower", colour, "center", "large"),), background)
    Image.fromarray(to_bytes(draw([scene], 128))[0]).save(folder / f"{i:02}.png")
    (folder / f"{i:02}.txt").write_text(f"a {colour} flower on a {background} background")

components = load()
lora = train_lora(components, folder, Path("flower.safetensors"), recipe=LoraRecipe(steps=120, batch=6))

request = GenerateRequest(prompt="a yellow flower on a blue background", seed=1, loras=(Lora(str(lora)),))
generate(components, request)[0].save("flower.png")
