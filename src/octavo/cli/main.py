"""`octavo`: the table of commands, and how errors reach the shell.

Commands live in the module of the same name. An `OctavoError` becomes one message and exit code 2, Ctrl-C exit code
130; anything else is a fault of ours and keeps its traceback.
"""

import sys
from typing import Annotated

import typer

from octavo._version import __version__
from octavo.cli import bench as benching
from octavo.cli import compare as comparing
from octavo.cli import convert as converting
from octavo.cli import evaluate as evaluating
from octavo.cli import lora as adapting
from octavo.cli import plan as planning
from octavo.cli import quantize as quantizing
from octavo.cli import recipes as cooking
from octavo.cli import refine as refining
from octavo.cli import run as running
from octavo.cli import serve as serving
from octavo.cli import train_lora as teaching
from octavo.cli.arithmetic import plain_words
from octavo.cli.generate import EPILOG, generate
from octavo.cli.info import info
from octavo.cli.models import models
from octavo.cli.pull import pull
from octavo.cli.train import train
from octavo.errors import OctavoError

HELP = """Stable Diffusion 3.5 in 8 bits.

Try it:  octavo generate "a large red star on a blue background"

Models are read from ./models (the layout of ComfyUI) or from $OCTAVO_MODELS; without any, a small embedded model draws.
"""

app = typer.Typer(
    name="octavo", help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich"
)
app.command(epilog=EPILOG)(generate)
app.command(epilog=refining.EPILOG)(refining.refine)
app.command(epilog=running.EPILOG)(running.run)
app.command(epilog=evaluating.EPILOG)(evaluating.evaluate)
app.command(epilog=comparing.EPILOG)(comparing.compare)
app.command(epilog=benching.EPILOG)(benching.bench)
app.command(epilog=converting.EPILOG)(converting.convert)
app.command()(info)
app.command()(models)
app.command(epilog=planning.EPILOG)(planning.plan)
app.command()(pull)
app.command(epilog=quantizing.EPILOG)(quantizing.quantize)
app.command(epilog=cooking.EPILOG)(cooking.recipes)
app.command(epilog=serving.EPILOG)(serving.serve)
train.command(epilog=teaching.EPILOG)(teaching.lora)
app.add_typer(train, name="train")
app.add_typer(adapting.lora, name="lora")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"octavo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `octavo` command."""
    try:
        app(args=plain_words(sys.argv[1:]))
    except OctavoError as error:
        from rich.console import Console

        Console(stderr=True).print(f"[bold red]octavo:[/] {_escaped(error)}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        print("octavo: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has left (`octavo models | head`): nothing is left to say, and to whom.
        sys.stderr.close()
        sys.exit(141)


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))
