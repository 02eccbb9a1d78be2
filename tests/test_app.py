"""What is checked before anything is started."""

from __future__ import annotations

import socket

import pytest
from ray.serve import Application

from actors.config import Config, ConfigError
from serve.app import StartError, build, check_gpus, redis_url, running
from serve.gateway import ServeConfig
from serve.keys import is_loopback

MODEL = {"model": {"llm": "embedded", "vision": "embedded", "frames": {"resolution_px": 224}}}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_others_are_not_served_without_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDEOLLM_API_KEY", raising=False)
    with pytest.raises(StartError, match="VIDEOLLM_API_KEY"), running(Config({**MODEL, "serve": {"host": host}})):
        pass


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=str(port)), running(Config({**MODEL, "serve": {"port": port}})):
            pass


def test_a_wrong_serve_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"serve\.gateway_cpu'"), running(Config({"serve": {"gateway_cpu": 1}})):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_names(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1.example.org", "localhost.example.org", "10.0.0.1", ""])
def test_names_that_only_look_like_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_serve_run_builds_the_default_application(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert isinstance(build({"config": "configs/embedded.yaml", "overrides": ["serve.llms=2"]}), Application)


def test_serve_run_refuses_arguments_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="configuration"):
        build({"configuration": "configs/embedded.yaml"})


def test_the_settings_file_names_redis_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://environment")
    assert redis_url(Config({})) == "redis://environment"
    assert redis_url(Config({"bus": {"url": "redis://file"}})) == "redis://file"


def test_a_machine_without_the_gpus_that_are_asked_for_is_told_so() -> None:
    wanted = ServeConfig(encoder_gpus=0.25, llm_gpus=0.75)
    check_gpus(wanted, 1.0)
    check_gpus(ServeConfig(), 0.0)
    with pytest.raises(StartError, match=r"ask for 1 GPUs, this machine has 0: .* encoder\.device"):
        check_gpus(wanted, 0.0)
