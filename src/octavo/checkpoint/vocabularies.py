"""The vocabularies of a model's text encoders as files: those that lie beside it, or the built-in ones written out."""

import json
from pathlib import Path
from typing import Any

from octavo.checkpoint.configs import TOKENIZERS
from octavo.checkpoint.kinds import Kind
from octavo.checkpoint.plan import Plan
from octavo.models import ClipConfig, T5Config
from octavo.text.vocabulary import CLIP_END, CLIP_START, clip_vocabulary, t5_vocabulary

FOLDERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
MAX_BYTES = 50_000_000  # of one file; the largest vocabulary in use has 2 million


def is_released(plan: Plan) -> bool:
    """Whether the encoder takes the vocabulary that all released ones take, and which is built in."""
    config = plan.config
    if isinstance(config, ClipConfig):
        return config.vocab_size == clip_vocabulary().size
    return isinstance(config, T5Config) and config.vocab_size >= t5_vocabulary().size


def beside_file(plan: Plan) -> bytes | None:
    """The tokenizer.json that belongs to an encoder of its own vocabulary; None where there is none to be found."""
    path = plan.located.file.path
    places = [path.with_name(f"{path.stem}.tokenizer.json")]
    if path.parent.name in FOLDERS:
        places.append(path.parent.parent / FOLDERS[path.parent.name] / "tokenizer.json")
    found = next((place for place in places if place.is_file()), None)
    return None if found is None else found.read_bytes()


def in_folder(plan: Plan) -> dict[Path, bytes]:
    """The tokenizer folder of an encoder, as transformers reads it; empty where its vocabulary is not known."""
    kind = plan.located.part.kind
    own = _folder_beside(plan)
    if own is not None:
        files = [path for path in sorted(own.iterdir()) if path.is_file() and path.stat().st_size <= MAX_BYTES]
        return {Path(TOKENIZERS[kind][0], path.name): path.read_bytes() for path in files}
    if (given := beside_file(plan)) is not None:
        texts = {"tokenizer.json": given, "tokenizer_config.json": _json(_settings(kind, plan, plain=True))}
    elif not is_released(plan):
        return {}
    elif isinstance(plan.config, ClipConfig):
        texts = _clip_files()
        texts["tokenizer_config.json"] = _json(_settings(kind, plan))
    else:
        texts = {
            "tokenizer.json": t5_vocabulary().tokenizer.to_str().encode(),
            "tokenizer_config.json": _json(_settings(kind, plan)),
        }
    return {Path(TOKENIZERS[kind][0], name): text for name, text in texts.items()}


def _folder_beside(plan: Plan) -> Path | None:
    parent = plan.located.file.path.parent
    folder = parent.parent / FOLDERS.get(parent.name, "")
    return folder if parent.name in FOLDERS and folder.is_dir() else None


def _clip_files() -> dict[str, bytes]:
    """vocab.json and merges.txt."""
    model = json.loads(clip_vocabulary().tokenizer.to_str())["model"]
    ids = dict(sorted(clip_vocabulary().tokenizer.get_vocab().items(), key=lambda item: item[1]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {"vocab.json": _json(ids), "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode()}


def _settings(kind: Kind, plan: Plan, *, plain: bool = False) -> dict[str, Any]:
    """tokenizer_config.json; `plain` for a vocabulary whose special tokens only its tokenizer.json knows."""
    config = plan.config
    if isinstance(config, ClipConfig):
        # CLIP-G was trained with zeros after the end; "!" is the token of id 0, as in the released folders.
        padding = CLIP_END if kind == "clip_l" else "!"
        tokens = {"bos_token": CLIP_START, "eos_token": CLIP_END, "unk_token": CLIP_END, "pad_token": padding}
        length = config.positions
    else:
        tokens = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        length = 512
    if plain:
        return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    return {"tokenizer_class": TOKENIZERS[kind][1], "model_max_length": length, **tokens}


def _json(fields: object) -> bytes:
    return json.dumps(fields, indent=1, ensure_ascii=False).encode()
