"""Levenshtein distance: how many items must be put in, left out or changed to make one list of another.

Benchmarks count a text as the label it is nearest to, out of up to tens of thousands, and compare
predicted with labelled actions; both are computed for all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class Choices:
    """Texts of which one is chosen: the one nearest to what was said, the alphabetically first of equals."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = sorted(set(texts))
        if not self.texts:
            raise ValueError("there is nothing to choose from, expected at least one text")
        self._lengths = np.array([len(text) for text in self.texts])
        self._codes = np.full((len(self.texts), max(self._lengths)), -1, np.int32)
        for row, text in zip(self._codes, self.texts, strict=True):
            row[: len(text)] = [ord(char) for char in text]
        self._known = {text: text for text in self.texts}

    def nearest(self, text: str) -> str:
        """The choice with the smallest distance to `text`."""
        if text not in self._known:
            self._known[text] = self.texts[int(self.distances(text).argmin())]
        return self._known[text]

    def distances(self, text: str) -> np.ndarray:
        """From `text` to each choice (C,)."""
        row = np.broadcast_to(np.arange(self._codes.shape[1] + 1), (len(self.texts), self._codes.shape[1] + 1))
        for char in text:
            row = _next_row(row, self._codes != ord(char))
        return row[np.arange(len(self.texts)), self._lengths]


def prefix_distances(predicted: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """Distances (..., Z) between the first 1, 2, ... Z items of lists (..., Z); leading dimensions broadcast."""
    predicted, labelled = np.broadcast_arrays(predicted, labelled)
    length = labelled.shape[-1]
    row = np.broadcast_to(np.arange(length + 1), (*labelled.shape[:-1], length + 1))
    distances = np.empty(labelled.shape, np.int64)
    for index in range(length):
        row = _next_row(row, labelled != predicted[..., index, None])
        distances[..., index] = row[..., index + 1]
    return distances


def _next_row(row: np.ndarray, differs: np.ndarray) -> np.ndarray:
    """The row (..., L + 1) of the distance table below `row`; `differs` (..., L) says where items are not equal."""
    left_out = row + 1
    best = left_out.copy()
    best[..., 1:] = np.minimum(left_out[..., 1:], row[..., :-1] + differs)
    # Putting in an item costs one more than the place before: a running minimum once the places are taken off.
    places = np.arange(row.shape[-1])
    return np.minimum.accumulate(best - places, axis=-1) + places
