"""A call taken apart: its tensors, and all the rest as one hashable value, from which it is put together again."""

import dataclasses
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple, cast

from torch import Tensor

from octavo.models import Modulation


class Spec(NamedTuple):
    """A value without its tensors."""

    kind: str  # tensor, modulation, fields, items, pairs or value
    of: Hashable = None  # the class to make, or the value itself
    parts: tuple["Spec", ...] = ()


def tensors_in(value: Any, tensors: list[Tensor]) -> Spec:
    """Take `value` apart.

    Args:
        value: a tensor, `Modulation`, a dataclass or tuple, list of such, or anything hashable.
        tensors: gets its tensors, in order.

    Raises:
        TypeError: something else that cannot be hashed.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return Spec("tensor")
    if isinstance(value, Modulation):
        tensors.append(value.flat)
        return Spec("modulation", value.chunks)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(field.name for field in dataclasses.fields(value))
        parts = tuple(tensors_in(getattr(value, name), tensors) for name in names)
        # Without tensors it stays the object that it is.
        return (
            Spec("fields", (type(value), names), parts)
            if any(map(_has_tensors, parts))
            else Spec("value", (type(value), value))
        )
    if isinstance(value, tuple | list):
        return Spec("items", type(value), tuple(tensors_in(each, tensors) for each in value))
    value = frozenset(value) if isinstance(value, set) else value
    hash(value)
    return Spec("value", (type(value), value))


def rebuild(spec: Spec, tensors: Iterator[Tensor]) -> Any:
    """The value that `spec` was made of, with other tensors."""
    kind, of, parts = spec
    if kind == "tensor":
        return next(tensors)
    if kind == "modulation":
        return Modulation(next(tensors), of)  # type: ignore[arg-type]  # the chunks of one
    if kind == "value":
        return of[1]  # type: ignore[index]
    made = [rebuild(part, tensors) for part in parts]
    if kind == "fields":
        made_as, names = cast("tuple[type[Any], tuple[str, ...]]", of)
        return made_as(**dict(zip(names, made, strict=True)))
    assert isinstance(of, type)
    return of(*made) if hasattr(of, "_fields") else of(made)


def _has_tensors(spec: Spec) -> bool:
    return spec.kind in ("tensor", "modulation") or any(map(_has_tensors, spec.parts))
