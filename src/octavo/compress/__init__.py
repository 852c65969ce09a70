"""A 16-bit checkpoint becomes an FP8 one: measured, streamed, and gone on with after an interruption.

`job` is the page to start from. It reads the model through `blocks`, one block at a time; `prompts` and `points` are
what it is calibrated on, `sensitivity` chooses what stays in 16 bits, `gate` judges the result.
"""
