"""What of a model may pass through a device: which modules' weights move together, in which order they are used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from octavo.models import ClipTextEncoder, ControlNet, MMDiT, T5Encoder
from octavo.models.mmdit import JointBlock, StreamBlock
from octavo.placement.home import Unit


@dataclass(frozen=True, slots=True)
class Units:
    """What of a model may pass through a device, in the order of use."""

    blocks: tuple[Unit, ...] = ()  # once a step; of an encoder, once for all prompts of a job
    modulation: tuple[Unit, ...] = ()  # adaLN, once a run
    tables: tuple[nn.Embedding, ...] = ()  # of tokens: looked up in host memory
    now_and_then: bool = False  # whether the blocks are those of an encoder: used in a row, and not again soon


def units_of(model: nn.Module) -> Units:
    """Joint blocks and a ControlNet's blocks, both without their adaLN, and this by itself; layers of text encoders.

    What is no unit stays on the device: embedders, the final layer, position tables, norms, a whole VAE.
    """
    names = {module: name for name, module in model.named_modules()}

    def unit(*modules: nn.Module, without: Sequence[nn.Module] = ()) -> Unit:
        return Unit(names[modules[0]], modules, tuple(without))

    if isinstance(model, MMDiT):
        return Units(*_joint(model.joint_blocks, unit))
    if isinstance(model, ControlNet):
        joint, modulation = _joint(cast("Sequence[JointBlock]", model.blocks), unit)
        outputs = zip(joint, model.outputs, strict=True)
        return Units(
            tuple(unit(*block.modules, output, without=block.without) for block, output in outputs), modulation
        )
    if isinstance(model, ClipTextEncoder):
        text = model.text_model
        return Units(tuple(map(unit, text.encoder.layers)), (), (text.embeddings.token_embedding,), True)
    if isinstance(model, T5Encoder):
        # The first block's table of position biases serves all, and is read before the first.
        tables = [part for part in model.encoder.modules() if isinstance(part, nn.Embedding)]
        return Units(tuple(unit(block, without=tables) for block in model.encoder.block), (), (model.shared,), True)
    return Units()


def _joint(
    blocks: Sequence[JointBlock | StreamBlock], unit: Callable[..., Unit]
) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
    """Blocks without adaLN, and adaLN in the order of `MMDiT.modulation`: image streams first, then text."""
    streams = [(block.x_block, block.context_block) if isinstance(block, JointBlock) else (block,) for block in blocks]
    adaln = [[stream.adaLN_modulation for stream in each] for each in streams]
    in_order = [each[i] for i in range(max(map(len, adaln), default=0)) for each in adaln]
    return (
        tuple(unit(block, without=its) for block, its in zip(blocks, adaln, strict=True)),
        tuple(unit(each) for each in in_order),
    )
