"""What the paper reports, to stand beside what a run obtained.

VideoLLM-online (CVPR 2024, arXiv 2406.11816): Table 2a (COIN, top-1 accuracy in percent), Table 2b (Ego4D LTA,
edit distance at 20 actions, lower is better), Table 3 (Ego4D narration stream, validation). Its 8B-v1+ is
Llama-3-8B-Instruct with 10 tokens a frame, its 7B-v1 Llama-2-7B-Chat with one. Streaming metrics are those of
the `paper` mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MODEL = "VideoLLM-online-8B-v1+"


@dataclass(frozen=True)
class Published:
    """A value of the paper, and the table it stands in."""

    value: float
    table: str
    model: str = MODEL


def _coin(value: float) -> Published:
    return Published(value, "Table 2a")


# By task of the dialogues, then by the name the report gives the number.
PUBLISHED: Mapping[str, Mapping[str, Published]] = {
    "coin_step": {"accuracy": _coin(63.1)},
    "coin_task": {"accuracy": _coin(92.7)},
    "coin_next": {"accuracy": _coin(49.1)},
    "coin_procedure": {"accuracy": _coin(49.8)},
    "coin_taskprocedure": {"accuracy": _coin(54.1)},
    "lta": {
        "verb_ed": Published(0.689, "Table 2b"),
        "noun_ed": Published(0.671, "Table 2b"),
        "action_ed": Published(0.884, "Table 2b"),
    },
    "ego4d_narration": {
        "time_diff": Published(2.05, "Table 3"),
        "fluency": Published(0.453, "Table 3"),
        "lm_correctness": Published(0.490, "Table 3"),
    },
}
