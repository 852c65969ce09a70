"""A prompt, a picture, and the same picture again from what it carries."""

from octavo import GenerateRequest, generate, load
from octavo.pipeline.image import read_settings

components = load()  # the embedded model; give a name or path for another
(picture,) = generate(components, GenerateRequest(prompt="a large red star on a blue background", seed=7))
path = picture.save("output/star.png")
print(path)

(again,) = generate(components, GenerateRequest.from_settings(read_settings(path)))
assert again.image.tobytes() == picture.image.tobytes()
