"""Clients are told to go, go, and go on elsewhere."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from application import running
from live_client import live

from serve import redeploy
from serve.drain import drain, main
from serve.server_events import FrameDecided, GoingAway, SessionCreated


def test_clients_are_told_closed_with_1012_and_go_on_at_a_later_gateway(
    tiny: dict[str, object], redis_url: str
) -> None:
    with running(tiny, redis_url, prefix="drain-test:") as old, live(old.url) as client:
        session_id = client.until(SessionCreated).session.id
        client.configure(video={"drop_policy": "block"})
        client.frame(0)
        client.until(FrameDecided)
        old.call(old.gateways[0].bus.drain(2.0))
        assert 0 < client.until(GoingAway).seconds <= 2
        client.frame(1)
        client.until(FrameDecided)
        assert client.closed() == (1012, "going_away")
        with live(old.url) as late:
            assert late.closed() == (1012, "going_away")
        with (
            running(tiny, redis_url, prefix="drain-test:", workers=False) as new,
            live(new.url, session_id, client.logged[-1].position) as again,
        ):
            again.frame(2)
            again.end()
        old.call(old.gateways[0].bus.stop_draining())
    assert [*client.decided(), *again.decided()] == [(0, 0.0), (1, 1.0), (2, 2.0)]


@dataclass
class Pretended:
    """Gateways whose connections close one by one."""

    left: list[int]
    told: list[float | None] = field(default_factory=list)

    async def drain(self, notice_s: float | None) -> None:
        self.told.append(notice_s)

    async def connected(self) -> int:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


def test_the_command_waits_until_everybody_is_gone_and_says_who_is_not() -> None:
    gateways = Pretended([3, 1, 0])
    assert asyncio.run(drain(gateways, 0.01, poll_s=0.001)) == 0
    assert gateways.told == [0.01]
    assert asyncio.run(drain(Pretended([2]), 0.01, after_s=0.02, poll_s=0.001)) == 2


def test_a_notice_that_is_too_short_to_move_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--notice", "1"])
    assert "10 s" in capsys.readouterr().err


def test_a_redeploy_needs_the_redis_and_the_cluster_of_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("REDIS_URL", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    settings = tmp_path / "settings.yaml"
    settings.write_text("serve: {llms: 1}\n")
    for path, address, says in (
        (str(tmp_path / "none.yaml"), None, "no such settings file"),
        (str(settings), None, "set REDIS_URL"),
        (str(settings), "redis://127.0.0.1:1", "set RAY_ADDRESS"),
    ):
        if address:
            monkeypatch.setenv("REDIS_URL", address)
        assert redeploy.main([path]) == 1
        assert says in capsys.readouterr().err
