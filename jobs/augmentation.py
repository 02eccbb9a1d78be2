"""Mistakes put into dialogues, so that a model learns to go on after its own.

One reply is said late, is missing, or is another one, which may be taken back at the next frame.
What was done wrong on purpose is not learned; what is right after it is. VideoLLM-online trains its
narration with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from actors.turns import Assistant, Stream, Turn

CORRECTION = "(Sorry, the last response is wrong) "


def augment(turns: Sequence[Turn], rng: random.Random) -> tuple[Turn, ...]:
    """The dialogue with a mistake at a drawn reply; some draws leave it as it is.

    A reply is drawn from those that are learned, but the last; with fewer than two, nothing is drawn.
    """
    learned = [index for index, turn in enumerate(turns) if isinstance(turn, Assistant) and turn.learn]
    if len(learned) < 2:
        return tuple(turns)
    index = rng.choice(learned[:-1])
    said = _content(turns[index])
    # Sorted, so that the draw is the same in every process.
    others = sorted({_content(turns[i]) for i in learned} - {said})
    instead = rng.choice([*others, "", None])
    return mistake(turns, index, instead, repaired=bool(rng.getrandbits(1)))


def mistake(turns: Sequence[Turn], index: int, instead: str | None, repaired: bool) -> tuple[Turn, ...]:
    """The dialogue with reply `index` as `instead`, or unsaid at its frame (None).

    `repaired` says it at the next frame, after an apology if something else was said. Where that is
    impossible, because no frame comes before or enough after, the dialogue stays as it is.
    """
    before, after = turns[:index], turns[index + 1 :]
    stream = after[0] if after and isinstance(after[0], Stream) else None
    if instead is not None:
        wrong = Assistant(content=instead, learn=False)
        if not repaired:
            return (*before, wrong, *_unlearned(after))
        if stream is None or stream.num_frames < 2:
            return tuple(turns)
        apology = Assistant(content=CORRECTION + _content(turns[index]), learn=True)
        return (*before, wrong, Stream(num_frames=1, learn=True), apology, _rest(stream), *after[1:])
    waited = before[-1] if before and isinstance(before[-1], Stream) else None
    if repaired:
        if waited is None or stream is None or stream.num_frames < 2:
            return tuple(turns)
        late = Stream(num_frames=waited.num_frames + 1, learn=waited.num_frames - 1)
        return (*before[:-1], late, turns[index], _rest(stream), *after[1:])
    if waited is None or stream is None:
        return (*before, *_unlearned(after))
    missed = Stream(num_frames=waited.num_frames + stream.num_frames, learn=waited.num_frames - 1)
    return (*before[:-1], missed, *after[1:])


def _content(turn: Turn) -> str:
    return turn.content if isinstance(turn, Assistant) else ""


def _rest(stream: Stream) -> Stream:
    return Stream(num_frames=stream.num_frames - 1, learn=True)


def _unlearned(after: Sequence[Turn]) -> tuple[Turn, ...]:
    if after and isinstance(after[0], Stream):
        return (Stream(num_frames=after[0].num_frames, learn=False), *after[1:])
    return tuple(after)
