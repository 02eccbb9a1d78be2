"""Which dialogues a step takes, in which packs, on which worker: one function of lengths, seed and step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.plan import Measured, Pick, Plan, pack, step_order
from jobs.training_config import TrainingConfig

LENGTHS = [90, 10, 55, 40, 200, 35, 60]
MEASURED = [Measured(tokens=n, frames=4, text=3, silent=n // 10, speaking=1) for n in LENGTHS]


def plan_of(**settings: object) -> Plan:
    return Plan(MEASURED, TrainingConfig.model_validate({"batch_size": 5, "pack_tokens": 100} | settings))


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 200))
def test_packs_hold_everything_once_within_the_limit(lengths: list[int], limit: int) -> None:
    bins = pack(lengths, limit)
    assert sorted(place for places in bins for place in places) == list(range(len(lengths)))
    for places in bins:
        assert len(places) == 1 or sum(lengths[place] for place in places) <= limit


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_at_most_one_pack_is_less_than_half_full(lengths: list[int]) -> None:
    loads = [sum(lengths[place] for place in places) for places in pack(lengths, 100)]
    assert sum(load <= 50 for load in loads) <= 1


def test_every_epoch_is_another_permutation_of_all_dialogues() -> None:
    order = [pick for step in range(14) for pick in step_order(7, 3, step, seed=0)]
    epochs = [order[start : start + 7] for start in range(0, 42, 7)]
    for number, epoch in enumerate(epochs):
        assert Counter(epoch) == Counter(Pick(index, number) for index in range(7))
    assert len({tuple(pick.index for pick in epoch) for epoch in epochs}) > 1
    assert order != [pick for step in range(14) for pick in step_order(7, 3, step, seed=1)]


@pytest.mark.parametrize("workers", [1, 2, 3, 6])
def test_workers_share_the_packs_of_a_step_and_none_is_computed_twice(workers: int) -> None:
    plan = plan_of()
    for step in (9, 3):
        packs = plan.packs(step)
        assert [pick for one in packs for pick in one.picks] != []
        assert Counter(p for one in packs for p in one.picks) == Counter(step_order(7, 5, step, 0))
        shares = [plan.share(step, rank, workers) for rank in range(workers)]
        assert sorted((one for share in shares for one in share), key=lambda one: one.number) == packs
        loads = [sum(one.tokens for one in share) for share in shares]
        assert max(loads) - min(loads) <= max(one.tokens for one in packs)


def test_packs_know_their_positions() -> None:
    for one in plan_of().packs(0):
        assert one.tokens == sum(LENGTHS[pick.index] for pick in one.picks)


def test_a_plan_is_read_back_only_for_what_it_was_measured_on() -> None:
    plan = plan_of()
    again = Plan.from_json(plan.to_json("here"), "here", plan.config)
    assert again is not None
    assert again.packs(4) == plan.packs(4)
    assert Plan.from_json(plan.to_json("here"), "there", plan.config) is None


def test_balanced_frames_count_as_much_silent_as_speaking_and_as_much_as_before() -> None:
    silent, speaking = sum(one.silent for one in MEASURED), sum(one.speaking for one in MEASURED)
    assert plan_of().stream_weights(0.5) == (0.5, 0.5)
    low, high = plan_of(balance_stream=True).stream_weights(0.5)
    assert low * silent == pytest.approx(high * speaking)
    assert low * silent + high * speaking == pytest.approx(0.5 * (silent + speaking))
    assert plan_of(balance_stream=True, keep_silence=0.1).stream_weights(1)[0] > low
