"""Rates, on a clock that the test moves."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from serve.limits import LimitsConfig, TokenBucket


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    now = 0.0
    bucket = TokenBucket(per_s=2, burst=3, clock=lambda: now)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    assert bucket.wait_s == 0.5
    now = 0.5
    assert [bucket.take(), bucket.take()] == [True, False]
    now = 100.0
    assert sum(bucket.take() for _ in range(10)) == 3


def test_a_message_limit_above_what_serve_lets_through_is_refused() -> None:
    with pytest.raises(ValidationError):
        LimitsConfig(message_bytes=17 << 20)
