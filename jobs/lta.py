"""Ego4D long-term action anticipation: after eight actions of a clip, name the next twenty.

An action is a verb and a noun of the taxonomy. Every position of a clip with eight actions before it
and twenty after it is an example; where the file holds no labels (the released test set), the answer
is unknown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, TypeAdapter

from jobs.annotations import AnnotationError, Moment, VideoAnnotation
from jobs.clock import Extent, exact
from jobs.dataset_files import EGO4D, Entry, Split, read_json
from jobs.ego4d import FILE_SPLIT
from jobs.scenes import Scene, answered, numbered

SEEN, ANTICIPATED = 8, 20
TEST = "test_unannotated"
QUESTION = (
    "After {frames} video frames, anticipate the next {actions} actions. Format your answer concisely, "
    "listing each action on a new line with a number prefix. No extra text output."
)
# Words that the taxonomy tells apart by what stands in brackets.
RENAMED = {
    "pot_(planter)": "flowerpot",
    "bat_(sports)": "sport bat",
    "nut_(food)": "nuts",
    "chip_(food)": "snack",
    "chip_(wood'_metal),": "chips",  # sic
}


class Taxonomy(Entry):
    """The words of all actions; a label is a position in them."""

    verbs: list[str]
    nouns: list[str]

    def action(self, verb: int, noun: int) -> str:
        """The words of an action. Raises IndexError for a label beyond the taxonomy."""
        if min(verb, noun) < 0:
            raise IndexError(f"labels {verb} and {noun} are no positions")
        return f"{word(self.verbs[verb])} {word(self.nouns[noun])}"


@dataclass(frozen=True)
class Example:
    """An example as the benchmark has it: its name there, and the (verb, noun) labels that follow, where released."""

    name: str
    actions: list[tuple[int, int]] | None


class _Action(Entry):
    video_uid: str
    clip_uid: str
    clip_parent_start_sec: float = Field(ge=0)
    clip_parent_end_sec: float
    action_clip_start_sec: float
    action_clip_end_sec: float
    action_idx: int
    verb_label: int | None = None
    noun_label: int | None = None


class _File(Entry):
    clips: list[_Action]


def word(name: str) -> str:
    """A verb or noun as one says it: "turn_on_(switch,_start)" is "turn on"."""
    return RENAMED.get(name, name.split("_(")[0].replace("_", " "))


def read_taxonomy(folder: Path) -> Taxonomy:
    """Raises AnnotationError where it is missing."""
    return read_json(folder / "fho_lta_taxonomy.json", TypeAdapter(Taxonomy), EGO4D)


def read_lta(folder: Path) -> Iterator[VideoAnnotation]:
    """A row a clip of the train and validation files, its actions in order."""
    taxonomy = read_taxonomy(folder)
    for split, name in FILE_SPLIT.items():
        yield from _clips(folder / f"fho_lta_{name}.json", split, taxonomy)


def read_lta_test(folder: Path) -> Iterator[VideoAnnotation]:
    """A row a clip of the test file, whose actions have times but no names."""
    yield from _clips(folder / f"fho_lta_{TEST}.json", "validation", None)


def read_examples(folder: Path) -> dict[tuple[str, bool], Example]:
    """Every example of the files that are there, by the id of its dialogue and whether its answer is known."""
    examples = {}
    for name in (*FILE_SPLIT.values(), TEST):
        path = folder / f"fho_lta_{name}.json"
        for (video_id, clip_uid), actions in _actions(path).items() if path.exists() else ():
            for number, index in enumerate(range(SEEN - 1, len(actions) - ANTICIPATED)):
                following = [(a.verb_label, a.noun_label) for a in actions[index + 1 : index + 1 + ANTICIPATED]]
                known = [(verb, noun) for verb, noun in following if verb is not None and noun is not None]
                example = Example(f"{clip_uid}_{actions[index].action_idx}", known if known == following else None)
                examples[f"{video_id}-lta-{clip_uid}-{number}", example.actions is not None] = example
    return examples


def scenes(row: VideoAnnotation, video: Extent) -> Iterator[Scene]:
    """One scene for every position with enough actions on both sides."""
    for index in range(SEEN - 1, len(row.moments) - ANTICIPATED):
        seen = row.moments[index + 1 - SEEN : index + 1]
        following = [moment.text for moment in row.moments[index + 1 : index + 1 + ANTICIPATED]]
        first, last = video.nearest(seen[0].time), video.nearest(seen[-1].stop or seen[-1].time)
        question = QUESTION.format(frames=last - first + 1, actions=ANTICIPATED)
        known = all(following)
        yield answered(first, last, question, following if known else [], numbered(following) if known else None)


def _clips(path: Path, split: Split, taxonomy: Taxonomy | None) -> Iterator[VideoAnnotation]:
    for (video_id, clip_uid), actions in _actions(path).items():
        yield VideoAnnotation(
            video_id=video_id,
            video="",
            moments=tuple(_moment(action, path, taxonomy) for action in actions),
            source=str(path),
            kind="lta",
            part=clip_uid,
            span=(actions[0].clip_parent_start_sec, actions[0].clip_parent_end_sec),
            split=split,
        )


def _actions(path: Path) -> Mapping[tuple[str, str], list[_Action]]:
    """The actions of a file in order, by video and clip."""
    clips: dict[tuple[str, str], list[_Action]] = defaultdict(list)
    for action in read_json(path, TypeAdapter(_File), EGO4D).clips:
        clips[action.video_uid, action.clip_uid].append(action)
    for actions in clips.values():
        actions.sort(key=lambda action: action.action_idx)
    return clips


def _moment(action: _Action, path: Path, taxonomy: Taxonomy | None) -> Moment:
    begin = exact(action.clip_parent_start_sec)
    times = [float(begin + exact(t)) for t in (action.action_clip_start_sec, action.action_clip_end_sec)]
    if taxonomy is None:
        return Moment(time=times[0], stop=times[1], text="")
    where = f"{path}: clip {action.clip_uid} action {action.action_idx}"
    if action.verb_label is None or action.noun_label is None:
        raise AnnotationError(f"{where}: no verb_label or noun_label, expected both in a file with labels")
    try:
        text = taxonomy.action(action.verb_label, action.noun_label)
    except IndexError:
        raise AnnotationError(
            f"{where}: verb_label {action.verb_label}, noun_label {action.noun_label}: the taxonomy has "
            f"{len(taxonomy.verbs)} verbs and {len(taxonomy.nouns)} nouns"
        ) from None
    return Moment(time=times[0], stop=times[1], text=text)
