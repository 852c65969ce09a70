"""Texts that offer choices, as ComfyUI's web page makes them at each run: `a {red|green} fox`."""

import random
import re

DEEPEST = 64  # choices in each other; what lies deeper stays as it is
INNERMOST = re.compile(r"\{([^{}]*)\}")
TO_THE_END = re.compile(r"(?<!:)//[^\n]*")  # but not of an address, https://…


def choose(text: str, lot: random.Random | None = None) -> str:
    r"""Make the choices of a text by lot; they may lie in each other, and `\{` is a brace.

    Remarks, `/* … */` and `// …` to the end of a line, are left out.
    """
    pick = (lot or random).choice
    text = TO_THE_END.sub("", _without_remarks(text)).replace("\\{", "\0").replace("\\}", "\1")
    for _ in range(DEEPEST):
        text, made = INNERMOST.subn(lambda found: pick(found[1].split("|")), text)
        if not made:
            break
    return text.replace("\0", "{").replace("\1", "}")


def _without_remarks(text: str) -> str:
    """Without `/* … */`; one that does not end is none."""
    kept, at = [], 0
    while (start := text.find("/*", at)) >= 0 and (end := text.find("*/", start + 2)) >= 0:
        kept.append(text[at:start])
        at = end + 2
    return "".join([*kept, text[at:]])
