"""`octavo run`: a ComfyUI workflow in, pictures out. Paths go to stdout, everything else to stderr."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli import arithmetic, memory
from octavo.cli.log import show_log
from octavo.cli.threads import Threads
from octavo.errors import OctavoError, RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.graph.execute import Emit
    from octavo.graph.files import Found
    from octavo.graph.runner import Record, Workshop
    from octavo.graph.spec import NodeSpec
    from octavo.graph.workflow import Workflow

EPILOG = """[bold]Examples[/]

octavo run examples/workflows/sd3.5-large-fp8.json --set 6.text="a fox in the snow"

octavo run workflow.json --set KSampler.steps=20 --set 4.ckpt_name=sd3.5_medium.safetensors --seed 7

octavo run output/ComfyUI_00001_.png --seed 8

octavo run drawn-in-the-browser.json --convert api.json

A workflow is JSON in ComfyUI's API format or as its web page saves it, or a picture that ComfyUI or Octavo saved with
its workflow inside. In --set, a node is named by its id, its title, or its class where there is only one of it.
"""


def run(
    workflow: Annotated[
        Path | None, typer.Argument(help="Workflow (.json), or a picture with one inside (.png, .webp).")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NODE.INPUT=VALUE", help="Change a value, as 6.text='a fox'; may be repeated."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for every node that has one.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Run this output node only; may be repeated.")
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for pictures.")] = Path("output"),
    input_dir: Annotated[Path, typer.Option("--input-dir", "-i", help="Folder that LoadImage reads.")] = Path("input"),
    models_dir: Annotated[
        Path | None, typer.Option(envvar="OCTAVO_MODELS", help="Folder laid out as ComfyUI's models/.")
    ] = None,
    convert: Annotated[
        Path | None,
        typer.Option(metavar="OUT.json", help="Write the workflow in the API format and leave; '-' for stdout."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Tell whether the workflow can be run, and leave.")] = False,
    list_nodes: Annotated[bool, typer.Option("--list-nodes", help="Print the nodes there are, and leave.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the fastest if unsaid.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; what suits the device if unsaid.")
    ] = None,
    threads: Threads = None,
    speed: Annotated[
        str, typer.Option(help="exact, balanced or fast: how many evaluations are forecast instead of made.")
    ] = "exact",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the paths.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell how each part of the model multiplies, and why.")
    ] = False,
    fast: arithmetic.Fast = False,
    force_fp8: arithmetic.ForceFp8 = False,
    force_fp8_text_encoders: arithmetic.ForceFp8TextEncoders = False,
    vram: memory.Vram = None,
    backend: arithmetic.BackendName = None,
    measure: arithmetic.Measure = None,
    retry_bf16: arithmetic.RetryBf16 = False,
    unet_e4m3fn: arithmetic.UnetE4m3fn = False,
    unet_e5m2: arithmetic.UnetE5m2 = False,
    text_enc_e4m3fn: arithmetic.TextEncE4m3fn = False,
    text_enc_e5m2: arithmetic.TextEncE5m2 = False,
    supports_fp8_compute: arithmetic.SupportsFp8Compute = False,
    attention: arithmetic.AttentionName = None,
    compile: arithmetic.Compile = False,
    graphs: arithmetic.Graphs = None,
) -> None:
    """Run a ComfyUI workflow."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet, highlight=False)
    if verbose:
        show_log(console)
    if list_nodes:
        _print_nodes()
        return
    if workflow is None:
        raise RequestError("Name a workflow: octavo run workflow.json. Ready ones are in examples/workflows.")

    with console.status("Starting …"):
        from octavo.graph.files import read_workflow
        from octavo.graph.overrides import override, with_seed
        from octavo.graph.runner import Workshop
        from octavo.pipeline.run import solve
        from octavo.pipeline.shelf import LoadSettings, Shelf
        from octavo.pipeline.sparing import sparing
        from octavo.pipeline.speed import speed_called
        from octavo.pipeline.tables import Tables
        from octavo.placement.threads import take_threads

        settings = LoadSettings(
            models_dir=models_dir,
            device=device,
            dtype=dtype,
            vram=memory.allowed(vram, device),
            **arithmetic.settings(
                fast=fast,
                force_fp8=force_fp8,
                force_fp8_text_encoders=force_fp8_text_encoders,
                backend=backend,
                measure=measure,
                retry_bf16=retry_bf16,
                unet_e4m3fn=unet_e4m3fn,
                unet_e5m2=unet_e5m2,
                text_enc_e4m3fn=text_enc_e4m3fn,
                text_enc_e5m2=text_enc_e5m2,
                supports_fp8_compute=supports_fp8_compute,
                attention=attention,
                compile=compile,
                graphs=graphs,
            ),
        )
        shelf, cache = Shelf(settings), Tables()
        take_threads(threads, shelf.device)
        workshop = Workshop(
            shelf=shelf,
            solve=lambda run, watch: solve(replace(run, smaller=shelf.smaller), watch, cache=cache),
            on_device=partial(sparing, smaller=shelf.smaller, what="the work of a node"),
            speed=speed_called(speed),
            input_dir=input_dir,
            output_dir=output_dir,
            # Pictures that are only to be looked at stay there until the machine cleans up.
            temp_dir=Path(tempfile.gettempdir()) / "octavo-previews",
        )
        found = read_workflow(workflow, workshop.nodes, workshop.lists)
        prompt = found.prompt
        if isinstance(prompt, Mapping):
            prompt = override(prompt, change or (), workshop.nodes)
            prompt = prompt if seed is None else with_seed(prompt, seed, workshop.nodes)
        if convert is None:
            ready = _checked(workshop, prompt, target)

    if convert is not None:
        _write(_completed(workshop, prompt), convert)
        return
    for node, faults in ready.node_errors.items():
        told = "; ".join(f"{each['message']}: {each['details']}" for each in faults["errors"])
        left_out = ", ".join(faults["dependent_outputs"])
        console.print(f"Node {node} will not do ({told}); output {left_out} is left out.", style="yellow", markup=False)
    if check:
        console.print(
            f"{workflow} can be run: {len(ready.nodes)} nodes for {len(ready.outputs)} outputs.", markup=False
        )
        return
    record = _run(console, workshop, ready, found)
    for path in _pictures(record, workshop):
        print(path, flush=True)


