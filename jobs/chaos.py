"""`make chaos`: the real application under faults, with clients that come back and keep books.

Starts Redis, gateways, encoders and LLM replicas, streams to them, injects one fault after the other in an
order that the seed gives, waits after each until every session goes on and every replica is there again, and at the
end compares what each client was told with its session's log. Last, Redis loses its data, where sessions must end
with `session_expired` and new ones must work. Exit status 1 when a promise of docs/reliability.md was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from actors.config import ConfigError, load_config
from actors.redis_server import RedisServerError
from actors.tasks import end_all
from actors.video import encode_jpeg
from jobs.chaos_application import Application, ChaosError, end_in_order_on_signal, tiny_settings
from jobs.chaos_client import Books, ChaosClient
from jobs.chaos_faults import FAULTS, OVERLOAD_S, lose_data
from jobs.chaos_report import ChaosReport, Injected, books_of, machine
from jobs.process_usage import UsageSampler

log = logging.getLogger(__name__)

RESUME_S = 600.0  # the log is kept whole, so that it can be compared at the end
SETTLE_S = 120.0
BEHIND_S = 3.0
REPLACE_S = 300.0
CALM_S = 3.0
END_S = 180.0


async def run(
    app: Application, sessions: int, fps: float, seed: int, names: Sequence[str], minutes: float, report: ChaosReport
) -> None:
    """Faults on the same sessions, none after `minutes`, then the loss of all data on two new ones."""
    chosen, stop, image = random.Random(seed), asyncio.Event(), picture()
    await until_whole(app)
    with UsageSampler(every_s=5, memory=True) as usage:  # a look takes a fifth of a second of CPU
        clients = [ChaosClient(app.url, image, seed + n, n % 4 == 0, stop, fps=fps) for n in range(sessions)]
        tasks = [asyncio.create_task(client.run()) for client in clients]
        try:
            report.started = time.monotonic()
            await _going_on(clients, tasks, report.started)  # to begin is not to go on
            for name in chosen.sample(list(names), len(names)):
                if time.monotonic() > report.started + 60 * minutes:
                    report.left_out.append(name)
                    continue
                behind_s = await keeping_up(clients, tasks)  # one fault at a time
                if behind_s > BEHIND_S and not report.faults:
                    raise ChaosError(
                        f"without any fault, a session is {behind_s:.1f} s behind after {SETTLE_S:g} s: this machine "
                        f"does not decide {sessions * fps:g} frames a second of {sessions} sessions; ask for fewer "
                        "sessions (--sessions) or fewer frames (--fps)"
                    )
                log.log(logging.WARNING if behind_s > BEHIND_S else logging.INFO, "behind_s=%.1f", behind_s)
                calm = time.monotonic()
                longer_s = OVERLOAD_S if name in ("joined", "overload") else 0.0  # enough frames to compare with
                await asyncio.sleep(longer_s + CALM_S * chosen.uniform(0.5, 1.5))
                report.faults.append(await _inject(name, app, chosen, image, clients, tasks))
                report.faults[-1].calm = calm
            stop.set()
            await asyncio.wait(tasks, timeout=END_S)
        finally:
            await end_all(tasks)
        report.memory = [(round(s.time - report.started, 1), round(s.memory_mb, 1)) for s in usage.samples]
    books = [client.books for client in clients]
    report.add(books)
    report.sessions = [books_of(each) for each in books]
    report.expired, report.works_after_loss = await _lose(app, image, seed)


async def _inject(
    name: str,
    app: Application,
    chosen: random.Random,
    image: bytes,
    clients: Sequence[ChaosClient],
    tasks: Sequence[asyncio.Task[Books]],
) -> Injected:
    began = time.monotonic()
    try:
        what = await FAULTS[name](app, chosen, image)
    except ChaosError as error:
        log.error("fault=%s %s", name, error)
        return Injected(name, f"FAILED: {error}", began, time.monotonic(), math.inf)
    injected = Injected(name, what, began, began if name.endswith("killed") else time.monotonic())
    log.info("fault=%s %s lasted_s=%.1f", name, what, injected.healed - began)
    await _going_on(clients, tasks, injected.healed)
    try:
        await until_whole(app)
        injected.whole = time.monotonic()
    except ChaosError as error:
        log.error("fault=%s %s", name, error)
        injected.whole = math.inf
    log.info("fault=%s over after_s=%.1f", name, injected.whole - injected.healed)
    return injected


async def keeping_up(clients: Sequence[ChaosClient], tasks: Sequence[asyncio.Task[Books]]) -> float:
    """Seconds that the slowest session is behind its frames, once that is `BEHIND_S` at most or the time is up."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        behind = [client.behind_s for client, task in zip(clients, tasks, strict=True) if not task.done()]
        slowest_s = max(behind, default=0.0)
        if slowest_s <= BEHIND_S or time.monotonic() > deadline:
            return slowest_s
        await asyncio.sleep(0.5)


