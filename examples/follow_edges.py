"""A shape that no word says: the edges of a photo, followed by the embedded model's ControlNet."""

from PIL import Image, ImageDraw

from octavo import GenerateRequest, generate, load
from octavo.pipeline.control_request import ControlImage

photo = Image.new("RGB", (128, 128), "white")
ImageDraw.Draw(photo).polygon([(20, 100), (44, 24), (70, 60), (108, 70), (90, 108)], fill="black")
photo.save("photo.png")

edges = ControlImage(image="photo.png", type="canny", preprocess="canny", strength=0.9)
(picture,) = generate(load(), GenerateRequest(prompt="red on a white background", controls=(edges,), seed=3))
print(picture.save("output/followed.png"))
