"""What clients may ask of the server: the section `limits`, and a rate as a bucket of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable

from pydantic import Field

from actors.config import Section
from actors.image import MAX_PIXELS

SERVES_LARGEST_MESSAGE = 16 << 20  # Ray Serve closes a WebSocket with 1009 beyond it, which cannot be set
# Each time that Serve's proxy and a gateway pass messages on costs both more than most messages do. So in both
# directions this many of a connection cross one by one, and what comes faster crosses together, after so many seconds.
SINGLE_PER_S, SINGLE_BURST = 10.0, 20
BUNDLE_S = 0.1


class LimitsConfig(Section):
    """Limits of clients; what is over one is refused with an error that names it.

    `sessions` and `sessions_per_key` count live sessions and those whose client may still come back, over
    all gateways; clients of this machine without a key count as one key. `connections` are WebSockets and
    requests at a time of one gateway, `requests_per_key` the requests among them of one key, or of all without
    a valid one. `*_per_s` are rates of one session, `*_burst` what may come at once.
    `upload_bytes` is for multipart bodies, `body_bytes` for others. A request's headers must be there within
    `headers_s`, a body within `body_s`, and no `send_s` may pass without a byte of it. `recordings` are recorded
    videos that one gateway decodes at a time, `video_pixels` those of one of their pictures, `video_s` how long one may
    be by its own times. `idle_s` is without a word from either side.
    `send_s`, `outgoing_events` and `outgoing_bytes` are for clients that do not read.
    """

    sessions: int = Field(default=64, ge=1)
    sessions_per_key: int = Field(default=32, ge=1)
    connections: int = Field(default=512, ge=1)
    requests_per_key: int = Field(default=256, ge=1)
    frames_per_s: float = Field(default=60.0, gt=0)
    frames_burst: int = Field(default=600, ge=1)
    messages_per_s: float = Field(default=120.0, gt=0)
    messages_burst: int = Field(default=1200, ge=1)
    message_bytes: int = Field(default=6 << 20, ge=1024, le=SERVES_LARGEST_MESSAGE)
    frame_pixels: int = Field(default=MAX_PIXELS, ge=1, le=MAX_PIXELS)
    question_chars: int = Field(default=4096, ge=1)
    upload_bytes: int = Field(default=512 << 20, ge=1)
    body_bytes: int = Field(default=64 << 20, ge=1)
    headers_s: float = Field(default=20.0, gt=0)
    body_s: float = Field(default=900.0, gt=0)
    recordings: int = Field(default=8, ge=1)
    video_pixels: int = Field(default=4096 * 2304, ge=1)
    video_s: float = Field(default=8 * 3600.0, gt=0)
    idle_s: float = Field(default=120.0, gt=0)
    total_s: float = Field(default=4 * 3600.0, gt=0)
    send_s: float = Field(default=20.0, gt=0)
    outgoing_events: int = Field(default=1024, ge=1)
    outgoing_bytes: int = Field(default=4 << 20, ge=1024)


class TokenBucket:
    """Lets `per_s` things a second through, and up to `burst` at once after a pause.

    At the beginning `first` may pass at once, by default `burst`.
    """

    def __init__(
        self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic, first: int | None = None
    ) -> None:
        self.per_s = per_s
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst if first is None else first)
        self._at = clock()

    def take(self) -> bool:
        """Whether one more may pass now."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self.per_s)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    @property
    def wait_s(self) -> float:
        """Seconds until the next may pass."""
        return max(0.0, (1 - self._tokens) / self.per_s)
