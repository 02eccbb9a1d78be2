"""`python -m serve.drain`, before a redeploy: every client is told to go, and moves without losing anything.

Gateways that run now send `session.going_away`, go on for the notice, and then close with 1012. The
sessions stay in Redis: their clients resume them at gateways that start later. Joins the Ray cluster of
RAY_ADDRESS, else the one of this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from typing import Protocol

import ray
from ray import serve as ray_serve

from serve.app import APPLICATION

LEAST_NOTICE_S = 10.0
AFTER_S = 15.0


class Gateways(Protocol):
    """What the command asks of the application's gateways."""

    async def drain(self, notice_s: float | None) -> None:
        """Announce a drain, or call it off with None."""

    async def connected(self) -> int:
        """Connections that gateways hold."""


class DrainError(RuntimeError):
    """The application cannot be drained; says why."""


async def drain(gateways: Gateways, notice_s: float, after_s: float = AFTER_S, poll_s: float = 1.0) -> int:
    """Announce it, wait until connections are closed; how many are left `after_s` after the notice."""
    await gateways.drain(notice_s)
    await asyncio.sleep(notice_s)
    deadline = time.monotonic() + after_s
    while (left := await gateways.connected()) and time.monotonic() < deadline:
        await asyncio.sleep(poll_s)
    return left


class Application:
    """The gateways of the application that runs on the cluster. Raises DrainError when none does."""

    def __init__(self) -> None:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level=logging.ERROR)
        try:
            self._handle = ray_serve.get_app_handle(APPLICATION)
        except Exception as error:
            raise DrainError(f"no application {APPLICATION!r} runs on this cluster: {error}") from None

    async def drain(self, notice_s: float | None) -> None:
        await self._handle.drain.remote(notice_s)

    async def connected(self) -> int:
        return int(await self._handle.connected.remote())


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 when there is nothing to drain, or clients are still connected at the end."""
    parser = argparse.ArgumentParser(prog="python -m serve.drain", description="Let all clients go before a redeploy.")
    parser.add_argument(
        "--notice",
        type=float,
        default=LEAST_NOTICE_S,
        help="seconds between the word and the close (default and least: %(default)g)",
    )
    parser.add_argument("--cancel", action="store_true", help="call off a drain that was announced")
    options = parser.parse_args(arguments)
    if options.notice < LEAST_NOTICE_S:
        parser.error(f"--notice is {options.notice:g}, clients need {LEAST_NOTICE_S:g} s or more to move")
    try:
        application = Application()
        if options.cancel:
            asyncio.run(application.drain(None))
            print("called off: gateways take clients again")
            return 0
        print(f"told all clients; their connections close in {options.notice:g} s", flush=True)
        left = asyncio.run(drain(application, options.notice))
    except (DrainError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("drained: redeploy now" if not left else f"{left} connections are still open", flush=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
