"""The pictures of an evaluation's report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jobs.evaluation_report import Report, examples_of
from jobs.stream_groups import ALL, GradedStream
from jobs.timing_metrics import match, moments_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES = {"precision": "tab:blue", "recall": "tab:orange", "f1": "tab:green"}
BAR = 0.25


def draw(result: Report, folder: Path) -> dict[str, str]:
    """Write the pictures; their file names, by what they show."""
    if not result.groups:
        return {}
    figures = {"controls": _controls(result), "examples": _examples(result)}
    if late := _late(result):
        figures["error in time"] = _errors(result, late)
    if len(result.curve) > 1:
        figures["thresholds"] = _thresholds(result)
    names = {shows: f"{shows.replace(' ', '_')}.png" for shows in figures}
    for shows, figure in figures.items():
        figure.savefig(folder / names[shows], dpi=110)
    return names


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _controls(result: Report) -> Figure:
    """Precision, recall and F1 of the model and of every control."""
    group = result.groups[ALL]
    timings = {"model": group.self_conditioned, **group.controls}
    figure = _figure(8, 3.5)
    axes = figure.subplots()
    for number, (score, color) in enumerate(SCORES.items()):
        heights = [getattr(timed, score) or 0 for timed in timings.values()]
        axes.bar([place + (number - 1) * BAR for place in range(len(timings))], heights, BAR, color=color, label=score)
    axes.set_xticks(range(len(timings)), list(timings))
    axes.set(ylim=(0, 1.05), title="Responses at the right time")
    axes.legend(loc="upper left", ncols=3, fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    return figure


def _thresholds(result: Report) -> Figure:
    """The curve; thresholds stand at equal distances, since most of them lie close to 1."""
    figure = _figure(8, 4)
    axes = figure.subplots()
    places = range(len(result.curve))
    for score, color in SCORES.items():
        values = [getattr(point.timing, score) for point in result.curve]
        known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        axes.plot(*zip(*known, strict=True), "o-", color=color, label=score) if known else None
    chosen = [place for place in places if result.curve[place].threshold == result.threshold]
    for place in chosen:
        axes.axvline(place, color="gray", linestyle=":", label="used")
    axes.set_xticks(places, [f"{point.threshold:g}" for point in result.curve], rotation=45)
    axes.set(xlabel="threshold of P(silent)", ylim=(0, 1.05))
    alarms = axes.twinx()
    rates = [point.timing.false_alarms_per_quiet_hour for point in result.curve]
    alarms.plot(places, [float("nan") if rate is None else rate for rate in rates], "--", color="tab:red", linewidth=1)
    alarms.set_ylabel("false alarms per quiet hour", color="tab:red")
    alarms.set_ylim(bottom=0)
    axes.legend(loc="best", fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def _late(result: Report) -> list[float]:
    """How late every response was that belongs to a label."""
    found = []
    for stream in result.streams:
        said = [moment.time for moment in moments_of(stream.heard.said)]
        labelled = [moment.time for moment in stream.played.labels]
        found += [said[i] - labelled[j] for i, j in match(said, labelled, result.window)]
    return found


def _errors(result: Report, late: list[float]) -> Figure:
    window, width = result.window, 1 / result.fps
    count = max(1, round((window.before_s + window.after_s) / width))
    edges = [-window.before_s + (place - 0.5) * width for place in range(count + 2)]
    figure = _figure(6, 3)
    axes = figure.subplots()
    axes.hist(late, bins=edges, color="tab:blue", edgecolor="white")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="seconds after the label", ylabel="responses", title="When responses come that belong to a label")
    return figure


def _examples(result: Report) -> Figure:
    """P(silent) of a few streams; what was to be said and when the user spoke above it, what was said below."""
    streams = examples_of(result.streams)
    figure = _figure(10, 1.8 * len(streams) + 0.6)
    for axes, stream in zip(figure.subplots(len(streams), squeeze=False)[:, 0], streams, strict=True):
        _draw_stream(axes, stream, result.threshold)
    axes.set_xlabel("seconds")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize="small")
    return figure


def _draw_stream(axes: Axes, stream: GradedStream, threshold: float) -> None:
    played, heard = stream.played, stream.heard
    axes.plot(played.times[: len(heard.p_silent)], heard.p_silent, color="gray", linewidth=0.8, label="P(silent)")
    axes.axhline(threshold, color="gray", linestyle=":", linewidth=0.8, label="threshold")
    labels, said = [moment.time for moment in played.labels], [moment.time for moment in moments_of(heard.said)]
    axes.plot(labels, [1.1] * len(labels), "v", color="tab:green", label="to be said")
    axes.plot(said, [-0.1] * len(said), "^", color="tab:blue", label="said")
    asked = [question.time for question in played.questions]
    axes.plot(asked, [1.1] * len(asked), "*", color="black", clip_on=False, label="the user speaks")
    axes.set(ylim=(-0.2, 1.2), xlim=(0, max(played.duration_s, 1)))
    axes.set_title(played.dialogue.dialogue_id, fontsize="small", loc="left")
