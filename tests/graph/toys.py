"""Small nodes that need neither torch nor models, for tests of the graph itself."""

from typing import Any

from octavo.graph.spec import BOOLEAN, COMBO, INT, LINK, STRING, NodeResult, files, node


@node(
    "EmptyImage",
    category="image",
    inputs={
        "width": INT(512, min=1, max=16384),
        "height": INT(512, min=1, max=16384),
        "batch_size": INT(1, min=1, max=4096),
        "color": INT(0, min=0, max=0xFFFFFF),
    },
    outputs=("IMAGE",),
)
def empty_image(_context: Any, width: int, height: int, batch_size: int, color: int) -> tuple[Any]:
    return ((width, height, batch_size, color),)


@node("Invert", category="image", inputs={"image": LINK("IMAGE")}, outputs=("IMAGE",))
def invert(_context: Any, image: Any) -> tuple[Any]:
    return (("inverted", image),)


@node(
    "LoadToy",
    category="image",
    inputs={"image": COMBO(files("input"), image_upload=True)},
    outputs=("IMAGE",),
)
def load_toy(_context: Any, image: str) -> tuple[Any]:
    return (image,)


@node(
    "SaveToy",
    category="image",
    inputs={"images": LINK("IMAGE"), "prefix": STRING("toy")},
    outputs=(),
    output_node=True,
)
def save_toy(context: Any, images: Any, prefix: str) -> NodeResult:
    context.saved.append(images)
    return NodeResult(ui={"images": [{"filename": f"{prefix}_1.png", "subfolder": "", "type": "output"}]})


@node(
    "Show",
    category="text",
    inputs={"text": STRING(), "loud": BOOLEAN(False, added_later=True)},
    outputs=(),
    output_node=True,
)
def show(_context: Any, text: str, loud: bool) -> NodeResult:
    return NodeResult(ui={"text": [text.upper() if loud else text]})


TOYS = {spec.name: spec for spec in (empty_image, invert, load_toy, save_toy, show)}

IMAGE_PROMPT: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveToy", "inputs": {"images": ["1", 0], "prefix": "img"}},
}
