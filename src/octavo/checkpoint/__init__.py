"""Files ↔ models.

`header` and `tensors` read safetensors, `kinds` and `detect` tell what a file is, `layout` knows the names, `scales`
the FP8 forms, `load` streams a file into a model, `save` writes one, `folders` finds it, `describe` explains it.
"""
