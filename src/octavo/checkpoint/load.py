"""A file into a model, streamed tensor by tensor into its final dtype and place.

    with open_source(path) as source:
        plan = plan_part(source.require("mmdit"))     # headers only; every check but that of the values
        model = load_part(plan, device, dtype)        # the only step that reads weights

Peak memory is the model plus some small buffers: several threads read at once, see `delivery`. FP8 matrices of linear
layers stay FP8, everything else takes the compute dtype. For a CPU, those FP8 matrices that lie in the file as the
model wants them are not even read but mapped, see `TensorFile.mapped`. `load_mmdit` and its like do both steps at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from octavo.checkpoint.delivery import Delivery
from octavo.checkpoint.force import buffer_for, quantize_into
from octavo.checkpoint.kinds import Kind
from octavo.checkpoint.plan import Origin, Plan, Slab, plan_part
from octavo.checkpoint.source import open_source
from octavo.checkpoint.stacking import stack_branches
from octavo.checkpoint.tensors import TensorFile, torch_dtype
from octavo.fp8 import Fp8Linear
from octavo.fp8.scale import spread
from octavo.models import VAE, ClipTextEncoder, ControlNet, MMDiT, T5Encoder

Device = torch.device | str
Loaded = TypeVar("Loaded", bound=nn.Module)


def load_mmdit(path: Path | str, *, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> MMDiT:
    """The diffusion model at `path`: a single file, an all-in-one file, an index of shards or a diffusers folder.

    Args:
        path: of the file or folder; names in a models tree are resolved by `folders`.
        device: where the weights go.
        dtype: of everything but FP8 matrices.

    Raises:
        ModelNotFoundError: nothing is there.
        CheckpointError: the file is damaged, of another kind, or of a format that is not read.
    """
    return _load(path, ("mmdit",), MMDiT, device, dtype)


def load_clip(
    path: Path | str,
    which: Literal["clip_l", "clip_g"] | None = None,
    *,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipTextEncoder:
    """CLIP-L or CLIP-G from `path`, the first that is there if `which` is not given; otherwise as `load_mmdit`."""
    return _load(path, (which,) if which else ("clip_l", "clip_g"), ClipTextEncoder, device, dtype)


def load_t5(path: Path | str, *, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> T5Encoder:
    """The T5 encoder at `path`, as `load_mmdit`."""
    return _load(path, ("t5",), T5Encoder, device, dtype)


def load_vae(path: Path | str, *, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
    """The VAE at `path`, as `load_mmdit`."""
    return _load(path, ("vae",), VAE, device, dtype)


def load_controlnet(path: Path | str, *, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> ControlNet:
    """The ControlNet at `path`, as `load_mmdit`."""
    return _load(path, ("controlnet",), ControlNet, device, dtype)


def _load(path: Path | str, kinds: Sequence[Kind], model: type[Loaded], device: Device, dtype: torch.dtype) -> Loaded:
    with open_source(Path(path)) as source:
        loaded = load_part(plan_part(source.require(*kinds)), device, dtype)
    assert isinstance(loaded, model)
    return loaded


def load_part(plan: Plan, device: Device, dtype: torch.dtype) -> nn.Module:
    """Follow `plan`: its model leaves the meta device and is ready for inference.

    Args:
        plan: used up; a second model needs a second plan.
        device: where the weights go.
        dtype: of everything but FP8 matrices and a table of positions that the file has in 16 bits.

    Raises:
        CorruptFileError: a weight is NaN or infinite, or the file has shrunk since its header was read.
    """
    file, model = plan.located.file, plan.model
    with Delivery(device) as delivery:
        for origin in plan.origins:
            module = model.get_submodule(origin.module)
            if isinstance(module, Fp8Linear) and origin.stays_fp8:
                module.q = _codes(delivery, file, origin, module.q, device)
                module.scale = origin.scaling[0].to(device)
                module.input_scale = None if origin.input_scale is None else origin.input_scale.to(device)
                if origin.low_rank:
                    module.set_low_rank(*stack_branches(file, origin.stretches, dtype, device))
                continue
            name = origin.ours.rpartition(".")[2]
            if isinstance(module, Fp8Linear) and name == "weight":
                weight = _stack(delivery, file, origin, buffer_for(module, origin, device))
                delivery.wait()
                quantize_into(module, weight)
            else:
                kept = _kept_dtype(origin, dtype)
                place = torch.empty(getattr(module, name).shape, dtype=kept, device=device)
                weight = _stack(delivery, file, origin, place)
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
        delivery.finish()
    assert not any(tensor.is_meta for tensor in model.state_dict().values()), "the plan left weights out"
    return model.eval()


def read_values(file: TensorFile, origin: Origin) -> Tensor:
    """One weight of a plan in float32 on the CPU, dequantized, its low-rank branch included; in the shape of the file.

    Raises:
        CorruptFileError: it is NaN or infinite.
    """
    return torch.cat([_values(file, slab) for slab in origin.slabs])


def _kept_dtype(origin: Origin, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight that is not FP8.

    The table of positions takes 0.9 GB in float32 for SD3.5 Medium. A picture uses a small part of it, which the model
    turns into its own dtype, so that 16 bits of the file can stay 16 bits without changing any number.
    """
    (stored, *others) = [torch_dtype(slab.entry) for slab in origin.slabs]
    narrow = origin.ours == "pos_embed" and not others and stored in (torch.bfloat16, torch.float16)
    return stored if narrow and dtype.itemsize > stored.itemsize else dtype


def _codes(delivery: Delivery, file: TensorFile, origin: Origin, like: Tensor, device: Device) -> Tensor:
    """The FP8 matrix of `origin`, shaped as `like`; for a CPU mapped, if it is in one piece there."""
    whole = len(origin.slabs) == 1 and origin.slabs[0].entry.shape == tuple(like.shape)
    if whole and torch.device(device).type == "cpu":
        mapped = file.mapped(origin.slabs[0].entry.name)
        if mapped is not None:
            return mapped
    return _stack(delivery, file, origin, torch.empty(like.shape, dtype=like.dtype, device=device))


def _stack(delivery: Delivery, file: TensorFile, origin: Origin, out: Tensor) -> Tensor:
    """Have `out` filled with the slabs of `origin`; into FP8 go the codes, into other dtypes the values."""
    row = 0
    for slab in origin.slabs:
        place = out[row : row + slab.rows]
        row += slab.rows
        plain = slab.rule is None or (slab.rule.scale is None and slab.rule.low_rank is None)
        if (origin.stays_fp8 or plain) and not slab.transposed:
            file.deliver(delivery, slab.entry.name, place, rows=(slab.start, slab.stop))
        else:
            place.copy_(_values(file, slab).view_as(place))
    return out


def _values(file: TensorFile, slab: Slab) -> Tensor:
    """The slab in float32 on the CPU, dequantized and the right way round; for the few that cannot be read in place."""
    values = torch.empty(slab.entry.shape)
    file.read_into(slab.entry.name, values)
    if slab.rule is not None:
        if slab.rule.scale is not None and slab.rule.block is not None:
            values *= spread(slab.rule.scale, values.shape, slab.rule.block)
        elif slab.rule.scale is not None:
            values *= slab.rule.scale.reshape(-1, *[1] * (values.ndim - 1))
        if (branch := slab.rule.low_rank) is not None:
            values += file.read(branch.up.name, torch.float32) @ file.read(branch.down.name, torch.float32)
    return (values.t() if slab.transposed else values)[slab.start : slab.stop].contiguous()
