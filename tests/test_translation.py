"""Log entries as a client sees them."""

from __future__ import annotations

from actors.messages import LogEntry, QueryConsumed, ResponseEnded, ResponseStarted, ResponseTokens
from serve.server_events import ServerEvent, SessionInfo, VideoInfo
from serve.translation import Translator

INFO = lambda _: SessionInfo(  # noqa: E731
    id="s",
    instructions=None,
    max_output_tokens=10,
    include=[],
    video=VideoInfo(fps=2, threshold=0.7, drop_policy="latest", fit="pad"),
)


def told(entries: list[LogEntry], hold: bool) -> list[str]:
    """Types of the events, with the number of the entry after which each is told."""
    translator = Translator()
    found: list[tuple[int, ServerEvent]] = []
    for position, entry in enumerate(entries):
        found += [(position, event) for event in translator.events(position, entry, frozenset(), INFO, hold)]
    assert [event.position for _, event in found] == sorted(event.position or 0 for _, event in found)
    return [f"{position} {event.type}" for position, event in found]


def response(reason: str, query_id: str | None = None) -> list[LogEntry]:
    return [
        ResponseStarted(response_id="r", query_id=query_id, seq=3, time=1.5),
        ResponseTokens(response_id="r", ids=[1], text="A cat."),
        ResponseEnded.model_validate({"response_id": "r", "reason": reason, "text": "A cat."}),
    ]


AS_IT_IS_SPOKEN = [
    "0 response.created",
    "1 response.output_text.delta",
    "2 response.output_text.done",
    "2 response.done",
]


def test_a_response_is_told_as_it_is_spoken() -> None:
    assert told(response("eos"), hold=False) == AS_IT_IS_SPOKEN


def test_where_duplicates_are_unwanted_a_response_is_told_once_it_is_known_to_be_none() -> None:
    assert told(response("eos"), hold=True) == [
        "2 response.created",
        "2 response.output_text.delta",
        "2 response.output_text.done",
        "2 response.done",
    ]


def test_a_duplicate_is_not_told() -> None:
    assert told([*response("duplicate"), *response("eos")], hold=True)[0] == "5 response.created"


def test_of_a_response_whose_start_was_trimmed_nothing_is_told() -> None:
    whole = [f"{int(line[0]) + 2}{line[1:]}" for line in AS_IT_IS_SPOKEN]
    for hold in (False, True):
        assert told([*response("eos")[1:], *response("eos", "q")], hold=hold) == whole


def test_an_answer_is_never_held_back() -> None:
    asked = QueryConsumed(query_id="q", text="What now?", seq=3, time=1.5)
    spoken = [f"{int(line[0]) + 1}{line[1:]}" for line in AS_IT_IS_SPOKEN]
    assert told([asked, *response("eos", "q")], hold=True)[1:] == spoken
