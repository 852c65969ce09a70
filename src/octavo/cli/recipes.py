"""`octavo recipes`: how models can be quantized, as data."""

from typing import Annotated

import typer

EPILOG = """[bold]Examples[/]

octavo recipes

octavo recipes best > mine.toml   [dim]# change it, then: octavo quantize IN OUT --recipe mine.toml[/]
"""


def recipes(
    name: Annotated[str | None, typer.Argument(help="Of one recipe, to see all of it as TOML.")] = None,
) -> None:
    """List the recipes for 'octavo quantize', or show one."""
    from octavo.quantize import load_recipe, recipe_names

    if name is not None:
        print(load_recipe(name).to_toml(), end="")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "calibrates", "what it does", box=None, pad_edge=False, header_style="dim")
    for each in map(load_recipe, recipe_names()):
        table.add_row(each.name, "yes" if each.needs_calibration else "", each.description)
    Console().print(table)
