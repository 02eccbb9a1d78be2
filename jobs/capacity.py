"""How many machines so many live streams need, and what a stream costs (docs/capacity.md).

    python -m jobs.capacity
    python -m jobs.capacity load.fps=4 machine.gpu_price=1.8 --streams 500 50000
    python -m jobs.capacity --benchmark benchmarks/NAME.json       the formulas against an engine's benchmark
    python -m jobs.capacity --redis                                measure the bus here, a few minutes

The formulas are in jobs/capacity_model.py, the costs of Redis in benchmarks/*-redis.json. With
`--save FOLDER` the table, its numbers as JSON and plots go there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

import yaml
from pydantic import ValidationError

from actors.bus import BusError
from actors.config import Section
from actors.redis_server import RedisServerError
from jobs.capacity_check import check_benchmark
from jobs.capacity_model import LoadConfig, MachineConfig, ServedConfig, plan
from jobs.capacity_redis import load_costs, measure, save
from jobs.capacity_report import check_table, draw, plan_table, redis_table
from jobs.program import describe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STREAMS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
SECTIONS: dict[str, type[Section]] = {"load": LoadConfig, "served": ServedConfig, "machine": MachineConfig}


class CapacityError(ValueError):
    """Something that was asked for cannot be answered; says why."""


def run(options: argparse.Namespace) -> None:
    """Print what was asked for. Raises ValueError and OSError."""
    load, served, machine = _settings(options.settings)
    if options.redis:
        costs, checks = asyncio.run(measure(load, served))
        print(redis_table(costs, checks, costs.session_memory(load, served)))
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            save(options.save / f"{date.today()}-{options.machine}-redis.json", costs, checks, options.machine)
        return
    if options.benchmark:
        print(check_table(check_benchmark(json.loads(options.benchmark.read_text()))))
        return
    costs = load_costs(options.costs or _newest_costs())
    plans = [plan(streams, load, served, machine, costs) for streams in options.streams]
    table = plan_table(plans, load, served, machine, costs)
    print(table)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "capacity.txt").write_text(table + "\n")
        (options.save / "capacity.json").write_text(json.dumps([asdict(item) for item in plans], indent=2) + "\n")
        draw(options.save / "capacity.png", load, served, machine, costs)


def _settings(overrides: Sequence[str]) -> tuple[LoadConfig, ServedConfig, MachineConfig]:
    """The three sections, with `section.key=value` in place of their defaults."""
    given: dict[str, dict[str, object]] = {name: {} for name in SECTIONS}
    for override in overrides:
        name, _, value = override.partition("=")
        section, _, key = name.partition(".")
        if section not in SECTIONS or key not in SECTIONS[section].model_fields or not value:
            known = ", ".join(f"{section}.{key}" for section in SECTIONS for key in SECTIONS[section].model_fields)
            raise CapacityError(f"{override}: expected section.key=value with one of {known}")
        given[section][key] = yaml.safe_load(value)
    try:
        return (
            LoadConfig.model_validate(given["load"]),
            ServedConfig.model_validate(given["served"]),
            MachineConfig.model_validate(given["machine"]),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise CapacityError(f"{'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg']}") from None


def _newest_costs() -> Path:
    found = sorted(BENCHMARKS.glob("*-redis.json"))
    if not found:
        raise CapacityError(
            f"no *-redis.json in {BENCHMARKS}: measure with `python -m jobs.capacity --redis --save FOLDER`"
        )
    return found[-1]


def parser() -> argparse.ArgumentParser:
    """The command line; its help lists all settings."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.capacity",
        description=__doc__,
        epilog=textwrap.dedent("\n".join(describe(SECTIONS))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    parser.add_argument("--streams", nargs="+", type=_count, default=STREAMS, metavar="N", help="numbers of streams")
    parser.add_argument(
        "--costs", type=Path, metavar="FILE", help="costs of the bus; default: the newest that comes along"
    )
    parser.add_argument("--benchmark", type=Path, metavar="FILE", help="check the LLM's formula against this benchmark")
    parser.add_argument("--redis", action="store_true", help="measure what the bus costs on this machine")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write results there")
    parser.add_argument("--machine", default="machine", metavar="NAME", help="of this machine, for the file of --redis")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} streams: expected 1 or more")
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: done. 1: a mistake in what was asked, explained in one line."""
    options = parser().parse_intermixed_args(argv)
    try:
        run(options)
    except (BusError, RedisServerError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
