"""The next items of an iterator, made by a thread while the program is busy with earlier ones."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

ItemT = TypeVar("ItemT")


class Lookahead(Generic[ItemT]):
    """Iterates over `source` in a thread of its own, at most `size` items ahead.

    A context manager: its thread has ended when the block has. What `source` raises is raised by `next`.
    """

    def __init__(self, source: Iterable[ItemT], size: int) -> None:
        self._source = source
        self._items: queue.Queue[ItemT | _End] = queue.Queue(size)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lookahead", daemon=True)
        self._ended: _End | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        while self._thread.is_alive():  # it may wait for a place in the queue, again and again
            self._drain()
            self._thread.join(0.01)

    def __iter__(self) -> Iterator[ItemT]:
        return self

    def __next__(self) -> ItemT:
        if self._ended is None:
            item = self._items.get()
            if not isinstance(item, _End):
                return item
            self._ended = item
        if self._ended.error is not None:
            raise self._ended.error
        raise StopIteration

    def _run(self) -> None:
        end = _End(None)
        try:
            for item in self._source:
                self._items.put(item)
                if self._stopping.is_set():
                    return
        except BaseException as error:
            end = _End(error)
        self._items.put(end)

    def _drain(self) -> None:
        try:
            while True:
                self._items.get_nowait()
        except queue.Empty:
            return


class _End:
    """Comes after the last item, with what the source raised."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
