"""The frame around every job: arguments, `--help` that lists the settings, logging, exit code.

A job is a function of a `Config`. It is run the same way from a shell and inside `ray job submit`:

    python -m jobs.train configs/embedded.yaml training.max_steps=10

Exit code 0: done. 1: failed; a mistake of the user's is explained in one line without a traceback.
130: stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import NoReturn

import ray.exceptions
from pydantic_core import PydanticUndefined

from actors.config import Config, ConfigError, Section, load_config

logger = logging.getLogger(__name__)

Sections = Mapping[str, type[Section]]


def run(
    job: Callable[[Config], object],
    *,
    module: str,
    about: str | None,
    sections: Sections,
    user_errors: tuple[type[Exception], ...] = (),
    argv: Sequence[str] | None = None,
    flags: Mapping[str, str] = MappingProxyType({}),
    example: str = "configs/embedded.yaml",
) -> int:
    """Read the command line of `module`, call `job` with its settings, return the exit code.

    `about` is the module's docstring. `user_errors` (and ConfigError, missing files) end in their
    message alone, wherever in the cluster they were raised. `flags` are short for overrides; `example` is what the
    job needs at least, for its help.
    """
    arguments = parser(module, about, sections, flags, example).parse_intermixed_args(argv)
    arguments.overrides += arguments.flags or []
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    # A stopped `ray job` gets SIGTERM: end as with Ctrl-C, so that Ray's processes end too.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        config = load_config(arguments.settings, arguments.overrides)
        os.chdir(_output_root(arguments.root))
        job(config)
    except KeyboardInterrupt:
        logger.warning("stopped")
        return 130
    except Exception as error:
        cause = root_cause(error)
        if not isinstance(cause, (ConfigError, FileNotFoundError, *user_errors)):
            raise
        print(f"error: {cause}", file=sys.stderr)
        return 1
    return 0


def parser(
    module: str,
    about: str | None,
    sections: Sections,
    flags: Mapping[str, str] = MappingProxyType({}),
    example: str = "configs/embedded.yaml",
) -> argparse.ArgumentParser:
    """The command line that all jobs share; its help ends with every setting and its default."""
    examples = [
        f"python -m {module} {example}",
        f"python -m {module} {example} {_an_override(sections)}",
        f'ray job submit --working-dir . -- python -m {module} {example} --root "$PWD"',
    ]
    parser = _Parser(
        prog=f"python -m {module}",
        description=about,
        epilog="\n".join(["examples:", *(f"  {line}" for line in examples), "", *describe(sections)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", help="a YAML file of settings, such as configs/embedded.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument(
        "--root",
        metavar="FOLDER",
        help="relative paths in the settings start here (default: the current folder); "
        "needed with `ray job submit --working-dir`, whose copy of the folder does not outlive the job",
    )
    parser.set_defaults(flags=None)
    for flag, override in flags.items():
        parser.add_argument(flag, dest="flags", action="append_const", const=override, help=f"short for {override}")
    return parser


class _Parser(argparse.ArgumentParser):
    """Ends with 1 where argparse would with 2, as for any other mistake."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"error: {message}\n")


def describe(sections: Sections) -> list[str]:
    """Lines that list each section's settings with type, default and explanation."""
    lines = []
    for name, kind in sections.items():
        lines += [f"settings of section '{name}':", *_fields(name, kind), ""]
    return lines


def root_cause(error: BaseException) -> BaseException:
    """The exception a Ray task, actor or training worker raised, out of what Ray wraps it in."""
    while True:
        failures = getattr(error, "worker_failures", None)
        if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
            error = error.cause
        elif isinstance(failures, dict) and failures:
            error = failures[min(failures)]
        elif type(error).__module__.startswith("ray.") and error.__cause__ is not None:
            error = error.__cause__
        else:
            return error


def _fields(prefix: str, kind: type[Section]) -> list[str]:
    lines = []
    for name, field in kind.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            lines += _fields(f"{prefix}.{name}", annotation)
            continue
        words = getattr(annotation, "__name__", None) if isinstance(annotation, type) else None
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else f"default {_yaml(default)}"
        lines.append(f"  {prefix}.{name}  ({words or _type_words(annotation)}, {shown})")
        if field.description:
            lines += textwrap.wrap(field.description, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _type_words(annotation: object) -> str:
    return str(annotation).replace("typing.", "").replace("NoneType", "None")


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _an_override(sections: Sections) -> str:
    for name, kind in sections.items():
        for key, field in kind.model_fields.items() if name != "model" else ():
            if isinstance(field.default, int | float) and not isinstance(field.default, bool):
                return f"{name}.{key}={field.default}"
    return "model.dtype=float32"


def _output_root(root: str | None) -> Path:
    if root is not None:
        if not Path(root).is_dir():
            raise ConfigError(f"--root {root}: no such folder")
        return Path(root)
    here = Path.cwd()
    if "working_dir_files" in here.parts:
        raise ConfigError(
            f"this job runs in Ray's copy of the folder it was submitted from ({here}), which does not outlive it: "
            'say where its files belong, for example --root "$PWD"'
        )
    return here


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
