"""Options about FP8 that commands which draw have in common, ComfyUI's spellings of them included.

ComfyUI's `--fast` may be followed by words, and our `info --device` by a name or nothing; typer has no such options.
`plain_words` puts such a command line into words that it takes.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Annotated, Any

import typer

from octavo.errors import RequestError

OURS, COMFYUI, SPEED = "FP8", "ComfyUI's spellings", "Speed"

Fast = Annotated[
    bool,
    typer.Option(
        "--fast", help="Let inputs of FP8 layers be rounded too, where that saves time.", rich_help_panel=OURS
    ),
]
ForceFp8 = Annotated[
    bool,
    typer.Option("--force-fp8", help="Quantize the model at load, whatever the file holds.", rich_help_panel=OURS),
]
ForceFp8TextEncoders = Annotated[
    bool,
    typer.Option("--force-fp8-text-encoders", help="Quantize the text encoders at load.", rich_help_panel=OURS),
]
BackendName = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="How to multiply by FP8 weights, by name; what suits each layer if unsaid. See 'octavo info --device'.",
        rich_help_panel=OURS,
    ),
]
Measure = Annotated[
    bool | None,
    typer.Option(
        "--measure/--no-measure",
        envvar="OCTAVO_MEASURE",
        help="Choose how to multiply by measured times; on CUDA devices only if unsaid.",
        rich_help_panel=OURS,
    ),
]
RetryBf16 = Annotated[
    bool,
    typer.Option(
        "--retry-bf16",
        help="Let an FP8 layer that gives NaN or infinity go on in bfloat16 rather than end the run.",
        rich_help_panel=OURS,
    ),
]
UnetE4m3fn = Annotated[
    bool, typer.Option("--fp8_e4m3fn-unet", help="Same as --force-fp8.", rich_help_panel=COMFYUI, show_default=False)
]
UnetE5m2 = Annotated[
    bool, typer.Option("--fp8_e5m2-unet", help="--force-fp8 in e5m2.", rich_help_panel=COMFYUI, show_default=False)
]
TextEncE4m3fn = Annotated[
    bool,
    typer.Option(
        "--fp8_e4m3fn-text-enc", help="Same as --force-fp8-text-encoders.", rich_help_panel=COMFYUI, show_default=False
    ),
]
TextEncE5m2 = Annotated[
    bool,
    typer.Option(
        "--fp8_e5m2-text-enc", help="--force-fp8-text-encoders in e5m2.", rich_help_panel=COMFYUI, show_default=False
    ),
]
SupportsFp8Compute = Annotated[
    bool,
    typer.Option(
        "--supports-fp8-compute",
        help="Act as if the GPU could multiply in FP8. '--fast fp8_matrix_mult' is --fast.",
        rich_help_panel=COMFYUI,
        show_default=False,
    ),
]

AttentionName = Annotated[
    str | None,
    typer.Option(
        "--attention",
        help="How the model attends, by name; by measured times if unsaid. See 'octavo info --device'.",
        rich_help_panel=SPEED,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the model's blocks by torch.compile; the first step waits.", rich_help_panel=SPEED
    ),
]
Graphs = Annotated[
    bool | None,
    typer.Option(
        "--graphs/--no-graphs",
        help="Replay the model's work as CUDA graphs; on CUDA devices if unsaid.",
        rich_help_panel=SPEED,
    ),
]

FP8_PRODUCTS = "fp8_matrix_mult"
ELSEWHERE = ("fp16_accumulation", "cublas_ops", "autotune")  # what else ComfyUI's --fast takes


def settings(
    *,
    fast: bool,
    force_fp8: bool,
    force_fp8_text_encoders: bool,
    backend: str | None,
    measure: bool | None,
    retry_bf16: bool,
    unet_e4m3fn: bool,
    unet_e5m2: bool,
    text_enc_e4m3fn: bool,
    text_enc_e5m2: bool,
    supports_fp8_compute: bool,
    attention: str | None = None,
    compile: bool = False,
    graphs: bool | None = None,
) -> dict[str, Any]:
    """The options as `octavo.load` takes them."""
    return {
        "fast": fast,
        "force_fp8": _format("unet", force_fp8 or unet_e4m3fn, unet_e5m2),
        "force_fp8_text_encoders": _format("text-enc", force_fp8_text_encoders or text_enc_e4m3fn, text_enc_e5m2),
        "supports_fp8_compute": supports_fp8_compute,
        "backend": backend,
        "measure": measure,
        "retry_bf16": retry_bf16,
        "attention": attention,
        "compile": compile,
        "graphs": graphs,
    }


def _format(of: str, e4m3fn: bool, e5m2: bool) -> str | bool:
    if e4m3fn and e5m2:
        raise RequestError(f"--fp8_e5m2-{of} and e4m3fn are asked for at once; choose one of them.")
    return "e5m2" if e5m2 else e4m3fn


def plain_words(words: Sequence[str]) -> list[str]:
    """The command line without the words that may follow `--fast` in ComfyUI's, and with the device left out of `info`.

    Raises:
        RequestError: one of them names something that only ComfyUI has.
    """
    plain, after_fast = list[str](), False
    for word in _with_device(words):
        if after_fast and word in ELSEWHERE:
            raise RequestError(
                f"--fast {word} is ComfyUI's alone. Octavo's --fast is about FP8 products; write it without a word."
            )
        if not (after_fast and word == FP8_PRODUCTS):
            plain.append(word)
            after_fast = word == "--fast"
    return plain


def _with_device(words: Sequence[str]) -> Iterator[str]:
    """`info --device` without a name asks for the fastest device."""
    for word, following in zip_longest(words, words[1:], fillvalue="-"):
        yield word
        if words[0] == "info" and word == "--device" and following.startswith("-"):
            yield "auto"
