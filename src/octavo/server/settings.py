"""How a server is set up: what was said on the command line, in the environment and in a file, in this order.

No torch here, nor any web framework: `octavo serve --help` reads this module.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from octavo.errors import RequestError, did_you_mean

PREFIX = "OCTAVO_"
# How models are loaded: keywords of `octavo.load`.
LOADING: Mapping[str, type] = {
    "device": str, "dtype": str, "tiled_vae": bool, "vae": str, "text_encoders": tuple, "fast": bool, "force_fp8": str,
    "force_fp8_text_encoders": str, "supports_fp8_compute": bool, "backend": str, "measure": bool, "retry_bf16": bool,
    "vram": str,
    "attention": str, "compile": bool, "graphs": bool,
}  # fmt: skip
# Settings known by another name too; $OCTAVO_MODELS is what every command reads.
SPELLINGS = {
    "models": "models_dir",
    "api_key": "api_keys",
    "allowed_host": "allowed_hosts",
    "text_encoder": "text_encoders",
}
WORDS_FOR_TRUTH: Mapping[str, bool] = {
    "true": True, "yes": True, "1": True, "false": False, "no": False, "0": False,
}  # fmt: skip
SHORTEST_KEY = 16  # letters of an --api-key
SPEED_NAMES = ("exact", "balanced", "fast")  # of `pipeline.speed`, which needs torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One server's settings; the names are those of the options."""

    model: str | None = None  # drawn with when a request names none; None for the embedded one
    host: str = "127.0.0.1"
    port: int = 8188  # 0 takes a free one
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # beside those of the keys file
    allow_anonymous: bool = False  # let in who shows no key
    allowed_hosts: tuple[str, ...] = ()  # names this server is called by, beside its own; "*" for any
    public_url: str | None = None  # behind a proxy: what clients call this server, for addresses that are given out
    cors: tuple[str, ...] = ()  # origins whose pages may call; "*" for any
    models_dir: Path | None = None
    data_dir: Path = Path("data")  # queue, keys, uploads, what users keep
    output_dir: Path = Path("output")  # pictures
    input_dir: Path | None = None  # pictures to start from; None for `input` in the data folder
    threads: int | None = None  # of a CPU; None: see `placement.threads`
    workers: int = 16  # requests under way at once
    queue_limit: int = 1000  # requests waiting, after which new ones are refused
    speed: str = "exact"  # where a request says none, and of all workflows; see `pipeline.speed`
    max_pixels: int = 2048 * 2048  # of a picture to draw
    max_upload_pixels: int = 50_000_000  # of a picture that is sent
    max_body: int = 64 * 2**20  # bytes of a request
    body_timeout: float = 30.0  # seconds that a request's sender may pause
    job_timeout: float | None = None  # seconds for a request from arrival to picture, where it names none
    loading: Mapping[str, Any] = field(default_factory=dict)  # device, arithmetic …: keywords of `octavo.load`
    log_format: str = "plain"  # or "json"
    log_level: str = "info"

    def __post_init__(self) -> None:
        _within("port", self.port, 0, 65535)
        _within("workers", self.workers, 1, 256)
        _within("queue-limit", self.queue_limit, 1, 1_000_000)
        _within("max-pixels", self.max_pixels, 256, 2**30)
        _within("max-upload-pixels", self.max_upload_pixels, 256, 2**30)
        _within("max-body", self.max_body, 1024, 2**34)
        _within("body-timeout", self.body_timeout, 0.01, 3600)
        if self.job_timeout is not None:
            _within("job-timeout", self.job_timeout, 0.01, 10_000_000)
        _one_of("speed", self.speed, SPEED_NAMES)
        _one_of("log-format", self.log_format, ("plain", "json"))
        _one_of("log-level", self.log_level, ("debug", "info", "warning", "error"))
        for key in self.api_keys:
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise RequestError(
                    f"An --api-key needs at least {SHORTEST_KEY} letters, digits or signs; "
                    "'octavo serve --add-key NAME' makes a good one."
                )
        if self.public_url is not None and not self.public_url.startswith(("http://", "https://")):
            raise RequestError(f"--public-url '{self.public_url}': write an address such as https://pictures.example.")
        for origin in self.cors:
            if origin != "*" and not (origin.startswith(("http://", "https://")) and origin.count("/") == 2):
                raise RequestError(f"--cors '{origin}': write an origin such as https://pictures.example, or *.")

    @property
    def inputs(self) -> Path:
        """Where pictures to start from lie."""
        return self.input_dir or self.data_dir / "input"

    @property
    def temp_dir(self) -> Path:
        """Where previews lie; emptied at start."""
        return self.data_dir / "temp"

    @property
    def uploads(self) -> Path:
        """Pictures that came inside requests, until these are done."""
        return self.data_dir / "uploads"

    @property
    def user_dir(self) -> Path:
        """What ComfyUI's page keeps: settings and workflows."""
        return self.data_dir / "user"

    @property
    def queue_file(self) -> Path:
        return self.data_dir / "queue.sqlite3"

    @property
    def keys_file(self) -> Path:
        return self.data_dir / "keys.json"

    @property
    def loopback(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        try:
            return ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


def gather(
    given: Mapping[str, Any], *, environment: Mapping[str, str] = os.environ, file: Path | None = None
) -> Settings:
    """Settings from the command line, then the environment, then a file; the first that says something is heard.

    Args:
        given: from the command line, by the names of `Settings` and `LOADING`; None where nothing was said.
        environment: $OCTAVO_PORT and so on; lists are separated by commas.
        file: TOML with the same names, dashes or underscores; else $OCTAVO_CONFIG names it.

    Raises:
        RequestError: a file that cannot be read, a name that no setting has, or a value that makes no sense.
    """
    named = file or (Path(environment[PREFIX + "CONFIG"]) if environment.get(PREFIX + "CONFIG") else None)
    values = _read(named) if named is not None else {}
    values |= _from_environment(environment)
    values |= {name: value for name, value in given.items() if value is not None}
    loading = {name: values.pop(name) for name in LOADING if name in values}
    return Settings(**values, loading=loading)


def _read(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise RequestError(
            f"Cannot read the settings of {file}: {error}. Correct it, or name another --config."
        ) from None
    known = _kinds()
    values = dict[str, Any]()
    for key, value in table.items():
        name = key.replace("-", "_")
        name = SPELLINGS.get(name, name)
        if name not in known:
            raise RequestError(f"{file}: there is no setting '{key}'.{did_you_mean(name, known)}")
        values[name] = _converted(f"{file}: {key}", value, known[name])
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    known = _kinds()
    values = dict[str, Any]()
    for name in (*SPELLINGS, *known):
        text = environment.get(PREFIX + name.upper())
        if text:
            values[SPELLINGS.get(name, name)] = _converted(
                f"${PREFIX}{name.upper()}", text, known[SPELLINGS.get(name, name)]
            )
    return values


def _kinds() -> dict[str, Any]:
    """By setting, what its value is."""
    kinds = {each.name: each.type for each in fields(Settings) if each.name != "loading"}
    return kinds | dict(LOADING)


def _converted(where: str, value: Any, kind: Any) -> Any:
    """`value` as the setting has it: a text from the environment, or a TOML value."""
    wanted = str(kind)
    try:
        if "tuple" in wanted:
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(str(part).strip() for part in parts if str(part).strip())
        if "Path" in wanted:
            return Path(_text(value)).expanduser()
        if "bool" in wanted or (kind is str and isinstance(value, bool)):
            return _truth(value)
        if "int" in wanted:
            return int(value) if isinstance(value, str) else _whole(value)
        if "float" in wanted:
            return float(value) if isinstance(value, str) or not isinstance(value, bool) else _whole(value)
        text = _text(value)
        # force_fp8 may be a word of a format or a plain yes.
        return WORDS_FOR_TRUTH.get(text.lower(), text) if kind is str else text
    except (TypeError, ValueError):
        raise RequestError(f"{where} is {value!r}, which makes no sense there.") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if _text(value).lower() not in WORDS_FOR_TRUTH:
        raise ValueError
    return WORDS_FOR_TRUTH[value.lower()]


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise RequestError(f"--{name} {value} is out of range: from {low} to {high}.")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RequestError(f"--{name} '{value}': choose {' or '.join(known)}.{did_you_mean(value, known)}")
