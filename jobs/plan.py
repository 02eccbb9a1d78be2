"""Which dialogues every optimizer step takes, in which packs, and which worker computes which pack.

All of it is a function of (seed, step) and of the dialogues' lengths, which are measured once and kept beside
the run: every worker knows the whole plan, none asks another, and a run can go on at any step. Packs do not
depend on the number of workers, and neither does what is drawn for them (dropout), so that number changes
nothing but the order of additions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Self

from jobs.training_config import TrainingConfig


@dataclass(frozen=True)
class Measured:
    """One dialogue: positions it has in training, frames in them, and labels of each kind.

    `clipped` positions beyond the limit are left out; `silent` and `speaking` labels are at frames.
    """

    tokens: int
    frames: int
    text: int
    silent: int
    speaking: int
    clipped: int = 0

    @property
    def labels(self) -> int:
        return self.text + self.silent + self.speaking


@dataclass(frozen=True)
class Pick:
    """A dialogue by its index in the training set, in the epoch for which it is drawn."""

    index: int
    epoch: int


@dataclass(frozen=True)
class Pack:
    """Dialogues of one forward pass; `number` is its place among the packs of its step."""

    number: int
    picks: tuple[Pick, ...]
    tokens: int


class Plan:
    """The packs of every step of a run over dialogues that were `measured`."""

    def __init__(self, measured: Sequence[Measured], config: TrainingConfig) -> None:
        self.measured = list(measured)
        self.config = config
        self.num_steps = config.num_steps(len(self.measured))

    def packs(self, step: int) -> list[Pack]:
        """All packs of optimizer step `step` (from 0), the fullest first."""
        config = self.config
        picks = step_order(len(self.measured), config.batch_size, step, config.seed)
        bins = pack([self.measured[pick.index].tokens for pick in picks], config.pack_tokens)
        return [
            Pack(number, tuple(picks[i] for i in places), sum(self.measured[picks[i].index].tokens for i in places))
            for number, places in enumerate(bins)
        ]

    def share(self, step: int, rank: int, workers: int) -> list[Pack]:
        """The packs that worker `rank` computes: each goes to the one that has least to do so far."""
        load = [0] * workers
        mine = []
        for one in self.packs(step):
            least = load.index(min(load))
            load[least] += one.tokens
            if least == rank:
                mine.append(one)
        return mine

    def stream_weights(self, weight: float) -> tuple[float, float]:
        """Of labels at silent and at speaking frames: `weight`, or balanced around it over the whole set."""
        silent = self.config.keep_silence * sum(one.silent for one in self.measured)
        speaking = sum(one.speaking for one in self.measured)
        if not self.config.balance_stream or not silent or not speaking:
            return weight, weight
        return weight * (silent + speaking) / (2 * silent), weight * (silent + speaking) / (2 * speaking)

    def to_json(self, key: str) -> str:
        """The measurements; `key` says of what."""
        columns = {name: [asdict(one)[name] for one in self.measured] for name in Measured.__dataclass_fields__}
        return json.dumps({"key": key, "measured": columns})

    @classmethod
    def from_json(cls, text: str, key: str, config: TrainingConfig) -> Self | None:
        """None where it was measured on something else than `key`."""
        document = json.loads(text)
        if document["key"] != key:
            return None
        rows = zip(*document["measured"].values(), strict=True)
        names = list(document["measured"])
        return cls([Measured(**dict(zip(names, row, strict=True))) for row in rows], config)


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Places of `lengths` in bins of at most `limit`, longest first into the fullest bin that has room.

    What is longer than the limit has a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [number for number, left in enumerate(room) if left >= lengths[place]]
        if fits:
            tightest = min(fits, key=lambda number: (room[number], number))
            bins[tightest].append(place)
            room[tightest] -= lengths[place]
        else:
            bins.append([place])
            room.append(limit - lengths[place])
    return [sorted(places) for places in bins]


def step_order(count: int, batch: int, step: int, seed: int) -> list[Pick]:
    """The dialogues of optimizer step `step` (from 0).

    Every epoch is another permutation of all; a batch may reach into the next epoch.
    """
    picks = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        picks.append(Pick(_permutation(count, seed, epoch)[place], epoch))
    return picks


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return tuple(order)
