"""The page: what is served, under which policy, and what it does in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from application import Application, running
from browser import Tab, chromium, program

from serve.site import FOLDER, TYPES

KEY = "the-right-key"
DECIDED = "Number(document.getElementById('decided').textContent) >= "
LINES = "document.querySelectorAll('#transcript li.assistant:not([hidden])').length >= "

in_a_browser = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(program() is None, reason="no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def app(tiny: dict[str, object], redis_url: str) -> Iterator[Application]:
    """An application of this machine."""
    with running(tiny, redis_url) as application:
        yield application


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    """A browser whose camera is allowed."""
    with chromium(tmp_path / "browser") as tab:
        yield tab


def test_every_file_of_the_page_is_served_without_a_key_under_a_strict_policy(
    tiny: dict[str, object], redis_url: str
) -> None:
    with running(tiny, redis_url, [KEY], workers=False) as app, httpx.Client(base_url=app.url) as client:
        files = {"/": "index.html"} | {f"/page/{path.name}": path.name for path in FOLDER.iterdir()}
        for address, name in files.items():
            answer = client.get(address)
            assert answer.status_code == 200
            assert answer.content == (FOLDER / name).read_bytes()
            assert answer.headers["content-type"] == TYPES[Path(name).suffix]
            assert answer.headers["x-content-type-options"] == "nosniff"
            policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["..%2fsite.py", "%2e%2e/site.py", "nothing.js", "a%00b", ".hidden"])
def test_nothing_else_is_served(app: Application, name: str) -> None:
    answer = httpx.get(f"{app.url}/page/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_the_page_refers_to_nothing_elsewhere_and_to_nothing_missing() -> None:
    served = {path.name for path in FOLDER.iterdir()}
    for path in FOLDER.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(https?:)?//[\w.-]+\.\w", text), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|\sstyle=|\son\w+=", text), path.name
        for name in re.findall(r"""(?:"\./|"page/)([\w.]+)\"""", text):
            assert name in served, f"{path.name} refers to {name}"


class TestInABrowser:
    """What a person sees; with a made-up camera and the tiny model."""

    pytestmark = in_a_browser

    def test_a_camera_streams_and_lines_and_decisions_appear(self, app: Application, tab: Tab) -> None:
        tab.open(app.url)
        tab.click("#start")
        tab.until(DECIDED + "5")
        tab.until(LINES + "1")
        assert tab.text("#connection") == "connected"
        assert tab.log == []
