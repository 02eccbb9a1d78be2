"""What a dialogue teaches about silence: the paper's objective and the two that it ablates.

All three train the same model with the same loss on the same dialogues; they differ in the turns that are
rendered, and so in ids and labels only (VideoLLM-online, sections 3.2 and 4.3).

`streaming`    every learned frame is a decision: the streaming EOS where the assistant stays silent, the end
               of the stream where it speaks. What everything else in this project runs.
`interleaved`  frames and text in one sequence, and only the assistant's words are learned. Nothing teaches
               silence, so P(silent) at a frame means nothing: a baseline for what is said, not for when.
`per_frame`    every frame is a chat turn of its own, answered with a stock reply where there is nothing to
               say. Whether to speak is decided by the reply's first words instead of one token at the frame,
               at the price of a whole turn for each frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from actors.turns import Assistant, Stream, Turn, User, parse

Objective = Literal["streaming", "interleaved", "per_frame"]

STOCK_REPLY = "Nothing new."


def taught(conversation: Sequence[Turn | Mapping[str, object]], objective: Objective) -> list[Turn]:
    """The turns to render so that a dialogue is learned by `objective`. Raises DialogueError."""
    turns = parse(conversation)
    if objective == "interleaved":
        return [_unlearned(turn) if isinstance(turn, Stream) else turn for turn in turns]
    if objective == "per_frame":
        followers = [*turns[1:], None]
        return [piece for turn, follower in zip(turns, followers, strict=True) for piece in _answered(turn, follower)]
    return turns


def _unlearned(stream: Stream) -> Stream:
    return stream.model_copy(update={"learn": False})


def _answered(turn: Turn, follower: Turn | None) -> list[Turn]:
    """A stream as single frames, each with a stock reply unless the user or the assistant speaks at it."""
    if not isinstance(turn, Stream):
        return [turn]
    spoken_at = turn.num_frames - 1 if isinstance(follower, User | Assistant) else None
    pieces: list[Turn] = []
    for frame in range(turn.num_frames):
        pieces.append(Stream(num_frames=1))
        if frame != spoken_at:
            pieces.append(Assistant(content=STOCK_REPLY, learn=frame < turn.num_learned))
    return pieces
