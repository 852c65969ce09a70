"""An MMDiT evaluated block by block, see `stages`.

b rows of a batch, h and w latent pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from octavo.compress.stages import EMBED, Batch, Stages
from octavo.models import MMDiT, MMDiTConfig
from octavo.sampling.flow import timestep

FINAL = "final_layer"


class BlockStream(Stages):
    """The diffusion model of a file, kind "mmdit"; its stages are what embeds, the joint blocks, the final layer."""

    @property
    def mmdit(self) -> MMDiT:
        """The model."""
        return cast(MMDiT, self.model)

    @property
    def config(self) -> MMDiTConfig:
        """Its shape."""
        return self.mmdit.config

    def names_of_stages(self) -> Iterable[str]:
        return stages(self.config)

    def stage_of(self, name: str) -> str:
        return stage_of(name)

    def advance(self, stage: str, batches: Iterable[Batch], before: Callable[[Batch], object] = lambda _: None) -> None:
        model = self.mmdit
        for batch in batches:
            before(batch)
            if stage == EMBED:
                batch.vector = model.vector(timestep(batch.sigma), batch.pooled)
                batch.text, batch.image = model.embed(batch.latents.to(self.dtype), batch.context)
                batch.context = batch.context[:, :0].clone()  # not needed any more, and large
                continue
            assert batch.vector is not None, "not embedded yet"
            assert batch.text is not None
            assert batch.image is not None
            if stage == FINAL:
                modulation = model.final_layer.adaLN_modulation(batch.vector)
                batch.velocity = model.finish(batch.image, modulation, batch.latents.shape[-2:])
                batch.text = batch.image = None
                continue
            number = int(stage.rpartition(".")[2])
            if number not in batch.skip_layers:
                block = model.joint_blocks[number]
                batch.text, batch.image = block(
                    batch.text,
                    batch.image,
                    block.context_block.adaLN_modulation(batch.vector),
                    block.x_block.adaLN_modulation(batch.vector),
                )

    @torch.inference_mode()
    def velocities(
        self,
        batches: Sequence[Batch],
        stages: Sequence[str] | None = None,
        done: Callable[[str], object] = lambda _: None,
    ) -> list[Tensor]:
        """Take all batches to the end of the model.

        Args:
            batches: where the stage before the first of `stages` left them.
            stages: the last ones of the model; all where none are given.
            done: called with each stage when it is done.

        Returns:
            For each batch its velocity [b, 16, h, w], in the dtype of the arithmetic.
        """
        for stage in self.stages if stages is None else stages:
            with self.loaded(stage):
                self.advance(stage, batches)
            done(stage)
        return [batch.velocity for batch in batches if batch.velocity is not None]


def stages(config: MMDiTConfig) -> tuple[str, ...]:
    """The stages of a model of this shape."""
    return (EMBED, *(f"joint_blocks.{number}" for number in range(config.depth)), FINAL)


def stage_of(name: str) -> str:
    """The stage that one of our names (of a layer, or of a tensor) belongs to."""
    first, _, rest = name.partition(".")
    if first == "joint_blocks":
        return f"{first}.{rest.partition('.')[0]}"
    return FINAL if first == FINAL else EMBED
