"""Settings: the command line before the environment before the file, and every mistake named."""

from pathlib import Path
from typing import Any

import pytest

from octavo.errors import RequestError
from octavo.server.settings import Settings, gather

FILE = """
port = 1111
host = "127.0.0.2"
model = "from-file"
max-pixels = 65536
body_timeout = 5
cors = ["https://a.example", "https://b.example"]
fast = true
force-fp8 = "e5m2"
text-encoder = ["clip_l"]
models-dir = "~/models"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "octavo.toml").write_text(FILE)
    return tmp_path / "octavo.toml"


def test_who_goes_before_whom(file: Path) -> None:
    environment = {"OCTAVO_PORT": "2222", "OCTAVO_HOST": "127.0.0.3", "OCTAVO_CORS": "https://c.example, *"}
    found = gather({"port": 3333, "workers": None}, environment=environment, file=file)
    assert (found.port, found.host, found.model) == (3333, "127.0.0.3", "from-file")
    assert found.cors == ("https://c.example", "*")
    assert (found.max_pixels, found.body_timeout, found.workers) == (65536, 5.0, Settings().workers)
    assert found.loading == {"fast": True, "force_fp8": "e5m2", "text_encoders": ("clip_l",)}
    assert found.models_dir == Path.home() / "models"


def test_the_environment_names_a_file_and_models(file: Path) -> None:
    assert gather({}, environment={"OCTAVO_CONFIG": str(file)}).port == 1111
    assert gather({}, environment={"OCTAVO_MODELS": "/m"}).models_dir == Path("/m")
    assert gather({}, environment={"OCTAVO_FORCE_FP8": "true", "OCTAVO_FAST": "no"}).loading == {
        "force_fp8": True,
        "fast": False,
    }
    assert gather({}, environment={"OCTAVO_PORT": ""}).port == Settings().port


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "no setting 'prot'. Did you mean 'port'?"), ("port = 'x'", "port is 'x'"),
        ("port = true", "port is True"), ("port = 1.5", "port is 1.5"), ("fast = 'perhaps'", "fast is 'perhaps'"),
        ("model = 3", "model is 3"), ("= 1", "Cannot read"), ("port = 70000", "--port 70000 is out of range"),
        ("log-format = 'xml'", "--log-format 'xml': choose plain or json"), ("cors = ['a']", "--cors 'a'"),
        ("max-pixels = 0", "--max-pixels"), ("api-key = ['short']", "at least 16"),
        ("public-url = 'x'", "--public-url"),
        ("body-timeout = nan", "--body-timeout"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(RequestError) as caught:
        gather({}, environment={}, file=tmp_path / "bad.toml")
    assert said in str(caught.value)


def test_mistakes_in_the_environment_name_the_variable() -> None:
    with pytest.raises(RequestError, match=r"\$OCTAVO_WORKERS is 'many'"):
        gather({}, environment={"OCTAVO_WORKERS": "many"})
    with pytest.raises(RequestError, match="Cannot read the settings"):
        gather({}, environment={"OCTAVO_CONFIG": "/no/such/file.toml"})


def test_keys_are_not_shown() -> None:
    secret = "a-key-of-enough-letters"
    assert secret not in repr(Settings(api_keys=(secret,)))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("192.168.0.2", False), ("pictures.example", False)],
)  # fmt: skip
def test_what_is_open_to_this_machine_only(host: str, loopback: bool) -> None:
    assert Settings(host=host).loopback is loopback


def test_every_option_of_the_command_is_a_setting() -> None:
    """`octavo serve` and a file take the same names."""
    import inspect

    from octavo.cli.serve import serve
    from octavo.server.settings import LOADING, SPELLINGS

    known: set[str] = {*(each for each in Settings.__dataclass_fields__ if each != "loading"), *LOADING}
    options = {SPELLINGS.get(name, name) for name in inspect.signature(serve).parameters}
    commands = {"config", "add_key", "remove_key", "key_priority"}
    spellings = {"unet_e4m3fn", "unet_e5m2", "text_enc_e4m3fn", "text_enc_e5m2"}
    assert options - commands - spellings == known


def test_a_file_may_say_all_that_a_server_has(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        name: getattr(Settings(), name) for name in Settings.__dataclass_fields__ if name != "loading"
    }
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    (tmp_path / "all.toml").write_text("\n".join(lines))
    assert gather({}, environment={}, file=tmp_path / "all.toml") == Settings()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}'" if isinstance(value, str | Path) else str(list(value) if isinstance(value, tuple) else value)
