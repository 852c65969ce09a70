"""Files ↔ models.

`header` and `tensors` read safetensors; `source` opens whatever a path leads to; `kinds` and `detect` tell what it is;
`layout` knows the names and `scales` the FP8 forms; `plan` settles how a file becomes a model and `load` does it.
`save` writes files, `folders` finds them, `describe` explains them, `presets` says how a model is best used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.checkpoint.load import load_clip, load_mmdit, load_t5, load_vae

__all__ = ["load_clip", "load_mmdit", "load_t5", "load_vae"]


def __getattr__(name: str) -> object:
    # Deferred: finding and fetching files needs neither torch nor the models.
    if name in __all__:
        from octavo.checkpoint import load

        return getattr(load, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
