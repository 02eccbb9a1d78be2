"""Measure how fast this machine runs the models, and compare.

  engine   the batched engine against the plain `reference` backend (a growing Hugging Face cache, one
           session and one frame a step): live, recorded, many sessions, memory, latency

  data     videos to frame tokens: frames a second against what decoding and encoding alone would allow,
           memory against video length, the size of a store, random reads

  train    packed training against the public reference's loop, on the same dialogues in the same order

  stream   one video through decode, encode, Redis and LLM, beside the paper's rate and memory

  serve    N WebSocket sessions at F frames per second: latency by stage, drops, first token, largest N

Both backends of `engine` get the same weights, input, dtype, threads and window, and the same script says when they
speak: the model computes everything, but its choices are not followed. They take turns, so that what else
the machine does slows both; trust the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import logging
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from actors.config import ConfigError, load_config
from actors.embedded import EmbeddedModelError
from actors.engine import EngineConfig
from actors.parts import CheckpointError
from actors.runtime import limit_threads
from actors.weights import WeightsError
from jobs import train_benchmark
from jobs.benchmark_models import PRESETS, subject_of, subject_of_size
from jobs.data_benchmark import DATA_QUICK, DataAmount, DataBenchmark
from jobs.encode_frames import EncodingError
from jobs.engine_benchmark import ON_GPU, QUICK, Amount, EngineBenchmark
from jobs.serve_benchmark import EndpointError, Load, ServeReport, endpoint, machine, measure_all
from jobs.stream_benchmark import Clip, StreamReport, measure, schedule

DEFAULT_SETTINGS = "configs/embedded.yaml"

ENGINE_HELP = """Compare the batched engine with the `reference` backend.

