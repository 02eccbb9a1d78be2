"""What a chaos run found: a table for people, JSON for programs, a picture of recovery and memory."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from jobs.chaos_client import Books
from jobs.machine import cpu_name

RECOVERY_P50_S, RECOVERY_P99_S = 4.0, 15.0


@dataclass(frozen=True)
class Latency:
    """How long decisions took from the moments at which their frames were due; None without frames.

    Counts frames that were never decided as slower than all others: infinite, and None in a quantile that falls there.
    """

    frames: int = 0
    undecided: int = 0
    p50_s: float | None = None
    p95_s: float | None = None

    @classmethod
    def of(cls, found: Sequence[float]) -> Latency:
        """Of single latencies in seconds."""
        quantiles = [share(found, wanted) for wanted in (0.5, 0.95)]
        p50_s, p95_s = (round(value, 3) if math.isfinite(value) else None for value in quantiles)
        return cls(len(found), sum(map(math.isinf, found)), p50_s, p95_s)

    def __str__(self) -> str:
        p50, p95 = ("-" if value is None else f"{value:.2f}s" for value in (self.p50_s, self.p95_s))
        return f"{p50:>8} {p95:>8} {self.frames:>7} {self.undecided:>10}"


@dataclass
class Injected:
    """A fault: when it began, when its cause was gone, when all replicas were there again (monotonic seconds).

    Nothing was wrong from `calm` until it began. `before` and `during` (until `healed`) tell what decisions took for
    the run's own sessions, those that were admitted before. `recoveries` are seconds from `healed` until each session
    decided the first frame that was due after it, `away` those from the loss of each connection that was lost
    meanwhile until its session was there again at another.
    """

    name: str
    what: str
    began: float
    healed: float
    whole: float = 0.0
    recoveries: list[float] = field(default_factory=list)
    stuck: int = 0
    away: list[float] = field(default_factory=list)
    calm: float = math.inf
    before: Latency = field(default_factory=Latency)
    during: Latency = field(default_factory=Latency)


@dataclass
class ChaosReport:
    """`memory` is (seconds, MB of all processes); `expired` how sessions ended whose data was lost."""

    machine: dict[str, str | int | float]
    notes: list[str]
    started: float = 0.0
    faults: list[Injected] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    sessions: list[dict[str, object]] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)
    memory: list[tuple[float, float]] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    works_after_loss: bool = False

    def add(self, books: Sequence[Books]) -> None:
        """What the clients saw, and how long each fault held them up."""
        for fault in self.faults:
            found = [each.recovery(fault.healed) for each in books]
            fault.recoveries = [round(seconds, 3) for seconds in found if seconds is not None]
            fault.stuck = found.count(None)
            fault.away = [
                round(back - lost, 3)
                for each in books
                for lost, back in each.away
                if fault.began <= lost <= fault.whole
            ]
            fault.before, fault.during = (
                Latency.of([seconds for each in books for seconds in each.latencies(since, until)])
                for since, until in ((fault.calm, fault.began), (fault.began, fault.healed))
            )
        self.totals = {
            "sessions": len(books),
            "survived": sum(each.sound for each in books),
            "events": sum(len(each.told) for each in books),
            "events_missing": sum(each.missing for each in books),
            "events_duplicated": sum(each.duplicated for each in books),
            "events_out_of_order": sum(each.disorder for each in books),
            "frames_decided": sum(len(each.decided) for each in books),
            "frames_acknowledged": sum(each.acknowledged for each in books),
            "frames_skipped": sum(len(each.skipped) for each in books),
            "frames_dropped": sum(each.dropped for each in books),
            "frames_lost": sum(each.lost for each in books),
            "questions": sum(len(each.asked) for each in books),
            "questions_not_answered_once": sum(each.unanswered for each in books),
            "connections": sum(each.connections for each in books),
        }

    @property
    def recoveries(self) -> list[float]:
        return [seconds for fault in self.faults for seconds in fault.recoveries]

    @property
    def kept(self) -> bool:
        """Every promise but those about time, which a busy machine may break."""
        totals = self.totals
        return (
            totals["survived"] == totals["sessions"]
            and not any(fault.stuck or math.isinf(fault.whole) for fault in self.faults)
            and all(outcome == "expired" for outcome in self.expired)
            and self.works_after_loss
        )

    def table(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.machine.items()]
        lines += [
            "",
            f"{'fault':<20} {'lasted':>8} {'p50':>7} {'p99':>7} {'stuck':>6} {'whole':>7} "
            f"{'away p50':>9} {'p99':>7}  what",
        ]
        for fault in self.faults:
            p50, p99 = share(fault.recoveries, 0.5), share(fault.recoveries, 0.99)
            lasted_s, whole_s = fault.healed - fault.began, fault.whole - fault.healed
            times = f"{lasted_s:>7.1f}s {p50:>6.1f}s {p99:>6.1f}s {fault.stuck:>6} {whole_s:>6.1f}s"
            gone = [f"{share(fault.away, part):.1f}s" if fault.away else "-" for part in (0.5, 0.99)]
            times += f" {gone[0]:>9} {gone[1]:>7}"
            lines.append(f"{fault.name:<20} {times}  {fault.what}")
        lines += self._latencies()
        lines += ["", *(f"{name.replace('_', ' '):<30} {value:>8}" for name, value in self.totals.items())]
        lines += [
            f"{'faults injected':<30} {len(self.faults):>8}",
            *([f"no time was left for: {', '.join(self.left_out)}"] if self.left_out else []),
            f"{'recovery p50 (wanted < 4 s)':<30} {share(self.recoveries, 0.5):>7.1f}s",
            f"{'recovery p99 (wanted < 15 s)':<30} {share(self.recoveries, 0.99):>7.1f}s",
            "away: from the loss of a connection until the session goes on at another (wanted < 2 s)",
            f"all data lost: sessions ended {', '.join(self.expired) or '(not tried)'}; "
            f"a new one {'works' if self.works_after_loss else 'DOES NOT WORK'}",
            *(f"session {number}: {told}" for number, told in enumerate(self.sessions) if not told["sound"]),
            f"promises {'kept' if self.kept else 'BROKEN'}",
            *self.notes,
        ]
        return "\n".join(lines)

    def _latencies(self) -> list[str]:
        """What decisions took before faults that last, and during them."""
        lasting = [fault for fault in self.faults if fault.during.frames]
        if not lasting:
            return []
        head = f"{'p50':>8} {'p95':>8} {'frames':>7} {'undecided':>10}"
        lines = ["", f"{'decision latency':<20} {'':<6} {head}  from the moment a frame was due"]
        for fault in lasting:
            lines.append(f"{fault.name:<20} before {fault.before}")
            lines.append(f"{'':<20} during {fault.during}")
        return lines

    def save(self, path: Path) -> None:
        """Write `path`.json and `path`.png."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = asdict(self) | {
            "faults": [
                asdict(fault)
                | {name: self._seconds(getattr(fault, name)) for name in ("calm", "began", "healed", "whole")}
                for fault in self.faults
            ],
            "recovery_s": {"p50": share(self.recoveries, 0.5), "p99": share(self.recoveries, 0.99)},
            "kept": self.kept,
        }
        del document["started"]
        path.with_name(path.name + ".json").write_text(json.dumps(document, indent=1) + "\n")
        self._plot(path.with_name(path.name + ".png"))

    def _seconds(self, moment: float) -> float | None:
        """Since the start; None for what never came."""
        return round(moment - self.started, 2) if math.isfinite(moment) else None

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 7), layout="constrained")
        recovery, memory = figure.subplots(2, 1)
        for row, fault in enumerate(self.faults):
            recovery.plot(fault.recoveries, [row] * len(fault.recoveries), "o", alpha=0.4, markersize=4)
        recovery.set_yticks(range(len(self.faults)), [fault.name for fault in self.faults])
        for wanted, style in ((RECOVERY_P50_S, ":"), (RECOVERY_P99_S, "--")):
            recovery.axvline(wanted, color="black", linestyle=style, linewidth=0.8)
        recovery.set_xlabel("seconds until a session decides a frame due after the fault (lines: wanted p50 and p99)")
        memory.plot([at for at, _ in self.memory], [mb for _, mb in self.memory])
        for fault in self.faults:
            memory.axvspan(fault.began - self.started, fault.healed - self.started + 0.2, alpha=0.2, color="red")
            memory.text(fault.began - self.started, 0, f" {fault.name}", rotation=90, fontsize=7, va="bottom")
        memory.set_ylim(0, 1.1 * max((mb for _, mb in self.memory), default=1.0))
        memory.set_xlabel("seconds (red: a fault)")
        memory.set_ylabel("memory of all processes, MB")
        title = "{date}, {cpu}, {sessions} sessions, seed {seed}".format(**self.machine)
        figure.suptitle(f"chaos: {title}", fontsize=10)
        figure.savefig(path, dpi=90)


def machine(seed: int, sessions: int, replicas: int) -> dict[str, str | int | float]:
    """Where and with what it was run; the load says what other programs left over."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "load at the start": round(os.getloadavg()[0], 1),
        "seed": seed,
        "sessions": sessions,
        "replicas of each kind": replicas,
    }


def books_of(books: Books) -> dict[str, object]:
    """One session in a few words."""
    return {
        "session": books.session_id,
        "outcome": books.outcome,
        "sound": books.sound,
        "decided": len(books.decided),
        "missing": books.missing,
        "duplicated": books.duplicated,
        "disorder": books.disorder,
        "lost": books.lost,
        "undecided": books.undecided[:50],
        "unanswered": books.unanswered,
        "connections": books.connections,
        "errors": dict(Counter(books.errors)),
    }


def share(values: Sequence[float], wanted: float) -> float:
    """A quantile; NaN without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(wanted * len(ordered)) - 1)] if ordered else math.nan
