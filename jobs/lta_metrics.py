"""Ego4D long-term action anticipation: answers as verb and noun labels, their edit distances, the submission.

A forecast is an array (K, Z, 2): K answers (beams) of Z actions, each a verb and a noun label. The
distance of a forecast is that of its best answer. `ED@20` is the published number; `AUED` is the area
under the distances at 1, 2, ... 20 actions, as the public reference has it. VideoLLM-online, section 5.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from jobs.edit_distance import Choices, prefix_distances
from jobs.lta import ANTICIPATED, Taxonomy

LINE = re.compile(r"\d+\.(.*)")


@dataclass(frozen=True)
class Distances:
    """Mean over forecasts, from 0 (right) to 1. An action is right when its verb and its noun are."""

    verb_aued: float
    noun_aued: float
    verb_ed: float
    noun_ed: float
    action_ed: float


class ActionReader:
    """Turns answers into labels. Two words of the taxonomy that read alike are the later one of them."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self._labels = {
            taxonomy.action(verb, noun): (verb, noun)
            for verb in range(len(taxonomy.verbs))
            for noun in range(len(taxonomy.nouns))
        }
        self._choices = Choices(self._labels)
        # What the public reference answers where nothing was said: not the commonest action, but the first.
        self._default = self._labels[taxonomy.action(0, 0)]

    def labels(self, answer: str, num_actions: int = ANTICIPATED) -> np.ndarray:
        """The first actions of an answer (Z, 2), each the nearest there is; the last one fills what is missing.

        Only lines with a number and a period count.
        """
        lines = (found[1] for found in map(LINE.search, answer.splitlines()) if found)
        said = [self._labels[self._choices.nearest(_plain(line))] for line in islice(lines, num_actions)]
        said = said or [self._default]
        return np.array(said + [said[-1]] * (num_actions - len(said)))

    def forecast(self, answers: Sequence[str], num_actions: int = ANTICIPATED) -> np.ndarray:
        """The labels of several answers to one question (K, Z, 2)."""
        return np.stack([self.labels(answer, num_actions) for answer in answers])


def best_distances(predicted: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """(N, K, Z) and (N, Z) to (Z,): per action, at the first 1, 2, ... Z actions, of the best answer; the mean over N.

    Each length has its own best answer.
    """
    distances = prefix_distances(predicted, labelled[:, None]) / np.arange(1, labelled.shape[1] + 1)
    return np.asarray(distances.min(axis=1).mean(axis=0))


def aued(predicted: np.ndarray, labelled: np.ndarray) -> float:
    """Area under `best_distances` by trapezoids, as a share of the largest there could be."""
    distances = best_distances(predicted, labelled)
    return float((distances[1:] + distances[:-1]).sum() / 2 / (len(distances) - 1))


def evaluate(predicted: np.ndarray, labelled: np.ndarray) -> Distances:
    """Forecasts (N, K, Z, 2) against what happened (N, Z, 2)."""
    verbs, nouns = ((predicted[..., part], labelled[..., part]) for part in (0, 1))
    both = 1 + max(int(predicted.max()), int(labelled.max()))
    actions = tuple(part[..., 0] * both + part[..., 1] for part in (predicted, labelled))
    verb_ed, noun_ed, action_ed = (float(best_distances(*pair)[-1]) for pair in (verbs, nouns, actions))
    return Distances(aued(*verbs), aued(*nouns), verb_ed, noun_ed, action_ed)


def write_submission(path: Path, forecasts: Mapping[str, np.ndarray]) -> None:
    """The file for the test server: forecasts (K, Z, 2) by clip and index of the last action seen ("CLIP_7")."""
    content = {
        name: {"verb": forecast[..., 0].tolist(), "noun": forecast[..., 1].tolist()}
        for name, forecast in forecasts.items()
    }
    path.write_text(json.dumps(content))


def _plain(line: str) -> str:
    return " ".join(line.lower().split()).rstrip(".")
