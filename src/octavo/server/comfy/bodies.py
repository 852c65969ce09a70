"""Bodies of requests as JSON, checked so far that nothing in them can trip us up later.

ComfyUI's clients often leave out the `Content-Type`, so bodies are read by what they are. What Python's parser takes
and JSON or UTF-8 does not know (NaN, half a surrogate pair) is refused here: it could not be stored or sent back.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn

from fastapi import Depends, Request

from octavo.server.problems import Refused


async def json_body(request: Request) -> Any:
    """The request's body, whatever JSON it is.

    Raises:
        Refused: 400; it is no JSON, nested too deeply, or holds what JSON cannot say.
    """
    text = await request.body()
    try:
        value = json.loads(text, parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # 1e999 is read as infinity
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise Refused(f"The body is no JSON: {reason}. Send a JSON object.", kind="invalid_json") from None
    return value


async def json_object(request: Request) -> dict[str, Any]:
    """The request's body, which must be an object; nothing at all counts as an empty one.

    Raises:
        Refused: 400.
    """
    if not (await request.body()).strip():
        return {}
    value = await json_body(request)
    if not isinstance(value, dict):
        raise Refused(f"The body is a JSON {_name(value)}; send an object.", kind="invalid_json")
    return value


JsonBody = Annotated[Any, Depends(json_body)]
JsonObject = Annotated[dict[str, Any], Depends(json_object)]


def described(required: Sequence[str] = (), **fields: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object as a route's body, for OpenAPI: `openapi_extra=described(client_id=TEXT)`.

    Args:
        required: names of fields that must be there.
        fields: JSON schemas by name.
    """
    schema = {"type": "object", "properties": dict(fields), "required": list(required)}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": bool(required)}}


TEXT: Mapping[str, Any] = {"type": "string"}
TEXTS: Mapping[str, Any] = {"type": "array", "items": {"type": "string"}}
TRUTH: Mapping[str, Any] = {"type": "boolean"}
NUMBER: Mapping[str, Any] = {"type": "number"}
OBJECT: Mapping[str, Any] = {"type": "object"}


def text_field(of: dict[str, Any], name: str, default: str | None = None) -> str | None:
    """A field that must be a text where it is given.

    Raises:
        Refused: 400.
    """
    value = of.get(name, default)
    if value is not None and not isinstance(value, str):
        raise Refused(f"'{name}' is a JSON {_name(value)}; send a text.", param=name)
    return value


def names_field(of: dict[str, Any], name: str) -> list[str]:
    """A field that must be a list of texts where it is given.

    Raises:
        Refused: 400.
    """
    value = of.get(name) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise Refused(f"'{name}' should be a list of texts.", param=name)
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _name(value: Any) -> str:
    """What JSON calls it."""
    kinds = {list: "list", str: "text", bool: "truth value", int: "number", float: "number", dict: "object"}
    return kinds.get(type(value), "null")


def whole_number(text: str | None, name: str, *, least: int) -> int | None:
    """A parameter that must be a whole number where it is given.

    Raises:
        Refused: 400.
    """
    if text is None:
        return None
    try:
        number = int(text) if len(text) < 20 else least - 1
    except ValueError:
        number = least - 1
    if number < least:
        raise Refused(f"{name} '{text[:40]}': give a whole number, {least} or more.", param=name)
    return number