async def _going_on(clients: Sequence[ChaosClient], tasks: Sequence[asyncio.Task[Books]], since: float) -> None:
    """Return once every session has decided a frame that was due later, or the time is up: the books tell then."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        waiting = [
            client
            for client, task in zip(clients, tasks, strict=True)
            if not task.done() and client.books.recovery(since) is None
        ]
        if not waiting:
            return
        await asyncio.sleep(0.5)
    log.warning("%d sessions have decided nothing for %g s", len(waiting), SETTLE_S)


async def until_whole(app: Application) -> None:
    """Every replica is there. Raises ChaosError when one does not come back."""
    deadline = time.monotonic() + REPLACE_S
    while not await asyncio.to_thread(app.whole):
        if time.monotonic() > deadline:
            raise ChaosError(f"replicas are missing for {REPLACE_S:g} s: {app.log_tail()}")
        await asyncio.sleep(1)


async def _lose(app: Application, image: bytes, seed: int) -> tuple[list[str], bool]:
    """How two sessions end when Redis has lost everything, and whether a new one works."""
    clients = [ChaosClient(app.url, image, seed, False, asyncio.Event()) for _ in range(2)]
    tasks = [asyncio.create_task(client.run(audit=False)) for client in clients]
    await _going_on(clients, tasks, time.monotonic())
    await asyncio.to_thread(lose_data, app)
    await asyncio.wait(tasks, timeout=END_S)
    await end_all(tasks)
    stop = asyncio.Event()
    later = ChaosClient(app.url, image, seed, False, stop)
    task = asyncio.create_task(later.run())
    await _going_on([later], [task], time.monotonic())
    stop.set()
    await asyncio.wait([task], timeout=END_S)
    await end_all([task])
    return [client.books.outcome for client in clients], later.books.sound


def picture() -> bytes:
    """A small JPEG with something in it."""
    return encode_jpeg(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1))


def frame_rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 30:
        raise argparse.ArgumentTypeError(f"{text} frames a second, expected more than 0 and at most 30")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 when a promise was broken or the application does not run."""
    parser = argparse.ArgumentParser(prog="python -m jobs.chaos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the order of faults (default %(default)d)")
    parser.add_argument("--sessions", type=int, default=50, help="at a time (default %(default)d)")
    parser.add_argument(
        "--fps", type=frame_rate, default=0.5, help="frames a second of each session (default %(default)g)"
    )
    parser.add_argument(
        "--replicas", type=int, default=2, help="of gateway, encoder and LLM each (default %(default)d)"
    )
    parser.add_argument(
        "--faults",
        nargs="+",
        choices=list(FAULTS),
        default=list(FAULTS),
        metavar="FAULT",
        help=f"some of: {', '.join(FAULTS)} (default: all)",
    )
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="after which no further fault is injected (default %(default)g)"
    )
    parser.add_argument("--settings", help="a file whose model and engine are used instead of a random model")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write FILE.json and FILE.png")
    parser.add_argument("--note", action="append", default=[], help="a line for the report")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    end_in_order_on_signal()
    report = ChaosReport(
        machine(options.seed, options.sessions, options.replicas) | {"frames a second of each": options.fps},
        list(options.note),
    )
    try:
        with tempfile.TemporaryDirectory(prefix="videollm-chaos-") as name:
            folder = Path(name)
            given = load_config(options.settings).sections if options.settings else tiny_settings(folder / "llm")
            with Application(folder, given, options.replicas, RESUME_S) as app:
                asyncio.run(
                    run(app, options.sessions, options.fps, options.seed, options.faults, options.minutes, report)
                )
    except (ChaosError, ConfigError, RedisServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.table())
    if options.save:
        report.save(options.save)
    return 0 if report.kept else 1


if __name__ == "__main__":
    sys.exit(main())
