"""A server to be killed: `python victim.py FOLDER NAME [drain]`.

It submits requests without end and says on its standard output which of them were accepted; with "drain" it submits
nothing and leaves when all are over. A request of kind "killer" kills it.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.engine.queue import Queue
from octavo.engine.service import Service, Task

PICTURES = 2  # files that a request makes
PARTS = 3  # writes that a file takes


def draw(output: Path, task: Task) -> Mapping[str, Any]:
    names = []
    for n in range(PICTURES):
        path = output / f"{task.job.id}-{n}.png"
        task.note_file(path)
        with path.open("x") as file:
            for _ in range(PARTS):
                file.write(task.job.id)
                file.flush()
                time.sleep(0.002)
        names.append(path.name)
    return {"files": names}


def kill(_: Task) -> Mapping[str, Any]:
    time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def main(folder: Path, name: str, *, drain: bool) -> None:
    output = folder / "output"
    output.mkdir(exist_ok=True)
    queue = Queue(folder / "queue.sqlite3")
    service = Service(queue, {"draw": lambda task: draw(output, task), "killer": kill}, workers=4)
    service.start()
    print("ready", flush=True)
    n = 0
    while not drain or any(queue.depth().values()):
        if drain or queue.depth()["queued"] > 12:
            time.sleep(0.005)
            continue
        job = service.submit("draw", {"n": n}, id=f"{name}-{n}", client=f"client {n % 3}")
        print(job.id, flush=True)
        n += 1
    service.stop()
    queue.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], drain="drain" in sys.argv[3:])
