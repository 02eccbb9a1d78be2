"""The page: what is served, under which policy, and what it does in a browser."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from application import Application, running
from browser import DEADLINE_S, LOOK_AGAIN_S, Line, Tab, chromium, program
from live_client import live

from actors.config import ModelConfig
from jobs.annotations import read_webvtt
from serve.server_events import SessionCreated
from serve.site import FOLDER, TYPES

KEY = "the-right-key"
DECIDED = "Number(document.getElementById('decided').textContent) >= "
LINES = "document.querySelectorAll('#transcript li.assistant:not([hidden])').length >= "

SAID_AND_DECIDED = """[document.querySelectorAll('#transcript li.assistant').length,
    Number(document.getElementById('decided').textContent)]"""
NOTICE = "document.getElementById('notice-text').textContent"
NAME_OF_FOCUS = "document.activeElement.id || document.activeElement.value || document.activeElement.tagName"
OUTLINE_OF_FOCUS = """(() => { const focus = document.activeElement;
    const shown = focus.type === 'radio' ? focus.nextElementSibling : focus;
    return getComputedStyle(shown).outlineStyle; })()"""

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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """One browser for all tests here."""
    with chromium(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab) -> Iterator[Tab]:
    """The browser in a window of its own size, which leaves the page after the test."""
    browser.size(1280, 860)
    yield browser
    browser.call("Page.navigate", url="about:blank")


@pytest.fixture(scope="module")
def uncut(app: Application, browser: Tab, sample_video: Path) -> str:
    """What is exported of the sample video when nothing happens to the connection."""
    browser.open(app.url)
    watch_file(browser, sample_video)
    assert browser.log == []
    return exported(browser)


def watch_file(tab: Tab, video: Path, cut: Line | None = None) -> None:
    """Let a file be watched to its end as fast as the model can; `cut` breaks its connections on the way."""
    tab.click("input[value=file]")
    tab.choose_file("#file", video)
    tab.run("for (const [id, value] of [['fps', '1'], ['pace', 'fast']]) document.getElementById(id).value = value")
    tab.click("#start")
    for share in (0.2, 0.5, 0.8) if cut else ():
        tab.until(DECIDED + f"{share} * document.getElementById('player').duration")
        assert cut is not None
        assert cut.cut() > 0
        tab.until("document.getElementById('connection').dataset.state === 'reconnecting'")
    tab.until("document.getElementById('connection').dataset.state === 'ended'")
    frames = tab.run("Math.ceil(document.getElementById('player').duration)")
    assert (tab.text("#decided"), tab.text("#dropped")) == (str(frames), "0")


def exported(tab: Tab) -> str:
    """The file that the button leaves among the downloads."""
    target = tab.downloads / "transcript.vtt"
    target.unlink(missing_ok=True)
    tab.click("#export")
    deadline = time.monotonic() + DEADLINE_S
    while not target.is_file():
        assert time.monotonic() < deadline, "nothing was downloaded"
        time.sleep(LOOK_AGAIN_S)
    return target.read_text()


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

    def test_a_camera_streams_and_what_is_said_is_shown_and_read_aloud(self, app: Application, tab: Tab) -> None:
        tab.open(app.url)
        tab.run("window.aloud = []; speechSynthesis.speak = (utterance) => aloud.push(utterance.text)")
        tab.click("#speech")
        tab.click("#start")
        tab.until(LINES + "1")
        line = tab.until("aloud[0]")
        assert line in tab.text("#transcript")
        assert tab.run("document.getElementById('spoken').textContent")
        tab.until(DECIDED + "5")
        assert tab.text("#connection") == "connected"
        tab.click("#question")
        tab.type("What is <b>there</b>?")
        tab.key("Enter", "\r")
        tab.until(
            "[...document.querySelectorAll('.user[data-state=done] .text')].some((e) => e.textContent.includes('<b>'))"
        )
        tab.click("#start")
        tab.until("document.getElementById('connection').dataset.state === 'ended'")
        assert tab.log == []

    @pytest.mark.parametrize("fit", ["pad", "crop"])
    def test_the_sides_that_the_model_does_not_see_are_dimmed(
        self,
        fit: str,
        tab: Tab,
        tiny_configs: dict[str, ModelConfig],
        redis_url: str,
        sample_video: Path,
    ) -> None:
        model = tiny_configs["live1plus"].model_dump(mode="json")
        model["frames"]["fit"] = fit
        with running(model, redis_url) as app:
            tab.open(app.url)
            tab.click("input[value=file]")
            tab.choose_file("#file", sample_video)
            tab.click("#start")
            tab.until(DECIDED + "1")
            assert tab.run("document.getElementById('stage').dataset.fit") == fit
            boxes = tab.run(
                """['.seen', '.stage'].map((name) => {
                    const box = document.querySelector(name).getBoundingClientRect();
                    return [box.left + box.width / 2, box.top + box.height / 2, box.width, box.height]; })"""
            )
            wide = tab.run(
                "document.getElementById('player').videoWidth / document.getElementById('player').videoHeight"
            )
            assert isinstance(boxes, list)
            seen, stage = boxes
            if fit == "pad":
                assert seen[2:] == [0, 0]
            else:
                assert seen[:2] == pytest.approx(stage[:2], abs=1)
                side = min(stage[2], stage[3], stage[2] / wide, stage[3] * wide)
                assert seen[2:] == pytest.approx([side, side], abs=1)

    def test_a_dragged_threshold_decides_from_then_on(self, app: Application, tab: Tab) -> None:
        """The highest makes the tiny model speak at every frame, the lowest leaves it silent at some."""
        tab.open(app.url)
        tab.run("document.getElementById('opening').value = ''; document.getElementById('threshold').focus()")
        tab.key("Home")
        tab.click("#start")
        tab.until(DECIDED + "6")
        assert tab.run(SAID_AND_DECIDED + "[0] < 6")
        tab.drag("#threshold", 0)
        assert tab.run("document.getElementById('threshold').getAttribute('aria-valuenow')") == "1"
        tab.until("!document.getElementById('threshold').classList.contains('pending')")
        said = tab.run(SAID_AND_DECIDED + "[0]")
        tab.until(SAID_AND_DECIDED + f"[0] >= {said} + 3")
        tab.run(
            """new MutationObserver(() => {
                const button = document.getElementById('interrupt');
                if (!button.disabled) button.click();
            }).observe(document.getElementById('interrupt'), {attributes: true})"""
        )
        tab.until("document.querySelector('#transcript').textContent.includes('interrupted')")
        tab.run("document.getElementById('threshold').focus()")
        tab.key("Home")
        tab.until("!document.getElementById('threshold').classList.contains('pending')")
        tab.until("document.getElementById('interrupt').disabled")
        counts = tab.run(SAID_AND_DECIDED)
        assert isinstance(counts, list)
        tab.until(DECIDED + f"{counts[1]} + 6")
        assert tab.run(SAID_AND_DECIDED + f"[0] < {counts[0]} + 6")

    def test_every_frame_of_a_file_is_decided_and_the_transcript_exported(
        self, uncut: str, tab: Tab, app: Application, sample_video: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "transcript.vtt"
        target.write_text(uncut)
        moments = [moment for video in read_webvtt(target) for moment in video.moments]
        assert moments
        assert "NOTE 0:00 asked: Please narrate the video in real time." in uncut

    def test_a_connection_cut_again_and_again_changes_nothing(
        self, uncut: str, tab: Tab, app: Application, sample_video: Path
    ) -> None:
        line = Line(app.url)
        try:
            tab.open(line.url)
            watch_file(tab, sample_video, cut=line)
            assert exported(tab) == uncut
        finally:
            line.close()

    def test_a_frame_is_taken_only_once_it_is_painted(
        self, uncut: str, tab: Tab, app: Application, sample_video: Path
    ) -> None:
        tab.open(app.url)
        tab.run(
            """(() => {
                const time = Object.getOwnPropertyDescriptor(HTMLMediaElement.prototype, 'currentTime');
                Object.defineProperty(HTMLMediaElement.prototype, 'currentTime', {...time, set(value) {
                    time.set.call(this, value);
                    this.dispatchEvent(new Event('seeked'));
                }});
            })()"""
        )
        watch_file(tab, sample_video)
        assert exported(tab) == uncut

    def test_a_wrong_key_and_a_full_server_are_said_in_words(
        self, tab: Tab, tiny: dict[str, object], redis_url: str
    ) -> None:
        with running(tiny, redis_url, [KEY], sessions=1) as app:
            tab.open(app.url)
            for key, words in (("", "needs an API key"), ("wrong", "does not know this key")):
                tab.run(f"document.getElementById('key').value = '{key}'")
                tab.click("#start")
                tab.until(NOTICE + f".includes('{words}')")
                assert tab.run("document.getElementById('key-box').open")
                assert tab.text("#start") == "Start"
            tab.run(f"document.getElementById('key').value = '{KEY}'")
            with live(app.url, Authorization=f"Bearer {KEY}") as other:
                other.until(SessionCreated)
                tab.click("#start")
                tab.until(NOTICE + ".includes('server is full')")
                other.configure()
                other.end()
            tab.click("#start")
            tab.until(DECIDED + "2")
            assert not tab.run(NOTICE)
            tab.click("#start")
            tab.until("document.getElementById('connection').dataset.state === 'ended'")

    def test_a_refused_camera_is_said_in_words(self, app: Application, tab: Tab) -> None:
        tab.open(app.url)
        tab.run(
            """navigator.mediaDevices.getUserMedia = async () => {
                throw new DOMException('Permission denied', 'NotAllowedError');
            }"""
        )
        tab.click("#start")
        tab.until(NOTICE + ".includes('camera was refused')")
        assert tab.text("#start") == "Start"

    def test_a_file_that_is_no_video_is_said_in_words(self, app: Application, tab: Tab, tmp_path: Path) -> None:
        tab.open(app.url)
        tab.click("input[value=file]")
        tab.click("#start")
        tab.until(NOTICE + ".includes('Choose a video file first')")
        no_video = tmp_path / "text.mp4"
        no_video.write_text("no video")
        tab.choose_file("#file", no_video)
        tab.click("#start")
        tab.until(NOTICE + ".includes('cannot play the file')")
        assert tab.text("#start") == "Start"

    def test_a_screen_is_watched(self, app: Application, tab: Tab) -> None:
        tab.open(app.url)
        tab.click("input[value=screen]")
        tab.click("#start")
        tab.until(DECIDED + "2")

    def test_keys_alone_do_everything_on_a_phone(self, app: Application, tab: Tab) -> None:
        tab.size(360, 740, phone=True)
        tab.open(app.url)
        reached = list[str]()
        while "interrupt" not in reached and len(reached) < 40:
            tab.key("Tab")
            reached.append(str(tab.run(NAME_OF_FOCUS)))
            outline = tab.run(OUTLINE_OF_FOCUS) if reached[-1] != "BODY" else "the browser's own"
            assert outline != "none", f"{reached[-1]} has no visible focus"
            if reached[-1] == "start":
                tab.key("Enter", "\r")
                tab.until(DECIDED + "1")
            if reached[-1] == "question":
                tab.type("And now?")
                tab.key("Enter", "\r")
        wanted = {"camera", "fps", "opening", "start", "speech", "export", "transcript", "question", "send"}
        assert wanted <= set(reached)
        tab.until(LINES + "1")
        assert tab.run("document.documentElement.scrollWidth") == 360
        small = tab.run(
            """[...document.querySelectorAll('button, select, input')].filter((element) => {
                const {width, height} = element.getBoundingClientRect();
                return width && height && !element.matches('.time, #speech') && (height < 32 || width < 24);
            }).map((element) => element.id || element.value)"""
        )
        assert small == []
        unnamed = tab.run(
            """[...document.querySelectorAll('button, select, input, video, canvas, [role]')].filter((element) =>
                !(element.labels?.length || element.getAttribute('aria-label') || element.textContent.trim()
                  || element.matches('[role=status], [role=alert], .time'))).map((element) => element.outerHTML)"""
        )
        assert unnamed == []
