"""What came out small, drawn anew at the model's full size: the rest of the picture stays as it is."""

from octavo import GenerateRequest, generate, load
from octavo.pipeline.refine import Refinement, refine

components = load()
(picture,) = generate(components, GenerateRequest(prompt="a small yellow star in the top left on blue", seed=4))
path = picture.save("output/star.png")

part = Refinement(region=(2, 2, 38, 38), context=4, feather=4)
better = refine(components, str(path), GenerateRequest(prompt="a large yellow star on a blue background", seed=5), part)
print(better.save("output/refined.png"))
