"""`octavo serve`: one server for ComfyUI's, AUTOMATIC1111's and OpenAI's clients and our own page."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli import arithmetic, memory
from octavo.cli.threads import Threads
from octavo.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.server.settings import Settings

EPILOG = """[bold]Examples[/]

octavo serve

octavo serve --model sd3.5_large_fp8_scaled --fast

octavo serve --add-key alice; octavo serve --host 0.0.0.0 --allowed-host pictures.example

octavo serve --config octavo.toml

Every option may be written in a TOML file (max-pixels = 1048576) and in the environment (OCTAVO_MAX_PIXELS); the
command line goes before the environment, and that before the file.
"""
KEYS, LIMITS, FILES = "Who may come in", "Limits", "Files"


def serve(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Draws when a request names none; the embedded one if unsaid.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen at; 0.0.0.0 for all (127.0.0.1 if unsaid).")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one (8188 if unsaid).")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings; $OCTAVO_CONFIG if unsaid.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key that opens the server, beside those made by --add-key.", rich_help_panel=KEYS),
    ] = None,
    add_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Make a key, print it once, and leave.", rich_help_panel=KEYS)
    ] = None,
    key_priority: Annotated[
        int, typer.Option(help="With --add-key: the higher, the sooner its requests are done.", rich_help_panel=KEYS)
    ] = 0,
    remove_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take a key away, and leave.", rich_help_panel=KEYS)
    ] = None,
    allow_anonymous: Annotated[
        bool | None, typer.Option("--allow-anonymous", help="Let in who has no key.", rich_help_panel=KEYS)
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A name this server is called by, such as pictures.example.", rich_help_panel=KEYS),
    ] = None,
    public_url: Annotated[
        str | None,
        typer.Option(help="Behind a proxy: the address to give out, https://pictures.example.", rich_help_panel=KEYS),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(help="An origin whose pages may call, such as https://pictures.example.", rich_help_panel=KEYS),
    ] = None,
    models_dir: Annotated[
        Path | None, typer.Option(help="Folder laid out as ComfyUI's models/; $OCTAVO_MODELS.", rich_help_panel=FILES)
    ] = None,
    text_encoder: Annotated[
        list[str] | None, typer.Option(help="Encoder to use instead of those found.", rich_help_panel=FILES)
    ] = None,
    vae: Annotated[str | None, typer.Option(help="VAE to use instead of the one found.", rich_help_panel=FILES)] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Queue, keys, uploads, workflows (data if unsaid).", rich_help_panel=FILES)
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where pictures go (output if unsaid).", rich_help_panel=FILES)
    ] = None,
    input_dir: Annotated[
        Path | None,
        typer.Option(help="Pictures to start from, for ComfyUI (input/ in the data if unsaid).", rich_help_panel=FILES),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Requests under way at once (16 if unsaid).", rich_help_panel=LIMITS)
    ] = None,
    queue_limit: Annotated[
        int | None, typer.Option(help="Requests that may wait (1000 if unsaid).", rich_help_panel=LIMITS)
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option(help="exact, balanced or fast, where a request says none, and for workflows (exact if unsaid)."),
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Pixels of a picture to draw (4194304 if unsaid).", rich_help_panel=LIMITS)
    ] = None,
    max_upload_pixels: Annotated[
        int | None, typer.Option(help="Pixels of a picture sent (50000000 if unsaid).", rich_help_panel=LIMITS)
    ] = None,
    max_body: Annotated[
        int | None, typer.Option(help="Bytes of a request (67108864 if unsaid).", rich_help_panel=LIMITS)
    ] = None,
    body_timeout: Annotated[
        float | None, typer.Option(help="Seconds a sender may pause (30 if unsaid).", rich_help_panel=LIMITS)
    ] = None,
    job_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds for a request, where it names none.", rich_help_panel=LIMITS),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="plain or json (plain if unsaid).")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error (info if unsaid).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the fastest if unsaid.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; by the device if unsaid.")] = None,
    threads: Threads = None,
    tiled_vae: Annotated[
        bool | None,
        typer.Option("--tiled-vae/--whole-vae", help="Decode in tiles, or never; by free memory if unsaid."),
    ] = None,
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
    """Serve pictures: ComfyUI's page and API, AUTOMATIC1111's and OpenAI's APIs, and a page of our own."""
    from rich.console import Console

    from octavo.server.settings import gather

    loading = arithmetic.settings(
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
    )
    given = {
        "model": model, "host": host, "port": port, "api_keys": _several(api_key), "allow_anonymous": allow_anonymous,
        "allowed_hosts": _several(allowed_host), "cors": _several(cors), "public_url": public_url,
        "models_dir": models_dir, "data_dir": data_dir,
        "output_dir": output_dir, "input_dir": input_dir, "workers": workers, "queue_limit": queue_limit,
        "max_pixels": max_pixels, "max_upload_pixels": max_upload_pixels, "max_body": max_body, "speed": speed,
        "body_timeout": body_timeout, "job_timeout": job_timeout, "log_format": log_format, "log_level": log_level,
        "device": device, "dtype": dtype, "threads": threads, "tiled_vae": tiled_vae, "vram": vram, "vae": vae,
        "text_encoders": _several(text_encoder),
        # A flag that is not given says nothing, so that the file may.
        **{name: value for name, value in loading.items() if value is not False},
    }  # fmt: skip
    settings = gather(given, file=config)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if add_key is not None or remove_key is not None:
        _change_keys(settings, add_key, key_priority, remove_key, console)
        return
    _start(settings, console)


