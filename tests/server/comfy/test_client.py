"""A client that nobody here wrote: comfy-api-simplified, against a listening server with the embedded model."""

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.server.comfy.exchanges import png
from tests.server.conftest import Live

simplified = pytest.importorskip("comfy_api_simplified", reason="comfy-api-simplified is not installed")


def workflow(live: Live, **sampler: object) -> object:
    """Text to picture with the embedded model, as the client reads it from a file."""
    import json

    nodes = {
        "4": ("Load", "CheckpointLoaderSimple", {"ckpt_name": "octavo-demo.safetensors"}),
        "5": ("Size", "EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "6": ("Prompt", "CLIPTextEncode", {"text": "a circle", "clip": ["4", 1]}),
        "3": ("Sampler", "KSampler", {
            "seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            "model": ["4", 0], "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["5", 0], **sampler,
        }),
        "8": ("Decode", "VAEDecode", {"samples": ["3", 0], "vae": ["4", 2]}),
        "9": ("Save Image", "SaveImage", {"images": ["8", 0], "filename_prefix": "simplified"}),
    }  # fmt: skip
    prompt = {
        id: {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
        for id, (title, kind, inputs) in nodes.items()
    }
    path = Path(live.settings.data_dir) / "workflow.json"
    path.write_text(json.dumps(prompt))
    return simplified.ComfyWorkflowWrapper(str(path))


def test_it_queues_waits_and_fetches(live_model: Live) -> None:
    api = simplified.ComfyApiWrapper(live_model.url)
    wrapped = workflow(live_model)
    wrapped.set_node_param("Prompt", "text", "a red square")
    wrapped.set_node_param("Size", "width", 96)
    images = api.queue_and_wait_images(wrapped, "Save Image")
    [(name, content)] = images.items()
    assert name.startswith("simplified_")
    with Image.open(BytesIO(content)) as image:
        assert image.size == (96, 64)
        assert "a red square" in image.info["prompt"]


def test_it_uploads(live_model: Live, tmp_path: Path) -> None:
    (tmp_path / "up.png").write_bytes(png())
    api = simplified.ComfyApiWrapper(live_model.url)
    assert api.upload_image(str(tmp_path / "up.png"), subfolder="sent")["subfolder"] == "sent"
    assert (live_model.settings.inputs / "sent" / "up.png").read_bytes() == png()


def test_it_is_told_of_a_workflow_that_cannot_be_run(live_model: Live) -> None:
    api = simplified.ComfyApiWrapper(live_model.url)
    with pytest.raises(simplified.exceptions.ComfyApiError, match="400"):
        api.queue_and_wait_images(workflow(live_model, sampler_name="nosuch"), "Save Image")