def _checked(workshop: "Workshop", prompt: Any, targets: list[str] | None) -> "Workflow":
    """The workflow, ready to run; a refusal says what to do."""
    from octavo.graph.workflow import InvalidPrompt

    try:
        return workshop.validate(prompt, targets)
    except InvalidPrompt as refused:
        if "completed" in refused.error["extra_info"]:
            raise RequestError(f"{refused}\nOr let Octavo write it: add --convert workflow.json") from refused
        if refused.error["type"] == "prompt_no_outputs" and targets is None:
            raise RequestError(f"{refused}\nAdd a node that keeps a result, such as SaveImage.") from refused
        for id, faults in refused.node_errors.items():
            for name in (each["extra_info"].get("input_name") for each in faults["errors"]):
                wanted = workshop.nodes[faults["class_type"]].inputs.get(name)
                if wanted is None or not callable(wanted.choices):
                    continue
                there = next(iter(wanted.choose_from(workshop.lists)), None)
                hint = f"Put the picture into {workshop.input_dir}, or name another folder with --input-dir"
                if "image_upload" not in wanted.options:
                    hint = "See 'octavo models' for where files are looked for, and 'octavo pull' to fetch them"
                instead = f"; or take another: --set {id}.{name}={there}" if there else "."
                raise RequestError(f"{refused}\n{hint}{instead}") from refused
        raise


def _completed(workshop: "Workshop", prompt: Any) -> Any:
    """The prompt itself, or the whole of which it is a piece."""
    from octavo.graph.fragment import complete, looks_like_nodes

    whole = complete(prompt, workshop.nodes) if looks_like_nodes(prompt) else None
    if whole is None and not isinstance(prompt, Mapping):
        workshop.validate(prompt)  # says what is wrong with it
    return prompt if whole is None else whole


def _run(console: "Console", workshop: "Workshop", workflow: "Workflow", found: "Found") -> "Record":
    """Run it with a bar of nodes and one of steps; a fault of ours keeps its traceback."""
    from octavo.graph.execute import NodeFailedError
    from octavo.graph.runner import run_prompt

    try:
        with _bars(console, workflow) as tell:
            return run_prompt(workshop, workflow, tell, extra_pnginfo=found.extra_pnginfo)
    except NodeFailedError as failed:
        if failed.__cause__ is not None and not isinstance(failed.__cause__, OctavoError):
            raise failed.__cause__ from None
        raise


@contextmanager
def _bars(console: "Console", workflow: "Workflow") -> "Iterator[Emit]":
    """What is told of a run as two bars: nodes done, and steps of the node that is at work."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=console.quiet) as bar:
        nodes = bar.add_task("workflow", total=len(workflow.nodes))
        steps = bar.add_task("", total=None, visible=False)

        def tell(type: str, data: dict[str, Any]) -> None:
            if type == "executing":
                bar.reset(steps, total=None, visible=False)
                bar.update(nodes, description=workflow.nodes[data["node"]].title)
            elif type == "progress":
                bar.update(steps, total=data["max"] or None, completed=data["value"], description="steps", visible=True)
            elif type == "progress_state":
                done = sum(state["state"] == "finished" for state in data["nodes"].values())
                bar.update(nodes, completed=done)
            elif type == "executed":
                for text in data["output"].get("text", ()):
                    console.print(str(text), markup=False)

        yield tell


def _pictures(record: "Record", workshop: "Workshop") -> Iterator[Path]:
    """The files that the workflow's outputs saved, in order."""
    folders = {"output": workshop.output_dir, "temp": workshop.temp_dir}
    for shown in record["outputs"].values():
        for item in (each for items in shown.values() for each in items if isinstance(each, Mapping)):
            if item.get("type") in folders and "filename" in item:
                yield folders[item["type"]] / item.get("subfolder", "") / item["filename"]


def _write(prompt: Any, path: Path) -> None:
    """The workflow in the API format."""
    import json

    text = json.dumps(prompt, indent=2, ensure_ascii=False)
    if str(path) == "-":
        print(text)
        return
    try:
        path.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise RequestError(f"Cannot write {path}: {error.strerror or error}.") from error
    print(path)


def _print_nodes() -> None:
    """Every node with its category, what it takes and what it gives."""
    from octavo.graph.nodes import NODES

    category = None
    for spec in sorted((spec for spec in NODES.values() if spec.listed), key=lambda spec: (spec.category, spec.name)):
        if spec.category != category:
            print(("\n" if category else "") + spec.category)
            category = spec.category
        print(f"  {spec.name}({_inputs(spec)}) → {', '.join(spec.output_types) or 'output'}")


def _inputs(spec: "NodeSpec") -> str:
    given = {name: each for name, each in spec.inputs.items() if each.section != "hidden" and name}
    return ", ".join(f"{name}?" if each.section == "optional" else name for name, each in given.items())
