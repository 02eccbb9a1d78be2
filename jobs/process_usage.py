"""What a program and all processes below it use: CPU seconds and memory, read from /proc while it runs.

Ray starts a dozen processes under the one that calls it. On a machine that others use as well, seconds of
CPU say what work costs, where seconds on the wall say who else was there.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
START = 19  # of what _stat returns: when the process began, which tells it from a later one of the same number


@dataclass(frozen=True)
class Sample:
    """At `time` (monotonic): CPU seconds of our processes, of this one alone, of the whole machine; our memory."""

    time: float
    ours_s: float
    driver_s: float
    machine_s: float
    memory_mb: float


@dataclass(frozen=True)
class Usage:
    """What happened between two moments."""

    wall_s: float
    ours_s: float
    driver_s: float
    machine_s: float

    @property
    def free_cores(self) -> float:
        """Cores that others left to us."""
        return (os.cpu_count() or 1) - (self.machine_s - self.ours_s) / self.wall_s


class UsageSampler:
    """Samples in a thread while its block runs. `memory` costs more time, and is wanted only where it is looked at.

    What a process had worked when it was last seen stays counted after its end; what it did since, at most
    `every_s`, is lost.
    """

    def __init__(self, every_s: float = 1, memory: bool = False) -> None:
        self.every_s = every_s
        self.memory = memory
        self.samples: list[Sample] = []
        self._worked = dict[tuple[int, str], float]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def between(self, start: float, end: float) -> Usage:
        """The usage between two moments of the monotonic clock, from the samples around them."""
        first, last = self._at(start), self._at(end)
        return Usage(end - start, *(b - a for a, b in zip(first, last, strict=True)))

    @property
    def peak_mb(self) -> float:
        return max(sample.memory_mb for sample in self.samples)

    def _at(self, moment: float) -> tuple[float, float, float]:
        times = [sample.time for sample in self.samples]
        after = min(max(bisect_left(times, moment), 1), len(times) - 1)
        a, b = self.samples[after - 1], self.samples[after]
        share = (moment - a.time) / (b.time - a.time)
        return (
            a.ours_s + share * (b.ours_s - a.ours_s),
            a.driver_s + share * (b.driver_s - a.driver_s),
            a.machine_s + share * (b.machine_s - a.machine_s),
        )

    def _run(self) -> None:
        self._sample()
        while not self._stop.wait(self.every_s):
            self._sample()
        self._sample()

    def _sample(self) -> None:
        pids = descendants(os.getpid())
        looking_s = time.thread_time()  # costs a good deal where many processes run, and is not what is measured
        self.samples.append(
            Sample(
                time=time.monotonic(),
                ours_s=self._ours_s(pids) - looking_s,
                driver_s=time.process_time() - looking_s,
                machine_s=_machine_s(),
                memory_mb=sum(map(memory_mb, pids)) if self.memory else 0.0,
            )
        )

    def _ours_s(self, pids: set[int]) -> float:
        """CPU time of these processes and of all seen before: a sum that never falls."""
        for pid in pids:
            if fields := _stat(pid):
                self._worked[pid, fields[START]] = sum(map(int, fields[11:13])) / TICKS_A_SECOND
        return sum(self._worked.values())


def descendants(root: int) -> set[int]:
    """The ids of a process and of all that it has started, however indirectly."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*"):
        if fields := _stat(int(entry.name)):
            children[int(fields[1])].append(int(entry.name))
    found, waiting = set(), [root]
    while waiting:
        process = waiting.pop()
        found.add(process)
        waiting += children[process]
    return found


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold anything; none of a process that has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _machine_s() -> float:
    """CPU time of everybody, and what a hypervisor gave to others: all but idle and waiting."""
    names = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, names)
    return (user + nice + system + irq + softirq + steal) / TICKS_A_SECOND


def memory_mb(process: int) -> float:
    """Proportional set size: pages that several processes share are counted once in all."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0.0)
