"""What a checkpoint makes of each dialogue, done now by graders or kept from before.

Results come in any order and are given in that of the dialogues. Each is kept as soon as it is there, under
a key of everything that decides it: model, frame tokens, settings and the dialogue itself.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from pydantic import TypeAdapter
from tqdm import tqdm

from actors.config import Config
from actors.engine import EngineConfig
from actors.messages import SessionSettings
from jobs.dialogues import Dialogue
from jobs.finished import Finished, key_of
from jobs.generation import Generation
from jobs.grader import Decided, Deciding, Heard, Identity, Live, Pace
from jobs.grader_pool import Method, Pool

logger = logging.getLogger(__name__)

TELL_EVERY_S = 10.0  # in logs, where there is no bar

DECIDED: TypeAdapter[Decided] = TypeAdapter(Decided)
HEARD: TypeAdapter[Heard] = TypeAdapter(Heard)
LIVE: TypeAdapter[Live] = TypeAdapter(Live)
ANSWERS: TypeAdapter[list[str]] = TypeAdapter(list[str])

# What changes how fast results come, and not what they are.
SPEED = {"threads", "max_sessions", "kv_memory_gb", "kv_memory_share", "untrained"}

ResultT = TypeVar("ResultT")


class Evaluation:
    """Results of the dialogues that `pool` grades, `at_once` of them in a grader's hands."""

    def __init__(self, pool: Pool, finished: Finished, config: Config, identity: Identity, at_once: int) -> None:
        self.pool = pool
        self.finished = finished
        self.at_once = at_once
        engine = config.section("engine", EngineConfig).model_dump(mode="json", exclude=SPEED)
        self._model = [identity.fingerprint, identity.features, config.model.dtype, engine]

    def decided(self, dialogues: Sequence[Dialogue], deciding: Deciding) -> list[Decided]:
        """Teacher-forced."""
        found = self._results("decide", dialogues, deciding, DECIDED, "teacher-forced")
        return [result for _, result in sorted(found, key=lambda pair: pair[0])]

    def heard(self, dialogues: Sequence[Dialogue], settings: SessionSettings) -> Iterator[tuple[int, Heard]]:
        """Self-conditioned, with the index of each dialogue."""
        return self._results("play", dialogues, settings, HEARD, f"streams at threshold {settings.threshold:g}")

    def live(self, dialogues: Sequence[Dialogue], pace: Pace) -> list[Live]:
        """Self-conditioned, at the stream's pace."""
        found = self._results("live", dialogues, pace, LIVE, "streams at their own pace")
        return [result for _, result in sorted(found, key=lambda pair: pair[0])]

    def answers(self, dialogues: Sequence[Dialogue], generation: Generation) -> list[list[str]]:
        """Offline."""
        found = self._results("answer", dialogues, generation, ANSWERS, "answers")
        return [result for _, result in sorted(found, key=lambda pair: pair[0])]

    def _results(
        self,
        method: Method,
        dialogues: Sequence[Dialogue],
        argument: Deciding | SessionSettings | Pace | Generation,
        kind: TypeAdapter[ResultT],
        label: str,
    ) -> Iterator[tuple[int, ResultT]]:
        plain = argument.model_dump(mode="json")
        keys = [key_of(method, plain, self._model, dialogue.model_dump(mode="json")) for dialogue in dialogues]
        todo = []
        for index, key in enumerate(keys):
            if (kept := self.finished.get(key)) is None:
                todo.append(index)
            else:
                yield index, kind.validate_python(kept)
        if not todo:
            return
        # Streams that share steps should be of about the same length, and the longest come first.
        todo.sort(key=lambda index: -dialogues[index].num_frames)
        parts = [todo[i : i + self.at_once] for i in range(0, len(todo), self.at_once)]
        batches = [[dialogues[index] for index in part] for part in parts]
        kept = len(keys) - len(todo)
        bar = tqdm(total=len(keys), initial=kept, desc=label, unit="dialogue", disable=None, file=sys.stderr)
        told = time.monotonic()
        with bar:
            for number, results in self.pool.run(method, batches, argument):
                for index, result in zip(parts[number], results, strict=True):
                    checked = kind.validate_python(result)
                    self.finished.add(keys[index], kind.dump_python(checked, mode="json"))
                    yield index, checked
                kept += len(parts[number])
                bar.update(len(parts[number]))
                if bar.disable and (kept == len(keys) or time.monotonic() - told > TELL_EVERY_S):
                    logger.info("%s: %d of %d dialogues", label, kept, len(keys))
                    told = time.monotonic()
