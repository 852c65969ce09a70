"""The command as a whole: quick to answer, and honest about its version."""

import subprocess
import sys

import octavo


def octavo_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from octavo.cli.main import main; main()", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_names_every_command_and_imports_no_torch() -> None:
    code = "import sys\nfrom octavo.cli.main import app\nassert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    done = octavo_command("--help")
    assert done.returncode == 0
    for command in ("generate", "info", "models", "pull", "quantize", "recipes", "train"):
        assert command in done.stdout


def test_help_of_every_command_teaches() -> None:
    for command in ("generate", "info", "models", "pull", "quantize", "recipes", "train"):
        done = octavo_command(command, "--help")
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout


def test_version() -> None:
    assert octavo_command("--version").stdout == f"octavo {octavo.__version__}\n"


def test_wrong_words_are_a_usage_error() -> None:
    done = octavo_command("generate", "--no-such-option")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