def _start(settings: "Settings", console: "Console") -> None:
    """Check all that can be checked at once, tell the addresses, and serve."""
    check_model(settings)
    memory.allowed(settings.loading.get("vram"), settings.loading.get("device"))
    _check_threads(settings)
    from octavo.server import logs
    from octavo.server.keys import Keys
    from octavo.server.run import Server, address_of, bind, run

    keys = Keys(settings.keys_file, settings.api_keys)
    if not (settings.loopback or keys or settings.allow_anonymous):
        raise RequestError(
            f"--host {settings.host} lets other machines in, but there is no key. Make one with 'octavo serve "
            "--add-key NAME', or let everyone in with --allow-anonymous."
        )
    door = bind(settings)
    try:
        logs.set_up(sys.stderr, form=settings.log_format, level=settings.log_level)
        server = Server(settings)
        if settings.log_format == "plain":
            _greet(console, address_of(door, settings), settings, bool(keys))
        run(server, door)
    finally:
        door.close()


def check_model(settings: "Settings") -> None:
    """Refuse a model that is not there before anything is started; torch is not needed for this.

    Raises:
        ModelNotFoundError: no such model.
    """
    if settings.model is not None:
        from octavo.checkpoint.folders import MODELS, Folders

        Folders.standard(settings.models_dir).find(settings.model, *MODELS)


def _check_threads(settings: "Settings") -> None:
    """Refuse a number of threads that means nothing here; torch is imported only where one is named."""
    if settings.threads is not None:
        from octavo.devices import pick_device
        from octavo.placement.threads import check_threads

        check_threads(settings.threads, pick_device(settings.loading.get("device")))


def _greet(console: "Console", address: str, settings: "Settings", locked: bool) -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    places: Mapping[str, str] = {
        "Page": "/", "ComfyUI": "/comfy", "A1111 API": "/sdapi/v1", "OpenAI API": "/v1", "All routes": "/docs",
    }  # fmt: skip
    for name, path in places.items():
        table.add_row(f"[dim]{name}[/]", f"[bold]{address}{path}[/]")
    console.print(table)
    if not locked and settings.loopback:
        console.print("Open to the programs of this machine. Ctrl-C stops.", style="dim")
    elif not locked:
        console.print("Open to everyone who can reach this machine. Ctrl-C stops.", style="yellow")
    else:
        console.print("Keys are needed. Browsers ask for them: any name, and the key as password.", style="dim")


def _change_keys(settings: "Settings", add: str | None, priority: int, remove: str | None, console: "Console") -> None:
    from octavo.server.keys import add_key, remove_key

    if remove is not None:
        remove_key(settings.keys_file, remove)
        console.print(f"'{remove}' opens nothing any more.", markup=False)
    if add is not None:
        key = add_key(settings.keys_file, add, priority=priority)
        console.print(f"The key of '{add}', shown this once; {settings.keys_file} keeps its hash:", markup=False)
        print(key)


def _several(values: list[str] | None) -> tuple[str, ...] | None:
    return tuple(values) if values else None
