"""Graders at work: this process alone, or actors of a Ray cluster that share the dialogues.

An actor takes work as soon as it has its model, so that a cluster may give them one by one. One that is
killed comes back, and its batch is done again. They are Ray's own actors and no pool of Ray Data, which
would start anew, and load the model again, for each of the passes that a sweep over thresholds makes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, cast

import ray
from ray.actor import ActorHandle

from actors.config import Config
from actors.engine import EngineConfig
from jobs.cluster import connect, cpus_of_one, is_local
from jobs.dialogues import Dialogue
from jobs.grader import Grader, Identity
from jobs.training_run import portable

RESTARTS = 3

Method = Literal["decide", "play", "live", "answer"]
Batch = list[Dialogue]


class Pool(Protocol):
    """Graders of one checkpoint."""

    def identity(self) -> Identity:
        """What they grade."""

    def there(self, dialogues: Sequence[Dialogue]) -> list[int]:
        """Indices of the dialogues that can be graded."""

    def run(self, method: Method, batches: Sequence[Batch], argument: object) -> Iterator[tuple[int, list[object]]]:
        """Index and results of every batch, as they are done; `method` of a Grader with that argument."""


class ThisProcess:
    """One grader, here."""

    def __init__(self, config: Config) -> None:
        self.grader = Grader(config)

    def identity(self) -> Identity:
        return self.grader.identity()

    def there(self, dialogues: Sequence[Dialogue]) -> list[int]:
        return self.grader.there(dialogues)

    def run(self, method: Method, batches: Sequence[Batch], argument: object) -> Iterator[tuple[int, list[object]]]:
        call = getattr(self.grader, method)
        for index, batch in enumerate(batches):
            yield index, call(batch, argument)


class Actors:
    """Graders in `workers` actors, each with the engine's threads as CPUs and a GPU where it is on one."""

    def __init__(self, config: Config, workers: int) -> None:
        engine = config.section("engine", EngineConfig)
        connect(max(os.cpu_count() or 1, workers * engine.threads + 1))
        gpus = float(engine.device.startswith("cuda"))
        actor = ray.remote(Grader).options(
            num_cpus=cpus_of_one(engine.threads, gpus),
            num_gpus=gpus,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        self.actors = [cast(ActorHandle[Grader], actor.remote(portable(config))) for _ in range(workers)]

    def identity(self) -> Identity:
        return cast(Identity, ray.get(_ask(self._ready(), "identity")))

    def there(self, dialogues: Sequence[Dialogue]) -> list[int]:
        return cast("list[int]", ray.get(_ask(self._ready(), "there", list(dialogues))))

    def run(self, method: Method, batches: Sequence[Batch], argument: object) -> Iterator[tuple[int, list[object]]]:
        waiting = deque(enumerate(batches))
        # An actor's first answer says that it is there.
        asked = {_ask(actor, "identity"): (actor, -1) for actor in self.actors[: len(batches)]}
        while waiting or any(index >= 0 for _, index in asked.values()):
            (done,), _ = ray.wait(list(asked), num_returns=1)
            actor, index = asked.pop(done)
            result = ray.get(done)
            if waiting:
                following, batch = waiting.popleft()
                asked[_ask(actor, method, batch, argument)] = actor, following
            if index >= 0:
                yield index, cast("list[object]", result)

    def _ready(self) -> ActorHandle[Grader]:
        """The first actor that has its model."""
        asked = {_ask(actor, "identity"): actor for actor in self.actors}
        (done,), _ = ray.wait(list(asked), num_returns=1)
        ray.get(done)
        return asked[done]


def graders(config: Config, workers: int | None) -> Pool:
    """Actors of a Ray cluster, or this process for 0; by default this process, and in a submitted job all that fit."""
    if workers is None:
        workers = 0 if is_local() else _fitting(config.section("engine", EngineConfig))
    return Actors(config, workers) if workers else ThisProcess(config)


def _ask(actor: ActorHandle[Grader], method: str, *arguments: object) -> ray.ObjectRef[object]:
    asked: ray.ObjectRef[object] = getattr(actor, method).remote(*arguments)
    return asked


def _fitting(engine: EngineConfig) -> int:
    connect()
    resources = ray.cluster_resources()
    if engine.device.startswith("cuda"):
        return max(1, int(resources.get("GPU", 0)))
    return max(1, int(resources.get("CPU", 0)) // engine.threads)  # a head without work has none
