"""ComfyUI's API and its page.

`routes` joins everything. A prompt's way is `queue` (in), `socket` (what happens), `history` (what came of it);
`files`, `userdata` and `info` are what the page needs beside.
"""

from octavo.server.comfy.routes import install

__all__ = ["install"]