Without arguments: the embedded default on the CPU, about 20 minutes on two cores of 2020s
(the reference's part; it is slow). What is measured:

  live        one session, frame by frame, after 300, 1,500 and 3,000 frames; the mean over the
              whole eviction cycle that ends there, rebuild included
  recorded    a video of 200 frames that are there at once, and frames 300 to 400 of a longer one;
              10 %, 1 % and 0 % of them speak 12 tokens
  sessions    1 to 32 live sessions with a frame waiting in each
  cycles      a frame's cost over one whole eviction cycle, early and late in a stream
  memory      resident memory along a stream
  latency     time to first token; step p50 and p99; lag of frames of 4 sessions at 2 FPS
  crowd       on a GPU: lag of 45 sessions at 2 FPS with windows of 8,192 positions, or of as many as
              engine.kv_memory_gb holds; that of a settings file counts for its own model only, not for a preset

Contexts of a certain length are made without living through them: see jobs/scripted.py.
"""


DATA_HELP = """Measure jobs.encode_frames on copies of real videos.

Without arguments: the embedded default over the sample videos, about 5 minutes on two free cores.

  stages     CPU seconds a frame of decoding and of encoding, each alone on one core
  pipeline   frames a second in the middle of a run, against the bound: cores / (decode + encode). What
             other programs used of the machine meanwhile is subtracted from the cores
  memory     peak of all processes while videos of 2, 8 and 32 minutes are encoded
  store      megabytes an hour, and random ranges a second
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 a mistake in the settings, which is explained."""
    arguments = _parser().parse_args(argv)
    if "=" in arguments.settings:  # the file was left out
        arguments.overrides.insert(0, arguments.settings)
        arguments.settings = DEFAULT_SETTINGS
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        arguments.run(arguments)
    except (ConfigError, CheckpointError, EmbeddedModelError, WeightsError, EncodingError, EndpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def engine(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.settings, arguments.overrides)
    settings = config.section("engine", EngineConfig)
    settings = settings.model_copy(update={"device": arguments.device or settings.device})
    limit_threads(settings.threads)
    if arguments.preset == PRESETS[0]:
        subject = subject_of(config, settings.device, arguments.dtype)
    else:
        subject = subject_of_size(arguments.preset, settings.device, arguments.dtype, config.model.llm)
        if not any(one.startswith("engine.kv_memory_gb=") for one in arguments.overrides):
            settings = settings.model_copy(update={"kv_memory_gb": None})  # the file's is for another model
    amount = ON_GPU if settings.device.startswith("cuda") else Amount()
    benchmark = EngineBenchmark(subject, settings, QUICK if arguments.quick else amount)
    report = benchmark.run()
    print(report.table())
    if arguments.save:
        machine = re.sub(r"[^a-z0-9]+", "-", (arguments.machine or str(report.machine["cpu"])).lower()).strip("-")
        path = Path(arguments.save) / f"{report.machine['date']}-{machine}"
        report.save(path)
        print(f"\nsaved: {path}.json and {path}.png")


def data(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.settings, arguments.overrides)
    amount = DATA_QUICK if arguments.quick else DataAmount()
    amount = replace(amount, frames=arguments.frames or amount.frames, minutes=arguments.minutes or amount.minutes)
    benchmark = DataBenchmark(config, arguments.videos, amount)
    report = benchmark.run()
    print(report.table())
    if arguments.save:
        path = Path(arguments.save) / f"{report.settings['date']}-data-{arguments.machine}"
        report.save(path)
        print(f"\nsaved: {path}.json and {path}.png")


def train(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.settings, arguments.overrides)
    report = train_benchmark.run(config, 1 if arguments.quick else arguments.steps, arguments.device)
    print(report.table())
    if arguments.save:
        machine = arguments.machine or re.sub(r"[^a-z0-9]+", "-", str(report.machine["processor"]).lower()).strip("-")
        path = Path(arguments.save) / f"{report.machine['date']}-train-{machine}"
        report.save(path)
        print(f"\nsaved: {path}.json and {path}.png")


def stream(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.settings, arguments.overrides)
    clip = Clip(Path(arguments.video), arguments.seconds, arguments.fps, arguments.reply_every)
    report = StreamReport({**machine(), "model": config.model.llm, "schedule": schedule(clip)}, arguments.note)
    for version in arguments.versions:
        report.measured.append(measure(config, version, clip))
        if arguments.save:
            path = Path(arguments.save) / f"{report.machine['date']}-stream-{arguments.machine}.json"
            report.save(path)
            print(f"saved {version}: {path}\n", flush=True)
    print(report.table())


def serve(arguments: argparse.Namespace) -> None:
    load = Load(arguments.sessions, arguments.fps, arguments.seconds, arguments.ask_every, arguments.tokens)
    with endpoint(arguments.settings, arguments.overrides, arguments.url) as url:
        report = ServeReport(machine(), arguments.note, load)
        measure_all(report, url)
    print(report.table())
    if arguments.save:
        path = Path(arguments.save) / f"{report.machine['date']}-serve-{arguments.machine}.json"
        report.save(path)
        print(f"\nsaved: {path}")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark", description=__doc__, formatter_class=raw)
    kinds = parser.add_subparsers(title="what to measure", required=True, metavar="KIND")
    one = kinds.add_parser(
        "engine",
        help="the batched engine against reference",
        description=ENGINE_HELP,
        formatter_class=raw,
        epilog="examples:\n"
        "  python -m jobs.benchmark engine --save benchmarks\n"
        "  python -m jobs.benchmark engine configs/embedded.yaml engine.threads=2 --quick\n"
        "  python -m jobs.benchmark engine --preset llama3-8b --device cuda",
    )
    one.add_argument("settings", nargs="?", default=DEFAULT_SETTINGS, help=f"default: {DEFAULT_SETTINGS}")
    one.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    one.add_argument("--preset", choices=PRESETS, default=PRESETS[0], help="embedded: the model of the settings file")
    one.add_argument("--device", help="cpu or cuda (default: engine.device of the settings)")
    one.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the model's, if the CPU has it")
    one.add_argument("--quick", action="store_true", help="a few frames of everything: does it run?")
    one.add_argument("--save", metavar="FOLDER", help="write FOLDER/<date>-<machine>.json and .png")
    one.add_argument("--machine", metavar="NAME", help="name in the file's name (default: the CPU's)")
    one.set_defaults(run=engine)
    two = kinds.add_parser(
        "data",
        help="videos to frame tokens",
        description=DATA_HELP,
        formatter_class=raw,
        epilog="example:\n  python -m jobs.benchmark data --save benchmarks --machine xeon-2-cores",
    )
    two.add_argument("settings", nargs="?", default=DEFAULT_SETTINGS, help=f"default: {DEFAULT_SETTINGS}")
    two.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    two.add_argument("--videos", nargs="+", default=["tests/samples"], metavar="PATH", help="default: tests/samples")
    two.add_argument("--frames", type=int, help="through the pipeline, at least (default: 3000)")
    two.add_argument("--minutes", type=float, nargs="+", help="of the videos memory is watched with (default: 2 8 32)")
    two.add_argument("--quick", action="store_true", help="a few frames of everything: does it run?")
    two.add_argument("--save", metavar="FOLDER", help="write FOLDER/<date>-data-<machine>.json and .png")
    two.add_argument("--machine", metavar="NAME", default=platform.machine(), help="name in the file's name")
    two.set_defaults(run=data)
    three = kinds.add_parser(
        "train",
        help="packed training against the reference's loop",
        description=train_benchmark.__doc__,
        formatter_class=raw,
        epilog="example:\n  python -m jobs.benchmark train training.batch_size=8 --save benchmarks",
    )
    three.add_argument("settings", nargs="?", default=DEFAULT_SETTINGS, help=f"default: {DEFAULT_SETTINGS}")
    three.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    three.add_argument("--steps", type=int, default=4, help="measured, after one that warms up (default: 4)")
    three.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    three.add_argument("--quick", action="store_true", help="one step: does it run?")
    three.add_argument("--save", metavar="FOLDER", help="write FOLDER/<date>-train-<machine>.json and .png")
    three.add_argument("--machine", metavar="NAME", help="name in the file's name (default: the processor's)")
    three.set_defaults(run=train)
    _add_stream(kinds)
    _add_serve(kinds)
    return parser


def _add_stream(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "stream", help="one video through decode, encode, Redis and LLM, beside the paper's rate and memory"
    )
    _add_common(parser)
    parser.add_argument("--video", default="tests/samples/big_buck_bunny_trailer.mp4", help="begun anew until full")
    parser.add_argument("--seconds", type=float, default=300.0, help="of video (default: 300, as in the paper)")
    parser.add_argument("--fps", type=float, default=2.0, help="frames per second of video (default: 2)")
    parser.add_argument("--reply-every", type=float, default=10.0, help="seconds between replies (default: 10)")
    parser.add_argument("--versions", nargs="+", choices=["live1", "live1plus"], default=["live1", "live1plus"])
    parser.set_defaults(run=stream)


def _add_serve(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "serve", help="N WebSocket sessions at F frames per second: latency by stage, drops, first token, largest N"
    )
    _add_common(parser)
    parser.add_argument("--url", help="a server that runs (default: one of its own, with the settings)")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="tried in this order")
    parser.add_argument("--fps", type=float, default=2.0, help="frames per second of a session (default: 2)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of every load (default: 60)")
    parser.add_argument("--ask-every", type=float, default=15.0, help="seconds between a session's questions")
    parser.add_argument("--tokens", type=int, default=12, help="longest response (default: 12)")
    parser.set_defaults(run=serve)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="?", default=DEFAULT_SETTINGS, help=f"default: {DEFAULT_SETTINGS}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--save", metavar="FOLDER", help="write FOLDER/<date>-<kind>-<machine>.json")
    parser.add_argument("--machine", metavar="NAME", default="machine", help="name in the file's name")
    parser.add_argument("--note", action="append", default=[], help="what a reader of the result must know")


if __name__ == "__main__":
    sys.exit(main())
