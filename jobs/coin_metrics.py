"""Accuracy on COIN: step, next step, task, procedure, and procedure with the task told.

An answer counts as right when it reads as the label, or the label is the category nearest to it. The
published procedure metric looks only at as many lines as prediction and label both have, so that one
right line of five is 100 %; the `corrected` one asks for every line. VideoLLM-online, section 5.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from jobs.edit_distance import Choices

NUMBER = re.compile(r"^\d+\.\s*")


def accuracy(predictions: Sequence[str], labels: Sequence[str], categories: Iterable[str]) -> float:
    """Answers that are right, in percent. `categories` are all labels that could be given, in lower case."""
    choices = Choices(categories)
    right = [
        _plain(predicted) == label or choices.nearest(_plain(predicted)) == label
        for predicted, label in zip(predictions, labels, strict=True)
    ]
    return _percent(sum(right), len(right))


def published_procedure_accuracy(
    predictions: Sequence[str], labels: Sequence[Sequence[str]], categories: Iterable[str]
) -> float:
    """Right lines in percent of those that both prediction and label have, as the public reference counts."""
    choices = Choices(categories)
    right = [
        line == label or choices.nearest(line) == label
        for predicted, steps in zip(predictions, labels, strict=True)
        for line, label in zip(predicted.split("\n"), steps, strict=False)
    ]
    return _percent(sum(right), len(right))


def corrected_procedure_accuracy(
    predictions: Sequence[str], labels: Sequence[Sequence[str]], categories: Iterable[str]
) -> float:
    """Right lines in percent of all: a line that is missing is wrong, and so is one too many.

    Blank lines and the numbers before lines do not count; case and final periods are ignored.
    """
    choices = Choices(categories)
    right = total = 0
    for predicted, steps in zip(predictions, labels, strict=True):
        lines = [NUMBER.sub("", _plain(line.strip()), count=1) for line in predicted.splitlines() if line.strip()]
        right += sum(choices.nearest(line) == label for line, label in zip(lines, steps, strict=False))
        total += max(len(lines), len(steps))
    return _percent(right, total)


def _plain(text: str) -> str:
    return text.lower().rstrip(".")


def _percent(right: int, total: int) -> float:
    if total == 0:
        raise ValueError("there is no answer to count, expected at least one")
    return 100 * right / total
