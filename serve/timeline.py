"""A picture of who worked when: frames encoded in one process while another decides or speaks."""

from __future__ import annotations

from pathlib import Path
from typing import cast

ROWS = ("encode", "decide", "speak")
COLOURS = {"encode": "tab:blue", "decide": "tab:green", "speak": "tab:orange"}
SHOWN_S = 12.0

Span = tuple[str, str, int, int, float, float]  # kind, session, first frame, last frame, start and end in Unix time


def spans(stats: dict[str, dict[str, object]]) -> list[Span]:
    """What encoder and LLM remember of their work, by start."""
    found = []
    for worker in ("encoder", "llm"):
        found += [cast("Span", tuple(span)) for span in cast("list[list[object]]", stats[worker]["timeline"])]
    return sorted(found, key=lambda span: span[4])


def overlaps(work: list[Span]) -> int:
    """How many frames were encoded while an earlier frame was decided or a response was being written."""
    encoded = [span for span in work if span[0] == "encode"]
    llm = [span for span in work if span[0] != "encode"]
    return sum(
        any(other[4] < end and start < other[5] and other[3] < first for other in llm)
        for _, _, first, _, start, end in encoded
    )


def draw(stats: dict[str, dict[str, object]], path: Path) -> None:
    """Draw the busiest `SHOWN_S` seconds of a run as bars with frame numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    work = spans(stats)
    start = _busiest(work)
    figure, axes = pyplot.subplots(figsize=(14, 3.2), layout="constrained")
    for kind, _, first, last, begin, end in work:
        if not start <= begin < start + SHOWN_S:
            continue
        row = ROWS.index(kind)
        axes.barh(
            row, end - begin, left=begin - start, height=0.7, color=COLOURS[kind], edgecolor="white", linewidth=0.3
        )
        if kind != "speak":
            label = str(first) if first == last else f"{first}-{last}"
            axes.text((begin + end) / 2 - start, row + 0.42, label, ha="center", va="bottom", fontsize=6, rotation=90)
    axes.set_yticks(range(len(ROWS)), ["encoder: encode", "LLM: decide", "LLM: speak"])
    axes.set_ylim(-0.6, len(ROWS) - 0.1)
    axes.set_xlim(0, SHOWN_S)
    axes.set_xlabel("seconds (numbers: frames)")
    axes.set_title(f"{overlaps(work)} frames were encoded while the LLM decided or spoke about an earlier one")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _busiest(work: list[Span]) -> float:
    """Start of the stretch in which the LLM spoke most, so that the picture shows both kinds of overlap."""
    spoken = [span[4] for span in work if span[0] == "speak"] or [span[4] for span in work]
    if not spoken:
        raise ValueError("the workers remember no work, so there is nothing to draw")
    return max(spoken, key=lambda start: sum(start <= other < start + SHOWN_S for other in spoken)) - 0.5
