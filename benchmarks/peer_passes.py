"""How many kernels a step of diffusers starts, and how many bytes those move that are no products: counted, not timed.

    python -m benchmarks.peer_passes                 # needs diffusers; writes docs/benchmarks/peer_passes.json

Its transformer runs on the meta device, where nothing is computed, in bfloat16 at 1024x1024, two rows, 333 tokens of
text, and every operation of torch is looked at: one that is no view is a kernel; of those that multiply nothing, what
they are given and give passes through memory. Attention is one kernel that moves nothing. `benchmarks.predict_aims`
makes seconds of it.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.predict import MODELS, WORK
from octavo.evaluate.bench_peers import diffusers_transformer
from octavo.models import MMDiTConfig

STORED = Path("docs/benchmarks/peer_passes.json")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "embedding")
RELEASED: Mapping[str, MMDiTConfig] = {"large": MMDiTConfig.large(), "medium": MMDiTConfig.medium()}


class Passes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered.

    Attributes:
        kernels: operations that are no views.
        moved: bytes that those read and wrote which are no products.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        before = {id(each.untyped_storage()) for each in given}
        name = func.__name__.split(".")[0]
        if name.endswith("_") or any(id(each.untyped_storage()) not in before for each in made):
            self.kernels += 1
            self.moved += 0 if name in PRODUCTS else sum(map(_nbytes, (*given, *made)))
        return out


def _nbytes(tensor: Tensor) -> int:
    """Of the numbers that are there: one that is repeated along an axis is read once."""
    there = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return int(torch.Size(there).numel()) * tensor.itemsize


def count(model: str) -> dict[str, int]:
    """Kernels and bytes of a step of diffusers' transformer."""
    config = RELEASED[model]
    with torch.device("meta"):
        transformer: Any = diffusers_transformer(config)
        torch.nn.Module.to(transformer, torch.bfloat16)
        shapes = {
            "hidden_states": (WORK.rows, config.in_channels, *WORK.latents),
            "encoder_hidden_states": (WORK.rows, WORK.tokens, config.context_width),
            "pooled_projections": (WORK.rows, config.pooled_width),
        }
        inputs = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        timestep = torch.empty(WORK.rows)
    attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _attended
    try:
        with torch.inference_mode(), Passes() as passes:
            transformer(**inputs, timestep=timestep)
    finally:
        F.scaled_dot_product_attention = attention
    return {"kernels": passes.kernels + config.depth + len(config.dual_attention), "moved": passes.moved}


def _attended(query: Tensor, *_: Any, **__: Any) -> Tensor:
    return query


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=STORED)
    options = parser.parse_args()
    import diffusers

    page = {
        "about": "A step in bfloat16, two rows of 1024x1024 and 333 tokens, counted on the meta device; nothing timed.",
        "command": "python -m benchmarks.peer_passes",
        "versions": {"diffusers": diffusers.__version__, "torch": torch.__version__.partition("+")[0]},
        **{model: count(model) for model in MODELS},
    }
    options.out.write_text(json.dumps(page, indent=1) + "\n", "utf-8")
    print(json.dumps({"name": "peer_passes", **page}))


if __name__ == "__main__":
    main()
