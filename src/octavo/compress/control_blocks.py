"""A ControlNet evaluated block by block, see `stages`.

b rows of a batch, n image tokens, D width.
"""

from collections.abc import Callable, Iterable
from typing import cast

import torch

from octavo.compress.stages import EMBED, Batch, Stages
from octavo.models import ControlNet, ControlNetConfig
from octavo.models.controlnet import ImageBlock
from octavo.models.mmdit import JointBlock
from octavo.sampling.flow import timestep


class ControlStream(Stages):
    """The ControlNet of a file, kind "controlnet"; its stages are what embeds, and the blocks with their outputs.

    Batches enter with a `hint`, and with the steered model's own image tokens as `image` where the net has no patches
    of its own.
    """

    @property
    def net(self) -> ControlNet:
        """The net."""
        return cast(ControlNet, self.model)

    @property
    def config(self) -> ControlNetConfig:
        """Its shape."""
        return self.net.config

    def names_of_stages(self) -> Iterable[str]:
        return (EMBED, *(f"blocks.{number}" for number in range(self.config.depth)))

    def stage_of(self, name: str) -> str:
        first, _, rest = name.partition(".")
        return f"blocks.{rest.partition('.')[0]}" if first in ("blocks", "outputs") else EMBED

    @torch.inference_mode()
    def advance(self, stage: str, batches: Iterable[Batch], before: Callable[[Batch], object] = lambda _: None) -> None:
        net = self.net
        for batch in batches:
            before(batch)
            if stage == EMBED:
                self._embed(batch)
                continue
            assert batch.vector is not None, "not embedded yet"
            assert batch.image is not None
            number = int(stage.rpartition(".")[2])
            match net.blocks[number]:
                case JointBlock() as block:
                    assert batch.text is not None
                    told, seen = block.context_block, block.x_block
                    batch.text, batch.image = block(
                        batch.text,
                        batch.image,
                        told.adaLN_modulation(batch.vector),
                        seen.adaLN_modulation(batch.vector),
                    )
                case ImageBlock() as image_block:
                    batch.image = image_block(batch.image, image_block.adaLN_modulation(batch.vector))
            assert batch.image is not None
            batch.residuals += (net.outputs[number](batch.image),)

    def _embed(self, batch: Batch) -> None:
        assert batch.hint is not None
        tokens = batch.image
        batch.vector = self.net.vector(timestep(batch.sigma), batch.pooled)
        batch.image = self.net.embed(
            batch.latents.to(self.dtype),
            batch.hint.to(self.dtype),
            lambda _latents: cast(torch.Tensor, tokens),
        )
        if self.config.joint:
            batch.text = self.net.context_embedder(batch.context)
        batch.context = batch.context[:, :0].clone()  # not needed any more, and large
