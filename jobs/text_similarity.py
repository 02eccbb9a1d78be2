"""How alike two short texts are: chrF, the F-score of their character n-grams, as sacrebleu computes it."""

from __future__ import annotations

from functools import lru_cache

from sacrebleu.metrics.chrf import CHRF

CHRF_METRIC = CHRF(lowercase=True)


@lru_cache(maxsize=1 << 16)
def chrf(text: str, reference: str) -> float:
    """From 0, no n-gram in common, to 1; case does not matter."""
    score: float = CHRF_METRIC.sentence_score(text, [reference]).score
    return score / 100
