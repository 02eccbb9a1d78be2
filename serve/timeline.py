"""A picture of who worked when: frames encoded in one process while another decides or speaks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

ROWS = ("encode", "decide", "speak")
COLOURS = {"encode": "tab:blue", "decide": "tab:green", "speak": "tab:orange"}
SHOWN_S = 12.0


@dataclass(frozen=True)
class Span:
    """One batch of the encoder or one step of the LLM: which frames of which session, when in Unix time."""

    kind: str
    session: str
    first: int
    last: int
    start: float
    end: float


def spans(stats: dict[str, list[dict[str, object]]]) -> list[Span]:
    """What encoders and LLMs remember of their work, by start; batches of several sessions count for the first."""
    work = []
    for told in stats["steps"]:
        if told["role"] == "encoder":
            first, last, _, start, end = cast("tuple[str, str, int, float, float]", told["step"])
            session, _, first_seq = first.rpartition(":")
            same, _, last_seq = last.rpartition(":")
            last_frame = int(last_seq if same == session else first_seq)
            work.append(Span("encode", session, int(first_seq), last_frame, start, end))
        else:
            work.append(Span(*cast("tuple[str, str, int, int, float, float]", told["step"])))
    return sorted(work, key=lambda span: span.start)


def overlapping(work: list[Span]) -> list[Span]:
    """Batches that were encoded while an earlier frame was decided or a response was being written."""
    steps = [span for span in work if span.kind != "encode"]
    return [
        batch
        for batch in work
        if batch.kind == "encode"
        and any(step.start < batch.end and batch.start < step.end and step.last < batch.first for step in steps)
    ]


def draw(stats: dict[str, list[dict[str, object]]], path: Path) -> None:
    """Draw the busiest `SHOWN_S` seconds of a run as bars with frame numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    work = spans(stats)
    start = _busiest(work)
    frames = sum(span.last - span.first + 1 for span in overlapping(work))
    figure, axes = pyplot.subplots(figsize=(14, 3.2), layout="constrained")
    for span in work:
        if not start <= span.start < start + SHOWN_S:
            continue
        row, left, width = ROWS.index(span.kind), span.start - start, span.end - span.start
        axes.barh(row, width, left=left, height=0.7, color=COLOURS[span.kind], edgecolor="white", linewidth=0.3)
        if span.kind != "speak":
            label = str(span.first) if span.first == span.last else f"{span.first}-{span.last}"
            axes.text(left + width / 2, row + 0.42, label, ha="center", va="bottom", fontsize=6, rotation=90)
    axes.set_yticks(range(len(ROWS)), ["encoder: encode", "LLM: decide", "LLM: speak"])
    axes.set_ylim(-0.6, len(ROWS) - 0.1)
    axes.set_xlim(0, SHOWN_S)
    axes.set_xlabel("seconds (numbers: frames)")
    axes.set_title(f"{frames} frames were encoded while the LLM decided or spoke about an earlier one")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _busiest(work: list[Span]) -> float:
    """Start of the stretch with most batches that overlap."""
    starts = [span.start for span in overlapping(work)] or [span.start for span in work]
    if not starts:
        raise ValueError("the workers remember no work, so there is nothing to draw")
    return max(starts, key=lambda start: sum(start <= other < start + SHOWN_S for other in starts)) - 0.3
