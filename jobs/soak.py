"""`make soak HOURS=4`: the real application for hours, with clients that come, talk, go and vanish, and with kills.

Samples memory, file descriptors and processes of everything that was started, KV memory set aside, and keys and
memory of Redis. Ends with a verdict by slope: what grew over the run by more than its own ups and downs explain.
Sessions are as many at the end as at the beginning, so nothing has a reason to grow. Exit status 1 when something
does, or when a client's books are wrong; a run of a few minutes shows that all of this works and judges no growth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import numpy as np

from actors.redis_errors import FAILURES
from actors.redis_server import RedisServerError
from actors.tasks import end_all
from jobs.chaos import picture, until_whole
from jobs.chaos_application import Application, ChaosError, end_in_order_on_signal, tiny_settings
from jobs.chaos_client import Books, ChaosClient
from jobs.chaos_faults import FAULTS, asking
from jobs.chaos_report import machine
from jobs.process_usage import memory_mb

log = logging.getLogger(__name__)

RESUME_S = 60.0  # as served
EVERY_S = 5.0
LIFE_S = (20.0, 120.0)
KILL_EVERY_S = (60.0, 180.0)
KILLS = ("llm killed", "encoder killed", "gateway killed")
WARM_UP = 0.3  # of the run: interpreters fill their arenas, every kind of replica has been replaced once
# Until as many sessions are forgotten as begin: one lives, its client vanishes and is given up at the second look,
# its log is kept once more.
SETTLED_S = LIFE_S[1] + 2.5 * RESUME_S
GROWTH = 0.05  # of the level, over the rest of the run
VANISH = 0.25
KV = "videollm_kv_positions_reserved"


@dataclass
class SoakReport:
    """`samples` holds rows of `seconds` and every series; `verdicts` growth over the run after the warm-up."""

    machine: dict[str, str | int | float]
    notes: list[str]
    hours: float
    samples: list[dict[str, float]] = field(default_factory=list)
    kills: list[tuple[float, str]] = field(default_factory=list)
    sessions: int = 0
    vanished: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def verdicts(self) -> dict[str, tuple[float, float, bool]]:
        """For each series: its level, its growth after the warm-up, and whether that is growth; none of a short run."""
        if self.short:
            return {}
        warm_s = max(WARM_UP * 3600 * self.hours, SETTLED_S)
        rows = [row for row in self.samples if row["seconds"] >= warm_s]
        found = {}
        for name in self.samples[0] if self.samples else ():
            values = np.array([row[name] for row in rows if name in row])
            if name != "seconds" and len(values) > 3:
                found[name] = growth(np.array([row["seconds"] for row in rows if name in row]), values)
        return found

    @property
    def short(self) -> bool:
        """Whether the run was too short for a verdict."""
        return 3600 * self.hours < 2 * SETTLED_S

    @property
    def flat(self) -> bool | None:
        """Whether there are samples of which none grew; None after a run too short for a verdict."""
        verdicts = self.verdicts
        return None if self.short else bool(verdicts) and not any(grows for _, _, grows in verdicts.values())

    def table(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.machine.items()]
        lines += [f"{self.hours:.2f} h, {self.sessions} sessions ({self.vanished} clients vanished)"]
        lines += [f"{len(self.kills)} kills", "", f"{'':<22} {'level':>10} {'growth':>10}"]
        for name, (level, grown, grows) in self.verdicts.items():
            lines.append(f"{name:<22} {level:>10.1f} {grown:>+10.1f}  {'GROWS' if grows else 'flat'}")
        if self.short:
            lines.append(
                f"no verdict: it takes {2 * SETTLED_S / 60:g} min until ended sessions are forgotten as others begin"
            )
        lines += [f"wrong books: {len(self.wrong)}", *self.wrong[:10], *self.notes]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write `path`.json and `path`.png."""
        path.parent.mkdir(parents=True, exist_ok=True)
        verdicts = {
            name: {"level": round(level, 2), "growth": round(grown, 2), "grows": grows}
            for name, (level, grown, grows) in self.verdicts.items()
        }
        document = asdict(self) | {"verdicts": verdicts, "flat": self.flat}
        path.with_name(path.name + ".json").write_text(json.dumps(document, indent=1) + "\n")
        if self.samples:
            self._plot(path.with_name(path.name + ".png"))

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        names = [name for name in self.samples[0] if name != "seconds"]
        figure = Figure(figsize=(11, 2 * len(names)), layout="constrained")
        for panel, name in zip(np.atleast_1d(figure.subplots(len(names), 1, sharex=True)), names, strict=True):
            rows = [row for row in self.samples if name in row]
            panel.plot([row["seconds"] / 60 for row in rows], [row[name] for row in rows])
            for at, _ in self.kills:
                panel.axvline(at / 60, color="red", alpha=0.2)
            panel.set_ylim(0, 1.1 * max(row[name] for row in rows) or 1.0)
            panel.set_ylabel(name, fontsize=8)
        panel.set_xlabel("minutes (red: a replica was killed)")
        figure.suptitle(f"soak: {self.hours:.2f} h, {self.machine['date']}, {self.machine['cpu']}", fontsize=10)
        figure.savefig(path, dpi=80)


def growth(seconds: np.ndarray, values: np.ndarray) -> tuple[float, float, bool]:
    """Level of a series, its growth along a straight line, and whether that is more than its ups and downs."""
    slope, start = np.polyfit(seconds, values, 1)
    level, grown = float(values.mean()), float(slope * (seconds[-1] - seconds[0]))
    noise = float((values - (slope * seconds + start)).std())
    return level, grown, grown > max(GROWTH * level, 2 * noise, 1.0)


