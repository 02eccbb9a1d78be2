"""A Chromium without a screen for tests of the page, driven by the DevTools protocol; and a line that can be cut."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from websockets.sync.client import ClientConnection, connect

DEADLINE_S = 240.0  # of a machine that does much else
LOOK_AGAIN_S = 0.1
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--no-first-run",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--remote-debugging-port=0",
]


def program() -> str | None:
    """Where a Chromium is, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """The one page of a browser."""

    def __init__(self, socket: ClientConnection, downloads: Path) -> None:
        self.socket = socket
        self.downloads = downloads
        self.log: list[str] = []
        self._asked = 0
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def call(self, method: str, **params: object) -> dict[str, object]:
        """One command of the protocol and its result."""
        self._asked += 1
        self.socket.send(json.dumps({"id": self._asked, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=DEADLINE_S))
            self._note(answer)
            if answer.get("id") == self._asked:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result = answer["result"]
                assert isinstance(result, dict)
                return result

    def _note(self, event: dict[str, object]) -> None:
        """Keep what the console shows of errors."""
        params = event.get("params")
        if event.get("method") == "Runtime.exceptionThrown":
            self.log.append(json.dumps(params))
        if event.get("method") == "Log.entryAdded" and isinstance(params, dict) and params["entry"]["level"] == "error":
            self.log.append(f"{params['entry']['source']}: {params['entry']['text']} {params['entry'].get('url', '')}")

    def run(self, script: str) -> object:
        """The value of an expression; of a promise, what it resolves to."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        value = result["result"]
        assert isinstance(value, dict)
        return value.get("value")

    def until(self, script: str, deadline_s: float = DEADLINE_S) -> object:
        """The value of an expression once it is true. Fails after `deadline_s`."""
        deadline = time.monotonic() + deadline_s
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"never came true: {script}\n{self.text('body')}\n{self.log}"
            time.sleep(LOOK_AGAIN_S)
        return value

    def open(self, url: str) -> None:
        self.log.clear()
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def text(self, selector: str) -> str:
        """What an element shows."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def centre(self, selector: str) -> tuple[float, float]:
        """The middle of an element, once scrolled to."""
        script = f"""(() => {{ const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: 'center', behavior: 'instant'}});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
        point = self.run(script)
        assert isinstance(point, list)
        return point[0], point[1]

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def click(self, selector: str) -> None:
        x, y = self.centre(selector)
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def drag(self, selector: str, to_y: float) -> None:
        """Drag an element up or down to that height of the window."""
        x, y = self.centre(selector)
        self.mouse("mousePressed", x, y)
        for step in range(1, 6):
            self.mouse("mouseMoved", x, y + (to_y - y) * step / 5)
        self.mouse("mouseReleased", x, to_y)

    def key(self, key: str, text: str = "") -> None:
        """Press and release a key."""
        code = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32, "ArrowUp": 38, "ArrowDown": 40, "Home": 36, "End": 35}
        common = {"key": key, "windowsVirtualKeyCode": code.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]
        assert isinstance(root, dict)
        node = self.call("DOM.querySelector", nodeId=root["nodeId"], selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path.resolve())])

    def size(self, width: int, height: int, phone: bool = False) -> None:
        """The window's size in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def prefer(self, **features: str) -> None:
        """Media features, as `prefers_color_scheme="dark"`."""
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=wanted)

    def permit(self, name: str, setting: str) -> None:
        """A permission as a person sets it: granted or denied."""
        self.call("Browser.setPermission", permission={"name": name}, setting=setting)

    def picture(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(str(data)))


@contextmanager
def chromium(folder: Path) -> Iterator[Tab]:
    """A browser of its own with an empty profile in `folder`, and a camera that shows a made-up picture."""
    path = program()
    assert path is not None, "no Chromium here"
    profile, downloads = folder / "profile", folder / "downloads"
    downloads.mkdir(parents=True)
    flags = [*FLAGS, f"--user-data-dir={profile}"]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen([path, *flags, "about:blank"], stdout=log, stderr=log)
        try:
            with connect(_address(profile, process), max_size=None, compression=None) as socket:
                yield Tab(socket, downloads)
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """The WebSocket of the first tab, once it is there."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"Chromium ended with {process.returncode}: see {profile.parent}/chromium.log"
        with suppress(OSError, ValueError, httpx.HTTPError):
            port = int((profile / "DevToolsActivePort").read_text().splitlines()[0])
            for target in httpx.get(f"http://127.0.0.1:{port}/json").json():
                if target["type"] == "page":
                    return str(target["webSocketDebuggerUrl"])
        time.sleep(LOOK_AGAIN_S)
    raise AssertionError("Chromium did not open its debugging port")


class Line:
    """A port that passes bytes on to a server until the line is cut; new connections go through again."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """Break all connections; how many ends there were."""
        with self._lock:
            ends, self._open = self._open, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        return len(ends)

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._host, self._port))
                with self._lock:
                    self._open += [client, server]
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=_pass_on, args=ends, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
