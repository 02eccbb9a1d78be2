"""jobs.lookahead: items from another thread, in order, never too many, and no thread left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from jobs.lookahead import Lookahead


def test_items_come_in_order_and_end() -> None:
    with Lookahead(range(100), 3) as items:
        assert list(items) == list(range(100))
        assert list(items) == []


def test_items_are_made_in_another_thread_while_earlier_ones_are_used() -> None:
    made = threading.Event()

    def source() -> Iterator[int]:
        yield threading.get_ident()
        made.set()
        yield 1

    with Lookahead(source(), 2) as items:
        assert next(items) != threading.get_ident()
        assert made.wait(10)


def test_no_more_than_size_items_wait() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    with Lookahead(source(), 2) as items:
        for number in items:
            # One in the hands of each side, two between them.
            assert len(made) <= number + 4


def test_what_the_source_raises_comes_after_its_items() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    with Lookahead(source(), 2) as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="disk gone"):
                next(items)


def test_leaving_early_ends_the_thread() -> None:
    def source() -> Iterator[int]:
        while True:
            yield 0

    before = threading.active_count()
    with Lookahead(source(), 1) as items:
        next(items)
    assert threading.active_count() == before
