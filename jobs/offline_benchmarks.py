"""The paper's offline benchmarks: one question about recorded frames, one answer, graded against names.

COIN asks for the step, the next step, the task and procedures (jobs/coin_metrics.py), Ego4D LTA for the next
twenty actions (jobs/lta_metrics.py); of its test set, whose answers are not released, the file for the test
server is written. VideoLLM-online, section 5.1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jobs import coin, lta, lta_metrics
from jobs.coin_metrics import accuracy, corrected_procedure_accuracy, published_procedure_accuracy
from jobs.dialogues import Dialogue
from jobs.generation import Generation

PROCEDURES = ("coin_procedure", "coin_taskprocedure")
TASK = "coin_task"
STEPS = tuple(kind for kind in coin.KINDS if kind != TASK)
LTA = "lta"
TASKS = (*coin.KINDS, LTA)
SUBMISSION = "lta_test_predictions.json"

# As the public reference generates: greedily for COIN, the five beams of the metric for LTA.
GENERATION = {kind: Generation(max_tokens=512) for kind in coin.KINDS} | {LTA: Generation(max_tokens=512, beams=5)}

Values = dict[str, float]


class BenchmarkError(ValueError):
    """The answers cannot be graded; says what is missing."""


@dataclass(frozen=True)
class Answered:
    """A dialogue and what the model answered, the likeliest first."""

    dialogue: Dialogue
    texts: list[str]


def is_offline(dialogue: Dialogue) -> bool:
    """Whether the dialogue belongs to an offline benchmark, and not to a stream."""
    return dialogue.task in TASKS


def check(dialogues: Sequence[Dialogue], annotations: Path | None) -> None:
    """Raises BenchmarkError where Ego4D LTA is asked for without the folder of its annotations."""
    if any(dialogue.task == LTA for dialogue in dialogues):
        _taxonomy(annotations)


def categories_of(dialogues: Sequence[Dialogue], annotations: Path | None) -> dict[str, set[str]]:
    """By task of COIN, the names that an answer can be nearest to: all of the split, as in the public reference.

    `annotations` is the folder of COIN's: a step that is never the answer to one of the questions counts, too.
    Without it they are what is an answer in the dialogues, of steps in those of any task.
    """
    found: dict[str, set[str]] = {task: set() for task in coin.KINDS}
    videos = {dialogue.video_id for dialogue in dialogues if dialogue.task in found}
    for dialogue in dialogues:
        if dialogue.task in found:
            for task in (TASK,) if dialogue.task == TASK else STEPS:
                found[task].update(label.lower() for label in dialogue.labels)
    if annotations is None or not videos:
        return found
    rows = list(coin.read_coin(TASK, annotations))
    splits = {row.split for row in rows if row.video_id in videos}
    for row in rows:
        if row.split in splits:
            found[TASK].update(task.lower() for task in row.tasks)
            for task in STEPS:
                found[task].update(moment.text.lower() for moment in row.moments)
    return found


def grade(
    task: str, answered: Sequence[Answered], annotations: Path | None = None, categories: Collection[str] = ()
) -> Values:
    """The numbers of a task, none where no answer is known.

    Ego4D LTA needs the folder of its annotations, COIN the `categories` of the task.
    """
    known = [one for one in answered if one.dialogue.labels]
    if not known:
        return {}
    if task == LTA:
        return _lta(known, annotations)
    labels = [[label.lower() for label in one.dialogue.labels] for one in known]
    said = [one.texts[0] for one in known]
    if task in PROCEDURES:
        return {
            "accuracy": published_procedure_accuracy(said, labels, categories),
            "corrected_accuracy": corrected_procedure_accuracy(said, labels, categories),
        }
    return {"accuracy": accuracy(said, [names[0] for names in labels], categories)}


def write_submission(answered: Sequence[Answered], annotations: Path | None, target: Path) -> int:
    """Write what the LTA test server takes, of the dialogues whose answer is not released; how many there are."""
    asked = [one for one in answered if one.dialogue.task == LTA and not one.dialogue.labels]
    if asked:
        reader, examples = _reader(annotations)
        forecasts = {_example(one, examples).name: reader.forecast(one.texts) for one in asked}
        lta_metrics.write_submission(target, forecasts)
    return len(asked)


def _lta(answered: Sequence[Answered], annotations: Path | None) -> Values:
    reader, examples = _reader(annotations)
    forecasts = np.stack([reader.forecast(one.texts) for one in answered])
    labels = np.array([_example(one, examples).actions for one in answered])
    return asdict(lta_metrics.evaluate(forecasts, labels))


def _reader(annotations: Path | None) -> tuple[lta_metrics.ActionReader, Mapping[tuple[str, bool], lta.Example]]:
    folder = _taxonomy(annotations)
    return lta_metrics.ActionReader(lta.read_taxonomy(folder)), lta.read_examples(folder)


def _taxonomy(annotations: Path | None) -> Path:
    if annotations is None:
        raise BenchmarkError(
            "answers to Ego4D LTA are graded by its labels: name the dataset in annotations.datasets "
            "(format lta or lta_test; path is the folder of fho_lta_taxonomy.json)"
        )
    return annotations


def _example(one: Answered, examples: Mapping[tuple[str, bool], lta.Example]) -> lta.Example:
    name = one.dialogue.dialogue_id
    found = examples.get((name, bool(one.dialogue.labels)))
    if found is None:
        raise BenchmarkError(
            f"dialogue {name!r} is not of these annotations of Ego4D LTA: name those in annotations.datasets that "
            "jobs.build_dialogues made it from"
        )
    return found
