"""Pictures on the way, as ComfyUI frames them in binary websocket messages.

Each begins with its event's number, big-endian. Event 1 is the picture alone; event 4, for clients that said they know
it, carries JSON that tells which node of which prompt the picture belongs to.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

PREVIEW, PREVIEW_WITH_METADATA = 1, 4
JPEG, PNG = 1, 2  # as event 1 numbers them
PNG_BEGINNING = b"\x89PNG"
# In the order of ComfyUI's JSON.
KEYS = ("node_id", "prompt_id", "display_node_id", "parent_node_id", "real_node_id")


def plain(picture: bytes) -> bytes:
    """Event 1: four bytes of event, four of format, the JPEG or PNG file."""
    return struct.pack(">II", PREVIEW, PNG if picture.startswith(PNG_BEGINNING) else JPEG) + picture


def with_metadata(picture: bytes, of: Mapping[str, Any]) -> bytes:
    """Event 4: four bytes of event, four of the JSON's length, the JSON, the JPEG or PNG file.

    Args:
        of: `node_id` and `prompt_id`; the other `KEYS` follow from the node's where they are missing.
    """
    node = of.get("node_id")
    known = {"display_node_id": node, "real_node_id": node, **of}
    metadata = {key: known.get(key) for key in KEYS}
    metadata["image_type"] = "image/png" if picture.startswith(PNG_BEGINNING) else "image/jpeg"
    text = json.dumps(metadata).encode()
    return struct.pack(">II", PREVIEW_WITH_METADATA, len(text)) + text + picture
