"""The frame around every job: arguments, help, errors and exit codes."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import ray
from pydantic import Field

from actors.config import Config, ConfigError, Section
from jobs import cluster
from jobs.program import root_cause, run


class Inner(Section):
    rank: int = 4


class Settings(Section):
    """Settings of a job that exists only here."""

    rate: float = Field(default=0.5, description="of something")
    inner: Inner = Inner()
    folder: str


class UserError(ValueError):
    """A mistake of the user's."""


@pytest.fixture
def run_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run `job` in an empty folder with settings.yaml and return the exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_text("data: {folder: out}\n")
    handler = signal.getsignal(signal.SIGTERM)

    def go(job, *arguments: str) -> int:
        return run(
            job,
            module="jobs.nothing",
            about="Do nothing.",
            sections={"data": Settings},
            user_errors=(UserError,),
            argv=["settings.yaml", *arguments],
            flags={"--slow": "data.rate=0.1"},
        )

    yield go
    signal.signal(signal.SIGTERM, handler)


def test_a_job_gets_the_settings_with_overrides(run_job) -> None:
    seen: list[Settings] = []
    assert run_job(lambda config: seen.append(config.section("data", Settings)), "data.rate=2e-1") == 0
    assert seen == [Settings(rate=0.2, folder="out")]


def test_help_lists_every_setting_with_type_default_and_meaning(run_job, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job(lambda config: None, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "Do nothing.",
        "ray job submit --working-dir . -- python -m jobs.nothing",
        "data.rate  (float, default 0.5)\n      of something",
        "data.inner.rank  (int, default 4)",
        "data.folder  (str, required)",
    ):
        assert part in text


@pytest.mark.parametrize("error", [ConfigError("bad setting"), UserError("bad data"), FileNotFoundError("no file")])
def test_a_users_mistake_ends_in_one_line(run_job, capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    def fail(config: Config) -> None:
        raise error

    assert run_job(fail) == 1
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_mistake_of_ours_keeps_its_traceback(run_job) -> None:
    def fail(config: Config) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_job(fail)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_job_exits_with_130(run_job, number: signal.Signals) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a program starts; other tests may have changed it

    def wait(config: Config) -> None:
        os.kill(os.getpid(), number)
        signal.pause()

    assert run_job(wait) == 130


def test_relative_paths_start_at_the_root(run_job, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    seen: list[Path] = []
    assert run_job(lambda config: seen.append(Path.cwd()), "--root", "root") == 0
    assert seen == [tmp_path / "root"]


def test_overrides_may_stand_before_and_after_options(run_job) -> None:
    seen: list[Settings] = []
    arguments = ("data.rate=1", "--root", ".", "data.inner.rank=2")
    assert run_job(lambda config: seen.append(config.section("data", Settings)), *arguments) == 0
    assert seen == [Settings(rate=1, inner=Inner(rank=2), folder="out")]


def test_a_flag_is_short_for_an_override(run_job, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[float] = []
    for arguments in ([], ["--slow"], ["--slow", "data.rate=0.3"]):
        assert run_job(lambda config: seen.append(config.section("data", Settings).rate), *arguments) == 0
    assert seen == [0.5, 0.1, 0.1]
    with pytest.raises(SystemExit):
        run_job(lambda config: None, "--help")
    assert re.search(r"--slow +short for data.rate=0.1", capsys.readouterr().out)


def test_an_unknown_option_ends_with_1(run_job, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job(lambda config: None, "--fast")
    assert ended.value.code == 1
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


def test_a_root_that_is_not_there_is_refused(run_job, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(lambda config: None, "--root", "gone") == 1
    assert "--root gone: no such folder" in capsys.readouterr().err


def test_rays_copy_of_a_folder_is_no_place_for_results(
    run_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "working_dir_files" / "package"
    copy.mkdir(parents=True)
    (copy / "settings.yaml").write_text("data: {folder: out}\n")
    monkeypatch.chdir(copy)
    assert run_job(lambda config: None) == 1
    assert "does not outlive it" in capsys.readouterr().err
    assert run_job(lambda config: None, "--root", str(tmp_path)) == 0


def test_the_cause_is_found_in_what_ray_wraps_it_in() -> None:
    cause = UserError("deep down")
    task = ray.exceptions.RayTaskError("task", "traceback", cause)
    assert root_cause(task) is cause
    assert root_cause(task.as_instanceof_cause()) is cause
    assert root_cause(cause) is cause


@pytest.mark.parametrize(
    ("machines", "reserved"), [([1, 1], 1), ([1, 8], 2), ([0], 2), ([], 2)], ids=["small", "large", "head", "none"]
)
def test_an_actor_asks_for_no_more_cpus_than_a_machine_has(
    machines: list[int], reserved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": float(cpus)} if cpus else {}} for cpus in machines]
    gone = {"Alive": False, "Resources": {"CPU": 64.0}}
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [*nodes, gone])
    assert cluster.cpus_of_one(2) == reserved
    nodes.append({"Alive": True, "Resources": {"CPU": 1.0, "GPU": 1.0}})
    assert cluster.cpus_of_one(2, gpus=1) == 1, "machines without a GPU do not count"
