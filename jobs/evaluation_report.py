"""The result of an evaluation: as values for a file, and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from jobs.annotations import Moment
from jobs.graded_events import GradedEvents
from jobs.machine import cpu_name
from jobs.offline_benchmarks import Answered, Values
from jobs.published_results import PUBLISHED, Published
from jobs.stream_groups import ALL, GradedStream, Group
from jobs.threshold_sweep import Point
from jobs.timing_metrics import Timing, Window, match, moments_of

COLUMNS = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "mean_error_s": "error, s",
    "mean_late_s": "late, s",
    "text_similarity": "text",
    "duplicate_ratio": "duplicates",
    "false_alarms_per_quiet_hour": "false alarms / quiet h",
    "speaking_share": "speaking",
}
EXAMPLES, EXAMPLE_LINES, EXAMPLE_CHARACTERS = 4, 12, 90


@dataclass(frozen=True)
class Offline:
    """A task of the offline benchmarks: its dialogues, numbers, and of COIN how many names an answer could have."""

    num_dialogues: int
    values: Values
    num_categories: int = 0


@dataclass(frozen=True)
class Report:
    """Everything an evaluation says.

    `seen_videos` are those the checkpoint was trained on, of the `num_trained` it names (None without a
    checkpoint); `chosen_from` is what the threshold was chosen on (None where it was not). `groups` has all
    streams first, then each task; `events` is None where no video has any beside it; `annotations` is the
    folder of Ego4D LTA's, where it was named. `left_out` dialogues show no frame of what they ask about.
    """

    model: str
    fingerprint: str
    dialogues: str
    num_dialogues: int
    num_videos: int
    seen_videos: list[str]
    num_trained: int | None
    fps: float
    threshold: float
    chosen_from: str | None
    window: Window
    streams: list[GradedStream]
    groups: Mapping[str, Group]
    events: GradedEvents | None
    curve: list[Point]
    offline: Mapping[str, Offline]
    answered: list[Answered]
    annotations: Path | None
    online: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    left_out: int = 0

    def values(self) -> dict[str, object]:
        """What `metrics.json` holds: the same for the same model, data and settings, but for `live`."""
        counts = ("num_dialogues", "num_videos", "left_out", "seen_videos")
        return {
            **{
                name: getattr(self, name) for name in ("model", "fingerprint", "dialogues", *counts, "fps", "threshold")
            },
            "threshold_chosen_from": self.chosen_from,
            "window": asdict(self.window),
            "streams": {name: _group_values(group) for name, group in self.groups.items()},
            "thresholds": [{"threshold": point.threshold, **named(point.timing)} for point in self.curve],
            "events": None if self.events is None else _event_values(self.events),
            "offline": {task: asdict(offline) for task, offline in self.offline.items()},
            "online": self.online,
            "published": {
                task: {name: asdict(value) for name, value in published.items()}
                for task, published in PUBLISHED.items()
                if task in self.offline or task in self._tasks()
            },
        }

    def _tasks(self) -> set[str]:
        return {stream.played.dialogue.task for stream in self.streams}

    def compared(self) -> Iterator[tuple[str, str, float | None, Published]]:
        """Task, name and value of every number that the paper has too, and what it has."""
        for task in sorted(PUBLISHED.keys() & self.offline.keys()):
            values: Mapping[str, float | None] = dict(self.offline[task].values)
            for name, published in PUBLISHED[task].items() if values else ():
                yield task, name, values[name], published
        for task in sorted(PUBLISHED.keys() & self._tasks()):
            group = self.groups[task] if task in self.groups else self.groups[ALL]
            for name, published in PUBLISHED[task].items():
                yield task, name, getattr(group.teacher_forced["paper"], name), published


def named(timed: Timing) -> dict[str, float | None]:
    """Counts, and what follows from them."""
    return asdict(timed) | {name: getattr(timed, name) for name in COLUMNS}


def page(result: Report, plots: Mapping[str, str]) -> str:
    """The page; `plots` are file names of pictures by what they show."""
    lines = [f"# Evaluation of `{result.model}`", "", *_head(result), ""]
    if compared := list(result.compared()):
        lines += ["## Beside the paper", "", "| task | number | here | paper | |", "|---|---|---|---|---|"]
        for task, name, value, published in compared:
            where = f"{published.model}, {published.table} of arXiv 2406.11816"
            lines.append(f"| {task} | {name} | {_number(value)} | {_number(published.value)} | {where} |")
        lines.append("")
    if result.offline:
        lines += list(_offline(result))
    for benchmark, accuracies in result.online.items():
        lines += [f"## {benchmark}", "", "| | accuracy, % |", "|---|---|"]
        lines += [f"| {name} | {_number(value)} |" for name, value in accuracies.items()]
        lines.append("")
    if result.groups:
        lines += [*_streams(result, plots), *_events(result), *_single_decisions(result), *_examples(result, plots)]
    return "\n".join(lines).rstrip() + "\n"


def _head(result: Report) -> Iterator[str]:
    seconds = sum(stream.played.duration_s for stream in result.streams)
    yield (
        f"{result.num_dialogues} dialogues of {result.num_videos} videos from `{result.dialogues}`"
        f"{f', {seconds:.0f} s of streams' if seconds else ''} at {result.fps:g} frames a second. "
        f"Model `{result.fingerprint}`. {datetime.now(UTC):%Y-%m-%d}, {_machine()}."
    )
    if result.left_out:
        yield ""
        yield f"**{result.left_out} more were left out: data.max_frames cut them before any frame.**"
    if result.groups:
        chosen = f"chosen from {result.chosen_from}" if result.chosen_from else "not chosen from data"
        yield ""
        yield f"Threshold {result.threshold:g}, {chosen}."
    if result.num_trained == 0:
        yield ""
        yield "The checkpoint names no video that it was trained on: whether these were among them is not known."
    if result.seen_videos:
        yield ""
        yield f"**Trained on {len(result.seen_videos)} of these videos: no measure of new ones.**"


def _machine() -> str:
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{device}{cpu_name()}, torch {torch.__version__}"


def _offline(result: Report) -> Iterator[str]:
    yield from ("## Answers about recorded videos", "", "| task | dialogues | names | numbers |", "|---|---|---|---|")
    for task, offline in result.offline.items():
        numbers = ", ".join(f"{name} {_number(value)}" for name, value in offline.values.items())
        names = str(offline.num_categories or "-")
        yield f"| {task} | {offline.num_dialogues} | {names} | {numbers or 'no answers are known'} |"
    yield from (
        "",
        "COIN: top-1 accuracy in percent, an answer counts as the nearest of so many names; `corrected_accuracy` asks "
        "for every line of a procedure, as published one right line of five is 100 %. Ego4D LTA: 0 is right; `aued` is "
        "the area under the edit distances at 1 to 20 actions, `ed` the distance at 20, of the best of five beams.",
        "",
    )


def _streams(result: Report, plots: Mapping[str, str]) -> Iterator[str]:
    window = result.window
    yield from (
        "## Whole streams in which it hears itself",
        "",
        f"A response belongs to a label when it comes at most {window.before_s:g} s before or {window.after_s:g} s "
        "after it. Answers to the user are not graded here. `text` is how alike response and label are (chrF), where "
        "they belong together. The threshold of `change of picture` was fitted on these very streams.",
        "",
    )
    for name, group in result.groups.items():
        if len(result.groups) > 1:
            yield from (f"### {name}", "")
        mine = group.self_conditioned
        yield f"{group.num_dialogues} dialogues, {mine.duration_s:.0f} s, {mine.labelled} labels."
        yield from ("", f"| | responses | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(COLUMNS))
        yield _row("**model**", mine)
        if group.live is not None:
            yield _row("**model, live**", group.live.timing)
        for control, timed in group.controls.items():
            yield _row(control, timed)
        yield ""
        if (live := group.live) is not None:
            yield from (
                "*Live*: the stream goes on while the model computes on this machine, and what it says is heard when "
                f"its first words are there. Decisions came {live.lag_p50_s:.2f} s after their frames (median; 95 % "
                f"of them within {live.lag_p95_s:.2f} s); {live.dropped} of {live.decided + live.dropped} frames were "
                "dropped.",
                "",
            )
    yield from (f"![{shows}]({plots[shows]})" for shows in ("controls", "error in time") if shows in plots)
    if result.curve:
        yield from (
            "",
            "### Over thresholds",
            "",
            "From low to high, as long as one that speaks more can still be better. `runs` is in how many streams "
            "another decision fell than at the thresholds before.",
            "",
            f"| threshold | responses | {' | '.join(COLUMNS.values())} | runs |",
            "|---|---|" + "---|" * (len(COLUMNS) + 1),
            *(f"{_row(f'{point.threshold:g}', point.timing)} {point.runs} |" for point in result.curve),
            "",
        )
        if "thresholds" in plots:
            yield f"![thresholds]({plots['thresholds']})"
    yield ""


def _events(result: Report) -> Iterator[str]:
    if (graded := result.events) is None:
        return
    scores, (low, high) = graded.scores, graded.interval
    yield from (
        "## The right thing at the right moment",
        "",
        f"{graded.num_streams} streams have events written beside their video. A response is right when it starts at "
        f"most {graded.window_s:g} s before or after an event and has one of its words.",
        "",
        "| events | responses | in time | right | F1 | 95 % | F1 of the time alone |",
        "|---|---|---|---|---|---|---|",
        f"| {scores.events} | {scores.responses} | {scores.timed} | {scores.right} | {_number(scores.f1)} | "
        f"{_number(low)} to {_number(high)} | {_number(scores.timing_f1)} |",
        "",
    )


def _single_decisions(result: Report) -> Iterator[str]:
    yield from (
        "## Every decision by itself (teacher-forced)",
        "",
        "| | mode | LM perplexity | time difference, s | fluency | LM correctness | replies |",
        "|---|---|---|---|---|---|---|",
    )
    for name, group in result.groups.items():
        for mode, metrics in group.teacher_forced.items():
            shown = (metrics.lm_ppl, metrics.time_diff, metrics.fluency, metrics.lm_correctness)
            outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(metrics.outcomes.items()))
            yield f"| {name} | {mode} | {' | '.join(map(_number, shown))} | {outcomes} |"
    yield ""


def _examples(result: Report, plots: Mapping[str, str]) -> Iterator[str]:
    yield from ("## Examples", "")
    if "examples" in plots:
        yield from (f"![examples]({plots['examples']})", "")
    for stream in examples_of(result.streams):
        yield from (
            f"**{stream.played.dialogue.dialogue_id}**",
            "",
            "| s | to be said | s | said |",
            "|---|---|---|---|",
        )
        rows = sorted(side_by_side(stream, result.window), key=lambda row: min(m.time for m in row if m is not None))
        for row in rows[:EXAMPLE_LINES]:
            cells = [("", "") if m is None else (f"{m.time:g}", _cell(m.text)) for m in row]
            yield f"| {cells[0][0]} | {cells[0][1]} | {cells[1][0]} | {cells[1][1]} |"
        if len(rows) > EXAMPLE_LINES:
            yield f"| | and {len(rows) - EXAMPLE_LINES} more | | |"
        yield ""


def examples_of(streams: Sequence[GradedStream]) -> list[GradedStream]:
    """A few streams to look at, evenly spread over those that have labels."""
    labelled = [stream for stream in streams if stream.played.labels] or list(streams)
    count = min(EXAMPLES, len(labelled))
    return [labelled[index * len(labelled) // count] for index in range(count)]


def side_by_side(stream: GradedStream, window: Window) -> Iterator[tuple[Moment | None, Moment | None]]:
    """What the user asked beside its answer, then labels beside the responses that belong to them, and the rest."""
    answers = [turn for turn in stream.heard.said if turn.question is not None]
    for question in stream.played.questions:
        asked = Moment(time=question.time, text=f"*user:* {question.text}")
        answer = next((a for a in answers if a.question == question.text and a.time >= question.time), None)
        yield asked, None if answer is None else Moment(time=answer.time, text=f"*answer:* {answer.text}")
    labels, said = stream.played.labels, moments_of(stream.heard.said)
    pairs = match([m.time for m in said], [m.time for m in labels], window)
    answered, used = {j for _, j in pairs}, {i for i, _ in pairs}
    yield from ((labels[j], said[i]) for i, j in pairs)
    yield from ((label, None) for j, label in enumerate(labels) if j not in answered)
    yield from ((None, response) for i, response in enumerate(said) if i not in used)


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= EXAMPLE_CHARACTERS else text[: EXAMPLE_CHARACTERS - 1] + "…"


def _row(name: str, timed: Timing) -> str:
    return f"| {name} | {timed.said} | {' | '.join(_number(getattr(timed, column)) for column in COLUMNS)} |"


def _group_values(group: Group) -> dict[str, object]:
    return {
        "num_dialogues": group.num_dialogues,
        "teacher_forced": {mode: asdict(metrics) for mode, metrics in group.teacher_forced.items()},
        "self_conditioned": named(group.self_conditioned),
        "controls": {name: named(timed) for name, timed in group.controls.items()},
        "live": None if group.live is None else asdict(group.live) | {"timing": named(group.live.timing)},
    }


def _event_values(graded: GradedEvents) -> dict[str, object]:
    return asdict(graded) | {"f1": graded.scores.f1, "timing_f1": graded.scores.timing_f1}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
