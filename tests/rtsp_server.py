"""A camera that speaks RTSP as far as tests need it: one grey video as MPEG-4 over the connection itself."""

from __future__ import annotations

import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import av
import numpy as np

CLOCK_HZ = 90_000
FPS = 10
SIDE_PX = 64
SDP = f"""v=0
o=- 0 0 IN IP4 127.0.0.1
s=camera
c=IN IP4 0.0.0.0
t=0 0
m=video 0 RTP/AVP 96
a=rtpmap:96 MP4V-ES/{CLOCK_HZ}
a=control:video
""".replace("\n", "\r\n")


def encoded(frames: int) -> Iterator[bytes]:
    """A whole picture each, so that a client may begin with any."""
    codec = av.CodecContext.create("mpeg4", "w")
    codec.width = codec.height = SIDE_PX
    codec.pix_fmt, codec.framerate, codec.gop_size = "yuv420p", FPS, 1
    for index in range(frames):
        pixels = np.full((SIDE_PX, SIDE_PX, 3), (index * 5) % 256, np.uint8)
        yield from (bytes(packet) for packet in codec.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))


class Camera(socketserver.StreamRequestHandler):
    """One connection: answers as it is asked, then sends pictures at their pace, as many as the server's `frames`."""

    def handle(self) -> None:
        while request := self._request():
            method, number = request
            self.server.asked.append(method)  # type: ignore[attr-defined]
            self._answer(method, number)
            if method == "PLAY":
                self._play()
                return

    def _request(self) -> tuple[str, str] | None:
        """The method and its number; None once the client is gone."""
        lines = list(iter(lambda: self.rfile.readline().decode().strip(), ""))
        if not lines:
            return None
        numbers = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("cseq:")]
        return lines[0].split()[0], numbers[0]

    def _answer(self, method: str, number: str) -> None:
        body = SDP if method == "DESCRIBE" else ""
        headers = {
            "OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n",
            "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n",
            "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n",
            "PLAY": "Session: 1\r\n",
        }.get(method, "")
        self.wfile.write(f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\n{headers}\r\n{body}".encode())

    def _play(self) -> None:
        started = time.monotonic()
        for index, data in enumerate(encoded(self.server.frames)):  # type: ignore[attr-defined]
            time.sleep(max(0.0, started + index / FPS - time.monotonic()))
            header = struct.pack(">BBHII", 0x80, 0x80 | 96, index, index * CLOCK_HZ // FPS, 1)
            self.wfile.write(struct.pack(">cBH", b"$", 0, len(header) + len(data)) + header + data)


@contextmanager
def camera(frames: int) -> Iterator[tuple[int, list[str]]]:
    """Its port on this machine, and the methods it was asked for; it hangs up after so many frames of a connection."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Camera) as server:
        server.daemon_threads = True
        server.frames, server.asked = frames, []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1], server.asked  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()