async def soak(app: Application, sessions: int, seed: int, seconds: float, report: SoakReport) -> None:
    """Keep `sessions` clients there until the time is up, kill now and then, and sample."""
    await until_whole(app)
    began, chosen = time.monotonic(), random.Random(seed)
    end = began + seconds
    visitors = [_visit(app, random.Random(seed * 1000 + n), end, report) for n in range(sessions)]
    tasks = [asyncio.create_task(work) for work in [*visitors, _kill(app, chosen, began, end, report)]]
    try:
        while time.monotonic() + EVERY_S < end:  # clients leave at the end: no sample of that
            await asyncio.sleep(EVERY_S)
            await asyncio.gather(*(task for task in tasks if task.done()))
            with suppress(httpx.HTTPError, *FAILURES):
                report.samples.append(await _sample(app, time.monotonic() - began))
        await asyncio.gather(*tasks)
    finally:
        report.hours = (time.monotonic() - began) / 3600
        await end_all(tasks)


async def _visit(app: Application, chosen: random.Random, end: float, report: SoakReport) -> None:
    """One client after another; some say goodbye, some are just gone."""
    start = time.monotonic()
    while (began := time.monotonic()) < end:
        stop = asyncio.Event()
        client = ChaosClient(app.url, picture(), chosen.randrange(1 << 30), chosen.random() < 0.25, stop)
        task = asyncio.create_task(client.run(audit=False))
        await asyncio.wait([task], timeout=min(chosen.uniform(*LIFE_S), max(0.0, end - time.monotonic())))
        report.sessions += 1
        if chosen.random() < VANISH and not task.done():
            report.vanished += 1
            await end_all([task])
            continue
        stop.set()
        books = await task
        if problem := _wrong(books):
            report.wrong.append(f"{began - start:.0f} to {time.monotonic() - start:.0f} s, {problem}")


def _wrong(books: Books) -> str:
    """What is wrong with a session that said its end; nothing where all is well."""
    if books.sound:
        return ""
    counted = {name: getattr(books, name) for name in ("duplicated", "disorder", "lost", "unanswered", "connections")}
    unheard = sorted(books.asked - set(books.heard))
    last = max(books.told.values(), default=-1)
    return (
        f"{books.session_id} {books.outcome}: {counted}, undecided {books.undecided[:50]} of {books.acknowledged}, "
        f"unheard {unheard[:10]}, last position {last}, {books.errors[-5:]}"
    )


async def _kill(app: Application, chosen: random.Random, began: float, end: float, report: SoakReport) -> None:
    """Every kind of replica in turn, for as long as there is time to come back."""
    for name in (KILLS * 10_000)[chosen.randrange(len(KILLS)) :]:
        pause_s = min(chosen.uniform(*KILL_EVERY_S), (end - began) / 4)  # twice in the shortest runs, too
        if time.monotonic() + pause_s > end - RESUME_S:
            return
        await asyncio.sleep(pause_s)
        await FAULTS[name](app, chosen, b"")
        report.kills.append((round(time.monotonic() - began, 1), name))
        log.info("fault=%s", name)


async def _sample(app: Application, seconds: float) -> dict[str, float]:
    """One row of samples. Raises httpx.HTTPError or one of FAILURES where nobody answers right now."""
    async with httpx.AsyncClient(timeout=10) as http:
        metrics = (await http.get(f"{app.url}/metrics")).raise_for_status().text
    async with asking(app.redis_url) as client:
        keys, [info] = await client.run("", ("DBSIZE",)), (await client.infos()).values()
    pids = await asyncio.to_thread(app.processes)
    return {
        "seconds": round(seconds, 1),
        "memory MB": round(await asyncio.to_thread(lambda: sum(map(memory_mb, pids))), 1),
        "file descriptors": float(sum(map(_descriptors, pids))),
        "processes": float(len(pids)),
        "KV positions": sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(KV)),
        "Redis keys": float(str(keys)),
        "Redis KB": round(float(str(info["used_memory"])) / 1e3, 1),
    }


def _descriptors(pid: int) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 when something grows, books are wrong, or the application does not run."""
    parser = argparse.ArgumentParser(prog="python -m jobs.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hours", type=float, default=4.0, help="to run for (default %(default)g)")
    parser.add_argument("--sessions", type=int, default=8, help="at a time (default %(default)d)")
    parser.add_argument(
        "--replicas", type=int, default=2, help="of gateway, encoder and LLM each (default %(default)d)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of who comes and what is killed (default %(default)d)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write FILE.json and FILE.png")
    parser.add_argument("--note", action="append", default=[], help="a line for the report")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    end_in_order_on_signal()
    report = SoakReport(machine(options.seed, options.sessions, options.replicas), list(options.note), options.hours)
    try:
        with tempfile.TemporaryDirectory(prefix="videollm-soak-") as name:
            folder = Path(name)
            with Application(folder, tiny_settings(folder / "llm"), options.replicas, RESUME_S) as app:
                asyncio.run(soak(app, options.sessions, options.seed, options.hours * 3600, report))
    except (ChaosError, RedisServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        if not report.samples:
            return 1
        report.wrong.append(f"ended early: {error}")  # what was found in the hours before is told all the same
    print(report.table())
    if options.save:
        report.save(options.save)
    return 1 if report.flat is False or report.wrong or not report.samples else 0


if __name__ == "__main__":
    sys.exit(main())
