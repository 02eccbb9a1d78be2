"""What the server may be made to read: judged by text, by address, and over real connections."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import ValidationError

from serve.client_events import ClientError
from serve.fetch import HttpFile, data_url, download
from serve.url_guard import SourcesConfig, UrlGuard

PUBLIC = "93.184.215.14"


def guard(resolve: Callable[[str, int], list[str]] = lambda *_: [PUBLIC], **settings: object) -> UrlGuard:
    given = {"hosts": ["*"], "schemes": ["https", "http", "rtsp"], "connect_s": 5.0, **settings}
    return UrlGuard(SourcesConfig.model_validate(given), resolve)


def test_without_settings_no_url_is_read() -> None:
    with pytest.raises(ClientError, match=r"sources\.hosts"):
        UrlGuard(SourcesConfig()).check("https://example.org/a.mp4")
    with pytest.raises(ClientError, match=r"sources\.folders"):
        UrlGuard(SourcesConfig()).file("/etc/passwd")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "concat:/etc/passwd|/etc/hosts",
        "gopher://example.org/",
        "data:video/mp4;base64,AAAA",
        "subfile,,start,0,end,0,,:/etc/passwd",
        "//example.org/a",
        "https:///a",
        "https://user:secret@example.org/",
        "https://example.org\\@10.0.0.1/",
        "https://exa mple.org/",
        "https://example.org/\r\nX: 1",
        "https://example.org:99999/",
        "https://[::1",
        "https://ex\u00e4mple.org/",
        "https://example.org/" + "a" * 5000,
        "",
    ],
)
def test_what_is_no_plain_url_of_an_allowed_scheme_is_refused(url: str) -> None:
    with pytest.raises(ClientError) as refused:
        guard().check(url, "video_url")
    assert (refused.value.code, refused.value.param) == ("url_refused", "video_url")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("hosts", "url", "allowed"),
    [
        (["example.org"], "https://example.org/a", True),
        (["example.org"], "https://EXAMPLE.org./a", True),
        (["example.org"], "https://sub.example.org/a", False),
        (["example.org"], "https://example.org:8443/a", False),
        (["example.org:8443"], "https://example.org:8443/a", True),
        (["example.org:*"], "https://example.org:1/a", True),
        (["*.example.org"], "https://sub.example.org/a", True),
        (["*.example.org"], "https://badexample.org/a", False),
        (["*"], "https://anything.example/a", True),
        (["*"], "https://anything.example:22/a", False),
    ],
)
def test_hosts_are_listed_with_their_ports(hosts: list[str], url: str, allowed: bool) -> None:
    if allowed:
        assert guard(hosts=hosts).check(url)
    else:
        with pytest.raises(ClientError, match="among the hosts"):
            guard(hosts=hosts).check(url)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::7f00:1", "fe80::1%eth0",
    ],
)  # fmt: skip
def test_names_that_resolve_to_addresses_that_are_not_public_are_refused(address: str) -> None:
    judge = guard(lambda *_: [PUBLIC, address])
    with pytest.raises(ClientError, match="not public"):
        judge.addresses(judge.check("https://innocent.example/a"))


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:7f00:1]"])
def test_every_way_to_write_loopback_is_seen_through(host: str) -> None:
    judge = UrlGuard(SourcesConfig(hosts=["*"]))
    with pytest.raises(ClientError) as refused:
        judge.addresses(judge.check(f"https://{host}/"))
    assert refused.value.code in ("url_refused", "url_unreachable")


def test_public_addresses_and_listed_networks_are_reached() -> None:
    judge = guard(networks=["192.168.7.0/24"])
    for address in (PUBLIC, "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "192.168.7.9", "::ffff:192.168.7.9"):
        assert judge.reachable(ipaddress.ip_address(address))
    assert not judge.reachable(ipaddress.ip_address("192.168.8.9"))


@pytest.mark.parametrize("settings", [{"schemes": ["file"]}, {"networks": ["nowhere"]}, {"host": ["a"]}])
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SourcesConfig.model_validate(settings)


def test_files_lie_in_listed_folders_whatever_links_say(tmp_path: Path) -> None:
    allowed, secret = tmp_path / "videos", tmp_path / "secret.mp4"
    allowed.mkdir()
    secret.write_bytes(b"s")
    (allowed / "a.mp4").write_bytes(b"a")
    (allowed / "link.mp4").symlink_to(secret)
    judge = guard(folders=[str(allowed)])
    assert judge.file(str(allowed / "a.mp4")) == allowed / "a.mp4"
    names = [allowed / "link.mp4", allowed / ".." / "secret.mp4", allowed, allowed / "none.mp4", "/dev/zero", "\0"]
    for name in names:
        with pytest.raises(ClientError, match="no file in the folders"):
            judge.file(str(name))


class Server:
    """A local HTTP server whose answers are functions of a handler."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[tuple[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.asked.append((self.path, self.headers["Host"]))
                server.answers[self.path](self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=lambda: self._http.serve_forever(poll_interval=0.01))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def content(self, path: str, body: bytes, announce: bool = True) -> None:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            handler.send_response(206 if start else 200)
            if announce:
                handler.send_header("Content-Length", str(len(body) - start))
                handler.send_header("Accept-Ranges", "bytes")
            else:
                handler.send_header("Connection", "close")
            handler.end_headers()
            handler.wfile.write(body[start:])
            handler.close_connection = not announce

        self.answers[path] = answer

    def redirect(self, path: str, to: str) -> None:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(302)
            handler.send_header("Location", to)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        self.answers[path] = answer


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def local(server: Server, resolve: Callable[[str, int], list[str]] | None = None, **settings: object) -> UrlGuard:
    """A guard under which `public.example` is the local server."""
    hosts = [f"public.example:{server.port}", "inside.example", "elsewhere.example:*"]
    given = {"hosts": hosts, "networks": ["127.0.0.1/32"], **settings}

    def names(host: str, _: int) -> list[str]:
        return {"public.example": ["127.0.0.1"], "inside.example": ["10.0.0.1"]}.get(host, ["127.0.0.2"])

    return guard(resolve or names, **given)


