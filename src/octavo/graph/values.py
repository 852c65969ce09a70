"""Values that are typed into a node: turned into the type that the node wants, and checked against what it takes.

Faults have the form in which ComfyUI answers them, which its web page shows beside the node.
"""

import json
import math
from collections.abc import Callable
from typing import Any, Literal

from octavo.graph.spec import Input, Lists

Fault = dict[str, Any]
LONG_LIST = 20  # names; ComfyUI counts a longer list instead of writing it out
DEEPEST_TEXT = 200  # letters of a value that an answer repeats


def fault(type: str, message: str, details: str, **extra_info: Any) -> Fault:
    """One entry of `errors` in ComfyUI's answer to a prompt that will not do."""
    if "received_value" in extra_info:
        extra_info["received_value"] = _repeatable(extra_info["received_value"])
    return {"type": type, "message": message, "details": details, "extra_info": extra_info}


def _repeatable(value: Any) -> Any:
    """The value as an answer can repeat it: NaN and infinity, which JSON does not have, as texts."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return shortened(value)
    return value


def convert(type: str, value: Any) -> Any:
    """The value as an INT, FLOAT, STRING or BOOLEAN; of another type as it is.

    Numbers come from text too, and whole numbers lose their fraction, as in ComfyUI. Unlike there, the text "false" is
    no yes, and neither infinity nor a list makes a number or a text.

    Raises:
        ValueError, TypeError, OverflowError: it is none; the text says why.
    """
    if type == "BOOLEAN":
        return _yes_or_no(value)
    if type not in ("INT", "FLOAT", "STRING"):
        return value
    if isinstance(value, dict | list) or value is None:
        raise TypeError(f"a value is needed, not {'nothing' if value is None else f'a {_json_name(value)}'}")
    if type == "INT":
        return int(value)
    if type == "FLOAT":
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{number} is not a finite number")
        return number
    return str(value)


def _yes_or_no(value: Any) -> bool:
    if isinstance(value, str):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}
        if value.strip().lower() not in words:
            raise ValueError(f"'{shortened(value)}' is neither true nor false")
        return words[value.strip().lower()]
    if not isinstance(value, bool | int | float):
        raise TypeError("true or false is needed")
    return bool(value)


def check(
    name: str, wanted: Input, value: Any, lists: Lists | None = None, *, classic: bool = True
) -> tuple[Any, Fault | None]:
    """Convert `value` for the input `name`, and look whether it will do.

    Args:
        wanted: the input's declaration.
        lists: what a COMBO of files offers; None where it cannot be asked, so that only fixed choices are checked.
        classic: how the node is described in `/object_info`, of which answers repeat the input's entry.

    Returns:
        The converted value, and what is wrong with it if anything is.
    """

    def about() -> dict[str, Any]:
        config = None if lists is None else wanted.object_info(lists, classic=classic)
        return {"input_name": name, "input_config": config, "received_value": value}

    try:
        value = convert(wanted.type, value)
    except (ValueError, TypeError, OverflowError) as error:
        return value, fault(
            "invalid_input_type",
            f"Failed to convert an input value to a {wanted.type} value",
            f"{name}, {shortened(value)}, {error}",
            **about(),
            exception_message=str(error),
        )
    lowest, highest = wanted.options.get("min"), wanted.options.get("max")
    if lowest is not None and value < lowest:
        return value, fault("value_smaller_than_min", f"Value {value} smaller than min of {lowest}", name, **about())
    if highest is not None and value > highest:
        return value, fault("value_bigger_than_max", f"Value {value} bigger than max of {highest}", name, **about())
    if wanted.type == "COMBO":
        return value, _not_offered(name, wanted, value, lists, about)
    return value, None


def _not_offered(
    name: str, wanted: Input, value: Any, lists: Lists | None, about: Callable[[], dict[str, Any]]
) -> Fault | None:
    if lists is None and (callable(wanted.choices) or wanted.check is not None):
        return None
    if wanted.check is not None:
        assert lists is not None
        complaint = wanted.check(value, lists)
        if complaint is None:
            return None
        message = "Custom validation failed for node"
        return fault("custom_validation_failed", message, f"{name} - {complaint}", input_name=name)
    if wanted.choices is None:
        return None
    offered = list(wanted.choices) if isinstance(wanted.choices, tuple) else wanted.choose_from(_there(lists))
    if value in offered:
        return None
    extra, choice = about(), str(offered)
    if len(offered) > LONG_LIST:
        extra["input_config"], choice = None, f"(list of length {len(offered)})"
    return fault("value_not_in_list", "Value not in list", f"{name}: '{shortened(value)}' not in {choice}", **extra)


def _there(lists: Lists | None) -> Lists:
    assert lists is not None
    return lists


def shortened(value: Any, most: int = DEEPEST_TEXT) -> str:
    """The value's text, cut where it is long; never an error, however deep the value is nested."""
    try:
        text = str(value)
    except RecursionError:
        return f"a deeply nested {_json_name(value)}"
    return text if len(text) <= most else f"{text[:most]}…"


def _json_name(value: Any) -> Literal["list", "object", "value"]:
    return "list" if isinstance(value, list) else "object" if isinstance(value, dict) else "value"
