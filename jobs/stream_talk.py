"""What is said about a made-up stream: narration, answers to questions, and notices somebody asked for.

Everything follows from what is in view at each frame. A name counts as in view from the second frame in
a row that shows it, and as gone at the second without it, so that a flash or a dropped picture is not
worth a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from actors.turns import Assistant, Stream, System, Turn, User
from jobs.object_names import kinds, with_article

NARRATE = (
    "Please narrate the video in real time.",
    "Tell me what comes into view.",
    "Describe what you see while the video plays.",
    "What is going on? Keep me informed.",
)
WATCH = ("Tell me when {thing} appears.", "Let me know when you see {thing}.", "Say so when {thing} comes into view.")
NOW = ("What do you see?", "What do you see now?", "What is in the picture?", "What is there right now?")
BEFORE = ("What did you see before?", "What was there before?", "What did you see before that?")
BEFORE_IT = ("What did you see before the {name}?", "What was there before the {name}?")
SO_FAR = ("What have you seen so far?", "What did you see until now?")
IS_THERE = ("Is there {thing}?", "Do you see {thing}?", "Can you see {thing} now?")
AGREED = "All right."
REMEMBERED = 4  # most names in one answer
LATER = 0.5  # share of those who wait that say so only in the first LATEST frames
LATEST = 8
AGAIN = 0.25  # share of the questions of who waits that are for something else to wait for

Event = tuple[Literal["appears", "returns", "gone"], str]


@dataclass
class View:
    """What has been in view up to some frame: the name there is now, and all names in order of coming."""

    current: str | None = None
    history: list[str] = field(default_factory=list)
    _candidate: str | None = None
    _absent: int = 0

    def next(self, shown: str | None) -> Event | None:
        """Take in one frame that shows `shown`; returns what is worth telling."""
        twice, self._candidate = shown is not None and shown == self._candidate, shown
        if shown == self.current:
            self._absent = 0
            return None
        self._absent += self.current is not None
        if shown is not None and twice:
            returned = shown in self.history
            self.current, self._absent = shown, 0
            self.history.append(shown)
            return ("returns" if returned else "appears"), shown
        if self.current is not None and shown is None and self._absent >= 2:
            gone, self.current, self._absent = self.current, None, 0
            return "gone", gone
        return None

    def before(self) -> str | None:
        """The name that was in view before the present one, or the last one if there is none now."""
        earlier = [name for name in self.history if name != self.current]
        return earlier[-1] if earlier else None


def narrated(event: Event) -> str:
    """The sentence of a narrator: "A dog comes into view."."""
    kind, name = event
    if kind == "appears":
        return f"{_sentence(with_article(name))} comes into view."
    return f"The {name} is {'back' if kind == 'returns' else 'gone'}."


def noticed(name: str) -> str:
    """What somebody is told who asked to be told."""
    return f"{_sentence(with_article(name))} is here now."


def answer_now(view: View) -> str:
    """To what is in view now."""
    return f"I see {with_article(view.current)}." if view.current else "Nothing that I can name."


def answer_before(view: View, reminded: bool = False) -> str:
    """To what was in view before; `reminded` of what is there now, which is then not taken for it."""
    name = view.before()
    now = f"the {view.current}" if reminded and view.current else "that"
    return f"Before {now} I saw {with_article(name)}." if name else "Nothing that I can name."


def answer_so_far(view: View) -> str:
    """To what has been in view until now: the latest names, each once."""
    names = list(dict.fromkeys(reversed(view.history)))[:REMEMBERED][::-1]
    if not names:
        return "Nothing that I can name."
    things = [with_article(name) for name in names]
    listed = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    return f"I saw {listed}."


def answer_is_there(view: View, name: str) -> str:
    """To whether `name` is in view."""
    if view.current == name:
        return f"Yes, I see {with_article(name)}."
    return f"No, I see {with_article(view.current)}." if view.current else "No."


@dataclass
class Talk:
    """A conversation over a stream, written frame by frame; `random` decides who asks what and when.

    When `narrated`, somebody asks for narration before the first frame, and nothing else is asked. `waits` says whether
    somebody waits for something, perhaps for what only looks like what comes; None leaves that to chance. When
    `sudden`, it may be asked for in one of the first frames only, and for something else later. The curious ask
    `questions`, at least and at most; where something is in view and something else was before, a share of `earlier` is
    about that. When `reminded`, the answer names what is in view first.
    """

    random: Random
    names: Sequence[str]
    curious: bool = False
    narrated: bool = False
    waits: bool | None = None
    view: View = field(default_factory=View)
    watched: str | None = None
    sudden: bool = False
    questions: tuple[int, int] = (1, 4)
    earlier: float = 0
    reminded: bool = False

    @property
    def _restless(self) -> bool:
        """Whether somebody may ask in the middle of the stream to be told of something."""
        return self.sudden and bool(self.waits)

    def conversation(self, shown: Sequence[str | None], system_prompt: str) -> list[Turn]:
        """The turns over frames that show these names, one a frame."""
        return [System(content=system_prompt), *self._turns(shown)]

    def _turns(self, shown: Sequence[str | None]) -> Iterator[Turn]:
        later = self.random.randint(0, LATEST) if self._restless and self.random.random() < LATER else None
        yield from self._opening(shown, bool(self.waits) and later is None)
        asked = set[int]()
        if not self.narrated:
            asked = self._curious_frames(shown) if self.curious else self._question_frames(len(shown))
        waiting = 0
        for frame, name in enumerate(shown):
            waiting += 1
            event = self.view.next(name)
            said = self._said(event)
            if said is not None:
                yield from (Stream(num_frames=waiting, learn=True), Assistant(content=said, learn=True))
                waiting = 0
            elif event is None and (frame in asked or (later is not None and frame >= later)):
                if later is None:
                    question, answer = self._question(shown[frame + 1 :])
                else:
                    question, answer, later = self._watch(shown[frame + 1 :]), AGREED, None
                # The frame at which somebody asks is no decision of the model's.
                yield Stream(num_frames=waiting, learn=waiting - 1)
                yield from (User(content=question), Assistant(content=answer, learn=True))
                waiting = 0
        if waiting:
            yield Stream(num_frames=waiting, learn=True)

    def _opening(self, shown: Sequence[str | None], waits: bool) -> Iterator[Turn]:
        """What stands before the first frame: nothing, an instruction, or what a cut context remembers."""
        if self.narrated:
            yield User(content=self.random.choice(NARRATE))
            yield Assistant(content=AGREED, learn=True)
            return
        kind = self.random.random()
        remembered = " ".join(self._remembered()) if self.random.random() < 0.2 else ""
        if kind < (0.3 if self.waits is None else float(waits)):
            yield User(content=self._watch(shown))
            yield Assistant(content=f"{AGREED} {remembered}".rstrip(), learn=not remembered)
        elif kind < 0.55:
            yield User(content=self.random.choice(NARRATE))
            yield Assistant(content=f"{AGREED} {remembered}".rstrip(), learn=not remembered)
        elif remembered:
            yield Assistant(content=remembered, learn=False)

    def _remembered(self) -> Iterator[str]:
        """Sentences said before a cut; the view takes them in."""
        for _ in range(self.random.randint(1, 4)):
            name = self.random.choice(self.names)
            for shown in (name, name, None, None):
                event = self.view.next(shown)
                if event and self.watched is None:
                    yield narrated(event)
                elif event and event[0] != "gone" and event[1] == self.watched:
                    yield noticed(event[1])

    def _watch(self, later: Sequence[str | None]) -> str:
        """Ask to be told of a name, most often of one that comes."""
        coming = sorted({name for name in later if name and name in self.names and name != self.view.current})
        likely = coming and self.random.random() < 0.75
        self.watched = self.random.choice(coming if likely else self._absent(coming))
        return self.random.choice(WATCH).format(thing=with_article(self.watched))

    def _absent(self, coming: Sequence[str]) -> Sequence[str]:
        """Names to wait for in vain, most often: any, or those of the same kinds as what comes."""
        if self.waits is None:
            return self.names
        of_kind = kinds()
        present = {kind for name in coming if (kind := of_kind.get(name))}
        return [name for name in self.names if of_kind.get(name) in present and name not in coming] or self.names

    def _said(self, event: Event | None) -> str | None:
        if event is None:
            return None
        if self.watched is None:
            return narrated(event)
        return noticed(event[1]) if event[0] != "gone" and event[1] == self.watched else None

    def _question_frames(self, length: int) -> set[int]:
        count = self.random.choice((0, 0, 1, 1, 2, 3))
        return {self.random.randrange(2, max(3, length)) for _ in range(count)}

    def _curious_frames(self, shown: Sequence[str | None]) -> set[int]:
        """As many moments as `questions`, most of them some seconds after what is in view has changed."""
        changes = [frame for frame in range(2, len(shown)) if shown[frame] == shown[frame - 1] != shown[frame - 2]]
        moments = set[int]()
        for _ in range(self.random.randint(*self.questions)):
            frame = self.random.randrange(2, max(3, len(shown)))
            if changes and self.random.random() < 0.7:
                frame = self.random.choice(changes) + self.random.randint(1, 8)
            moments.add(frame)
        return moments

    def _question(self, later: Sequence[str | None]) -> tuple[str, str]:
        if self._restless and self.random.random() < AGAIN:
            return self._watch(later), AGREED
        view = self.view
        if self.earlier and view.current and view.before() and self.random.random() < self.earlier:
            return self._about_before(), answer_before(view, self.reminded)
        kind = self.random.random() * (0.75 if self.curious else 1)
        if kind < 0.25:
            return self.random.choice(NOW), answer_now(view)
        if kind < 0.55:
            return self._about_before(), answer_before(view, self.reminded)
        if kind < 0.7:
            return self.random.choice(SO_FAR), answer_so_far(view)
        if kind < 0.88:
            seen = view.current if view.current and self.random.random() < 0.5 else self.random.choice(self.names)
            return self.random.choice(IS_THERE).format(thing=with_article(seen)), answer_is_there(view, seen)
        return self._watch(later), AGREED

    def _about_before(self) -> str:
        about = BEFORE_IT if self.view.current and self.random.random() < 0.6 else BEFORE
        return self.random.choice(about).format(name=self.view.current)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