def test_a_download_is_the_content(server: Server, tmp_path: Path) -> None:
    server.content("/a", b"x" * 100_000)
    download(local(server), f"http://public.example:{server.port}/a", tmp_path / "a", "video_url")
    assert (tmp_path / "a").read_bytes() == b"x" * 100_000
    assert server.asked == [("/a", f"public.example:{server.port}")]


@pytest.mark.parametrize(
    "to",
    ["http://127.0.0.1:{port}/b", "http://inside.example/b", "http://elsewhere.example:{port}/b", "file:///etc/passwd"],
)
def test_a_redirect_to_where_nothing_may_be_read_is_not_followed(server: Server, to: str, tmp_path: Path) -> None:
    server.redirect("/a", to.format(port=server.port))
    server.content("/b", b"secret")
    with pytest.raises(ClientError) as refused:
        download(local(server), f"http://public.example:{server.port}/a", tmp_path / "a", "video_url")
    assert refused.value.code == "url_refused"
    assert [path for path, _ in server.asked] == ["/a"]


def test_redirects_are_followed_where_they_may_and_not_for_ever(server: Server, tmp_path: Path) -> None:
    server.redirect("/a", "/b")
    server.content("/b", b"found")
    server.redirect("/loop", "/loop")
    base = f"http://public.example:{server.port}"
    download(local(server), f"{base}/a", tmp_path / "a", "video_url")
    assert (tmp_path / "a").read_bytes() == b"found"
    with pytest.raises(ClientError, match="more than 3 times"):
        download(local(server), f"{base}/loop", tmp_path / "b", "video_url")


@pytest.mark.parametrize("host", ["a..example.org", f"{'a' * 64}.example.org"])
def test_a_name_that_can_be_none_has_no_address(host: str) -> None:
    judge = UrlGuard(SourcesConfig(hosts=["*.example.org"]))
    with pytest.raises(ClientError, match="has no address"):
        judge.addresses(judge.check(f"https://{host}/"))


def test_a_redirect_to_what_is_no_url_is_told(server: Server, tmp_path: Path) -> None:
    server.redirect("/a", "http://[")
    with pytest.raises(ClientError, match="which is no URL"):
        download(local(server), f"http://public.example:{server.port}/a", tmp_path / "a", "video_url")


def test_a_name_that_changes_its_address_gains_nothing(server: Server, tmp_path: Path) -> None:
    """The address that was judged is the one that is connected to: the name is resolved once."""
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    server.content("/a", b"x")
    judge = local(server, lambda *_: answers.pop(0))
    download(judge, f"http://public.example:{server.port}/a", tmp_path / "a", "video_url")
    assert answers == [["10.0.0.1"]]


@pytest.mark.parametrize("announce", [True, False])
def test_a_download_is_bounded_announced_or_not(server: Server, announce: bool, tmp_path: Path) -> None:
    server.content("/a", bytes(100_000), announce)
    with pytest.raises(ClientError) as refused:
        download(local(server, fetch_bytes=1000), f"http://public.example:{server.port}/a", tmp_path / "a", "url")
    assert refused.value.code == "too_big"
    assert (tmp_path / "a").stat().st_size <= 1000


def test_a_server_that_drips_is_left_in_time(server: Server, tmp_path: Path) -> None:
    over = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not over.wait(0.02):
            try:
                handler.wfile.write(b"X: 1\r\n")
            except OSError:
                return

    server.answers["/a"] = drip
    try:
        with pytest.raises(ClientError, match="ReadTimeout"):
            download(local(server, fetch_s=0.3), f"http://public.example:{server.port}/a", tmp_path / "a", "url")
    finally:
        over.set()


def test_errors_of_the_server_are_told(server: Server, tmp_path: Path) -> None:
    server.answers["/a"] = lambda handler: handler.send_error(404)
    with pytest.raises(ClientError, match="status 404"):
        download(local(server), f"http://public.example:{server.port}/a", tmp_path / "a", "video_url")
    with pytest.raises(ClientError, match="cannot be read"):
        download(
            guard(lambda *_: ["127.0.0.1"], hosts=["*:*"], networks=["127.0.0.1/32"]),
            "http://nobody.example:9/",
            tmp_path / "a",
            "video_url",
        )


def test_an_http_file_is_read_and_sought(server: Server) -> None:
    body = bytes(range(256)) * 100
    server.content("/a", body)
    with HttpFile(local(server), f"http://public.example:{server.port}/a", "source") as file:
        assert file.read(10) == body[:10]
        assert file.seek(-5, 2) == len(body) - 5
        assert file.read() == body[-5:]
        assert file.seek(100) == 100
        assert file.read(5) == body[100:105]


def test_data_urls() -> None:
    assert data_url("data:image/png;base64,AAEC", "image_url", ("image/",), 10) == b"\0\1\2"
    assert data_url("data:image/png,%00a", "image_url", ("image/",), 10) == b"\0a"
    for url, code in {
        "data:text/html;base64,AAEC": "bad_url",
        "data:image/png;base64,A!": "bad_url",
        "data:image/png;base64": "bad_url",
        "data:image/png;base64," + "A" * 100: "too_big",
    }.items():
        with pytest.raises(ClientError) as refused:
            data_url(url, "image_url", ("image/",), 10)
        assert refused.value.code == code
