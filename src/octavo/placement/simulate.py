"""A simulated device: a clock that computes, a clock that copies, buffers and bytes.

It follows a list of tasks as the real thing does. Copies run one after the other on a stream of their own, each as soon
as a buffer of its pool is free; a task computes when what it needs has arrived and the task before it is done. A stage
begins when the one before it is over: its buffers are another's memory until then.

Laws that follow, and that tests hold it to: the whole takes at least what either clock works and at most what both do;
more buffers never make it slower; where no task computes for less time than the next one's copy takes, two buffers hide
all copies but the first.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One step of a schedule."""

    stage: str
    name: str
    compute: float  # seconds
    copy: int = 0  # bytes that have to arrive before
    pool: str = ""  # whose buffers they go to


@dataclass(frozen=True, slots=True)
class Event:
    """What one of the clocks did."""

    clock: str  # copy, compute
    stage: str
    name: str
    start: float  # seconds from the beginning
    stop: float
    held: int  # bytes in buffers when it began, its own among them


@dataclass(slots=True)
class Timeline:
    """What happened, in the order it began on each clock."""

    events: list[Event] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    buffers: dict[str, int] = field(default_factory=dict)  # by stage: most bytes in buffers

    @property
    def total(self) -> float:
        """Seconds from the beginning to the end."""
        return sum(self.seconds.values())

    def busy(self, clock: str, stage: str | None = None) -> float:
        """Seconds that a clock worked, in all or in one stage."""
        return sum(e.stop - e.start for e in self.events if e.clock == clock and stage in (None, e.stage))

    def waited(self, stage: str | None = None) -> float:
        """Seconds that the computing clock stood still."""
        total = self.total if stage is None else self.seconds.get(stage, 0.0)
        return max(0.0, total - self.busy("compute", stage))  # sums of floats may fall a hair below


def simulate(tasks: Sequence[Task], *, slots: Mapping[str, int], link: float) -> Timeline:
    """Follow the tasks.

    Args:
        tasks: in the order of their work, stage by stage.
        slots: buffers of each pool, 1 at least; each holds one task's bytes from the start of its copy to the end of
            its work.
        link: bytes/s.
    """
    timeline = Timeline()
    copied = computed = 0.0  # when each clock is free
    stage, began = "", 0.0
    pools: dict[str, deque[tuple[float, int]]] = {}  # by pool: when each of its last tasks was done, and its bytes
    for task in tasks:
        if task.stage != stage:
            if stage:
                timeline.seconds[stage] = timeline.seconds.get(stage, 0.0) + computed - began
            stage, began, pools = task.stage, computed, {}
            copied = max(copied, computed)
        arrived = computed
        if task.copy:
            pool = pools.setdefault(task.pool, deque(maxlen=slots[task.pool]))
            free = pool[0][0] if len(pool) == pool.maxlen else began
            start = max(copied, free)
            arrived = copied = start + task.copy / link
            held = task.copy + sum(n for each in pools.values() for done, n in each if done > start)
            timeline.events.append(Event("copy", stage, task.name, start, arrived, held))
            timeline.buffers[stage] = max(timeline.buffers.get(stage, 0), held)
        start = max(computed, arrived)
        computed = start + task.compute
        if task.copy:
            pools[task.pool].append((computed, task.copy))
        held = sum(n for each in pools.values() for done, n in each if done > start)
        timeline.events.append(Event("compute", stage, task.name, start, computed, held))
    if stage:
        timeline.seconds[stage] = timeline.seconds.get(stage, 0.0) + computed - began
    return timeline
