"""Log entries as the events that clients see. What a client did not ask for is left out here, never in the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from actors.messages import (
    FramesDecided,
    FrameSkipped,
    InputRefused,
    LogEntry,
    QueryConsumed,
    ResponseEnded,
    ResponseStarted,
    ResponseTokens,
    SessionSettings,
    SettingsApplied,
)
from serve.server_events import (
    ErrorEvent,
    ErrorInfo,
    FrameDecided,
    ItemAdded,
    ItemContent,
    ItemInfo,
    OutputContent,
    OutputItem,
    ResponseCreated,
    ResponseDone,
    ResponseInfo,
    ServerEvent,
    SessionInfo,
    SessionUpdated,
    StatusDetails,
    TextDelta,
    TextDone,
)

InfoOf = Callable[[SessionSettings], SessionInfo]

STATUS: dict[str, Literal["completed", "incomplete", "cancelled"]] = {
    "eos": "completed",
    "duplicate": "completed",
    "length": "incomplete",
    "interrupted": "cancelled",
}
DETAILS = {
    "length": StatusDetails(type="incomplete", reason="max_output_tokens"),
    "interrupted": StatusDetails(type="cancelled", reason="client_cancelled"),
}


class Translator:
    """Remembers the open responses of one session, since only their start says when and to what they answer."""

    def __init__(self) -> None:
        self._open: dict[str, ResponseStarted] = {}
        self._held: list[ServerEvent] | None = None

    def events(
        self, position: int, entry: LogEntry, include: frozenset[str], info_of: InfoOf, hold: bool = False
    ) -> Iterator[ServerEvent]:
        """One log entry as events, none for what is the server's own affair; `info_of` shows settings to clients.

        With `hold` a spontaneous response is told only when it is over, and not at all if it was a duplicate.
        """
        if isinstance(entry, ResponseStarted) and hold and entry.query_id is None:
            self._held = []
        found = self._events(position, entry, include, info_of)
        if self._held is None:
            yield from found
            return
        self._held += found
        if isinstance(entry, ResponseEnded):
            held, self._held = self._held, None
            if entry.reason != "duplicate":
                yield from held

    def _events(
        self, position: int, entry: LogEntry, include: frozenset[str], info_of: InfoOf
    ) -> Iterator[ServerEvent]:
        match entry:
            case FramesDecided():
                if "frame_decided" in include:
                    for offset, (at, p_silent) in enumerate(zip(entry.times, entry.p_silent, strict=True)):
                        seq = entry.first_seq + offset
                        yield FrameDecided(position=position, seq=seq, video_time=at, p_silent=p_silent)
            case FrameSkipped():
                message = f"frame at {entry.time:g} s was skipped: {entry.reason}"
                yield _refusal(position, "frame_skipped", message, video_time=entry.time)
            case QueryConsumed():
                item = ItemInfo(id=entry.query_id, content=[ItemContent(text=entry.text)])
                yield ItemAdded(position=position, video_time=entry.time, item=item)
            case InputRefused():
                yield _refusal(position, "refused", entry.reason, param=entry.query_id or "session")
            case ResponseStarted():
                self._open[entry.response_id] = entry
                response = ResponseInfo(
                    id=entry.response_id, status="in_progress", item_id=entry.query_id, video_time=entry.time
                )
                yield ResponseCreated(position=position, response=response)
            case ResponseTokens():
                if entry.text and entry.response_id in self._open:
                    yield TextDelta(
                        position=position,
                        response_id=entry.response_id,
                        item_id=_item_id(entry.response_id),
                        delta=entry.text,
                    )
            case ResponseEnded():
                yield from self._ended(position, entry)
            case SettingsApplied():
                yield SessionUpdated(position=position, session=info_of(entry.settings))

    def _ended(self, position: int, entry: ResponseEnded) -> Iterator[ServerEvent]:
        started = self._open.pop(entry.response_id, None)
        if started is None:  # the log was trimmed in the middle of this response: nobody was told of it
            return
        item_id, complete = _item_id(entry.response_id), STATUS[entry.reason] == "completed"
        yield TextDone(
            position=position,
            response_id=entry.response_id,
            item_id=item_id,
            video_time=started.time,
            text=entry.text,
        )
        said = OutputItem(
            id=item_id,
            status="completed" if complete else "incomplete",
            content=[OutputContent(text=entry.text)],
        )
        response = ResponseInfo(
            id=started.response_id,
            status=STATUS[entry.reason],
            status_details=DETAILS.get(entry.reason),
            output=[said],
            reason=entry.reason,
            item_id=started.query_id,
            video_time=started.time,
        )
        yield ResponseDone(position=position, response=response)


def _item_id(response_id: str) -> str:
    """The id of the assistant's message: a response has one."""
    return f"item_{response_id}"


def _refusal(
    position: int, code: str, message: str, param: str | None = None, video_time: float | None = None
) -> ErrorEvent:
    info = ErrorInfo(type="invalid_request_error", code=code, message=message, param=param, video_time=video_time)
    return ErrorEvent(position=position, error=info)
