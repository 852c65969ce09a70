"""What a LoRA file is, told from its names and shapes alone: no model is needed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from octavo.checkpoint.kinds import Kind, what_else
from octavo.checkpoint.lora import PREFIXES, grouped_names, spelled
from octavo.checkpoint.tensors import open_tensors
from octavo.errors import WrongModelError


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """A LoRA file in numbers.

    Attributes:
        path: of the file.
        nbytes: of its tensors.
        kinds: how many layers are changed in which way: LoRA, LoHa, LoKr, difference, and DoRA on top of these.
        ranks: how many layers have which rank, where there is one.
        parts: how many layers of which part of a model.
        dtypes: how many tensors have which.
        layers: by the file's names, their kind and shapes.
        metadata: of the header.
    """

    path: Path
    nbytes: int
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    parts: Mapping[Kind, int]
    dtypes: Mapping[str, int]
    layers: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)


def describe_lora(path: Path) -> LoraInfo:
    """Read the header of a LoRA file.

    Raises:
        WrongModelError: it is none.
        CorruptFileError: its header is damaged.
    """
    with open_tensors(path) as file:
        grouped, _ = grouped_names(file)
        if not grouped:
            what = what_else(file.entries) or "no LoRA that Octavo knows"
            raise WrongModelError(
                f"'{path}' is {what}: none of its {len(file.entries)} tensors is named like a LoRA's."
            )
        kinds: Counter[str] = Counter()
        ranks: Counter[int] = Counter()
        parts: Counter[Kind] = Counter()
        layers = {}
        for name, tensors in grouped.items():
            kind = _kind(tensors)
            rank = next(
                (file.entries[tensors[each]].shape[0] for each in ("down", "w1_b", "w2_b") if each in tensors), None
            )
            kinds[kind] += 1
            parts[_part(name)] += 1
            if rank is not None:
                ranks[rank] += 1
            layers[name] = kind if rank is None else f"{kind}, rank {rank}"
        return LoraInfo(
            path,
            sum(entry.nbytes for entry in file.entries.values()),
            dict(kinds.most_common()),
            dict(ranks.most_common()),
            dict(parts.most_common()),
            dict(Counter(entry.dtype for entry in file.entries.values()).most_common()),
            layers,
            dict(file.metadata),
        )


def _kind(tensors: Mapping[str, str]) -> str:
    kind = "difference" if "diff" in tensors else "LoRA"
    if any("hada_w" in name for name in tensors.values()):
        kind = "LoHa"
    elif any("lokr_w" in name for name in tensors.values()):
        kind = "LoKr"
    return f"DoRA ({kind})" if "magnitude" in tensors else kind


def _part(name: str) -> Kind:
    for kind in ("clip_l", "clip_g", "t5"):
        if any(spelled(name).startswith(spelled(prefix)) for prefix in PREFIXES[kind]):
            return kind
    return "mmdit"
