"""What a training step learns does not depend on how the work is cut, and a run can stop anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.distributed
from training_data import narrated, untrained_config, write_store

from actors import checkpoint
from actors.adapter import AdapterConfig
from actors.config import ConfigError, ModelConfig
from jobs.dataset import TrainingSet
from jobs.frame_store import FrameStore
from jobs.learner import Learner, Step, TrainingError
from jobs.plan import Plan
from jobs.training_config import TrainingConfig, learning_rate

VIDEOS = ["ab", "abcd", "abcdef", "abcdefghij"]
ResultT = TypeVar("ResultT")

ADAPTER = AdapterConfig(rank=4, alpha=8, dropout=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_configs: dict[str, ModelConfig]) -> FrameStore:
    return write_store(tmp_path_factory.mktemp("store"), tiny_configs["live1plus"].frames, VIDEOS)


@pytest.fixture
def learner_of(store: FrameStore, tiny_configs: dict[str, ModelConfig]):
    """A learner at the start of a run with these settings."""

    def make(version: str = "live1plus", **settings: object) -> Learner:
        config = TrainingConfig.model_validate(
            {"adapter": ADAPTER, "batch_size": 4, "max_steps": 6, "learning_rate": 1e-2} | settings
        )
        loaded = checkpoint.untrained(untrained_config(tiny_configs[version]), adapter=config.adapter)
        data = TrainingSet([narrated(v) for v in VIDEOS], store, loaded.template)
        return Learner(loaded.model, data, Plan([data.measure(i) for i in range(len(data))], config), config)

    return make


def parameters(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}


def gradients(*learners: Learner) -> dict[str, torch.Tensor]:
    """Of the mean loss of the first step, whose packs the learners share."""
    labels, total = 0.0, dict[str, torch.Tensor]()
    for rank, learner in enumerate(learners):
        learner.rank, learner.workers = rank, len(learners)
        learner.model.train()
        labels += learner._accumulate(0)[0].labels
        for name, parameter in learner.parameters.items():
            total[name] = total.get(name, 0) + parameter.grad
    return {name: gradient / labels for name, gradient in total.items()}


class Workers:
    """Learners of one run, a thread each, whose sums go through gloo as those of processes do."""

    def __init__(self, learners: list[Learner], monkeypatch: pytest.MonkeyPatch) -> None:
        self.learners = learners
        self._own = threading.local()
        self._groups: list[torch.distributed.ProcessGroupGloo] = []
        store = torch.distributed.HashStore()

        def connect(rank: int) -> torch.distributed.ProcessGroupGloo:
            return torch.distributed.ProcessGroupGloo(store, rank, len(learners), timedelta(seconds=120))

        for rank, learner in enumerate(learners):
            learner.rank, learner.workers = rank, len(learners)
        self._groups = self._each(connect)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: self._own.group.allreduce([tensor]).wait())

    def take_step(self) -> Step:
        """One step of all, who must agree on what it was and on every bit of what was learned."""
        first, *others = self._each(lambda rank: self.learners[rank].take_step())
        assert others == [first] * len(others)
        one, *rest = map(parameters, self.learners)
        assert all(torch.equal(one[name], another[name]) for another in rest for name in one)
        return first

    def _each(self, act: Callable[[int], ResultT]) -> list[ResultT]:
        def run(rank: int) -> ResultT:
            self._own.group = self._groups[rank] if self._groups else None
            return act(rank)

        with ThreadPoolExecutor(len(self.learners)) as threads:
            return list(threads.map(run, range(len(self.learners))))


def watched(learner: Learner) -> dict[str, torch.Tensor]:
    """The gradients that the optimizer is given, always those of the latest step."""
    seen = dict[str, torch.Tensor]()

    def note(*_: object) -> None:
        seen.update({name: parameter.grad.clone() for name, parameter in learner.parameters.items()})

    learner.optimizer.register_step_pre_hook(note)
    return seen


def check_same(found: Learner, wanted: Learner) -> None:
    """Every single element of what was learned, to 1e-5."""
    for name, parameter in parameters(wanted).items():
        torch.testing.assert_close(parameters(found)[name], parameter, rtol=0, atol=1e-5)


# Adam's steps have one size even where a gradient is hardly more than rounding, so that an element without a real one
# may be off by some of its learning rate: 1e-3 is five times the recipes'.
SHARED = {"learning_rate": 1e-3, "max_steps": 8}


@pytest.mark.parametrize(("workers", "pack_tokens"), [(2, 200), (3, 400)])
def test_any_number_of_workers_learns_the_same(
    learner_of, monkeypatch: pytest.MonkeyPatch, workers: int, pack_tokens: int
) -> None:
    """Also where one has no pack; what each optimizer is given is compared before it divides by its size."""
    alone = learner_of(pack_tokens=pack_tokens, **SHARED)
    team = Workers([learner_of(pack_tokens=pack_tokens, **SHARED) for _ in range(workers)], monkeypatch)
    shares = [alone.plan.share(0, rank, workers) for rank in range(workers)]
    assert all(shares) == (workers == 2)
    wanted, found = watched(alone), watched(team.learners[0])
    before = parameters(alone)
    for number in range(8):
        step, shared = alone.take_step(), team.take_step()
        assert (shared.loss, shared.gradient_norm) == pytest.approx((step.loss, step.gradient_norm), rel=1e-5)
        for name, gradient in wanted.items():
            # From the second step on they are gradients at parameters that differ by rounding.
            assert (found[name] - gradient).norm() <= (1e-4 if number else 1e-6) * gradient.norm(), name
    check_same(team.learners[0], alone)
    assert any((parameter - before[name]).abs().max() > 4e-3 for name, parameter in parameters(alone).items())


def test_the_same_number_of_workers_learns_the_same_to_the_bit(learner_of, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for _ in range(2):
        team = Workers([learner_of(pack_tokens=200) for _ in range(2)], monkeypatch)
        runs.append(([team.take_step() for _ in range(3)], parameters(team.learners[0])))
    (steps, once), (again, twice) = runs
    assert steps == again
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_run_goes_on_with_another_number_of_workers(
    learner_of, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    straight = learner_of(pack_tokens=200, **SHARED)
    steps = [straight.take_step() for _ in range(6)]
    team = Workers([learner_of(pack_tokens=200, **SHARED) for _ in range(2)], monkeypatch)
    for _ in range(3):
        team.take_step()
    team.learners[1].save(tmp_path / "learner.pt")
    alone = learner_of(pack_tokens=200, **SHARED)
    alone.restore(tmp_path / "learner.pt")
    again = [alone.take_step() for _ in range(3)]
    assert [step.loss for step in again] == pytest.approx([step.loss for step in steps[3:]], rel=1e-5)
    check_same(alone, straight)


@pytest.mark.parametrize("pack_tokens", [1, 400])
def test_packs_of_any_size_have_the_gradients_of_one_large_pack(learner_of, pack_tokens: int) -> None:
    whole = gradients(learner_of(pack_tokens=10_000))
    learner = learner_of(pack_tokens=pack_tokens)
    assert len(learner.plan.packs(0)) > 1
    parts = gradients(learner)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_loss_is_the_mean_over_all_learned_positions_of_the_batch(learner_of) -> None:
    learner = learner_of()
    picks = [pick for pack in learner.plan.packs(0) for pick in pack.picks]
    samples = [learner.data.packed([pick]) for pick in picks]
    with torch.no_grad():
        losses = [learner.model.packed_loss(sample.packed, sample.frames) for sample in samples]
    step = learner.take_step()
    text, stream = (sum(getattr(sample, f"{kind}_labels") for sample in samples) for kind in ("text", "stream"))
    assert (step.labels, step.stream_labels) == (text + stream, stream)
    assert len({sample.text_labels for sample in samples}) > 1, "else a mean of means would pass, too"
    assert step.loss == pytest.approx(sum(float(loss.weighted) for loss in losses) / step.labels, rel=1e-5)
    assert step.text_loss == pytest.approx(sum(float(loss.text) for loss in losses) / text, rel=1e-5)
    assert step.stream_loss == pytest.approx(sum(float(loss.stream) for loss in losses) / stream, rel=1e-5)


def test_the_connector_may_learn_at_a_rate_of_its_own(learner_of) -> None:
    learner = learner_of(connector_learning_rate=3e-3, weight_decay=0)
    before = parameters(learner)
    learner.take_step()
    rates = {"connector": learning_rate(0, 6, learner.config, "connector"), "llm": learning_rate(0, 6, learner.config)}
    assert rates["connector"] == pytest.approx(0.3 * rates["llm"])
    for name, parameter in parameters(learner).items():
        moved = (parameter - before[name]).abs().max()
        assert moved == pytest.approx(rates[name.partition(".")[0]], rel=0.01) or "lora_A" in name, name


def test_dropout_draws_by_step_and_pack_and_not_by_worker(learner_of) -> None:
    settings = {"adapter": ADAPTER.model_copy(update={"dropout": 0.3}), "pack_tokens": 1}
    alone = gradients(learner_of(**settings))
    shared = gradients(learner_of(**settings), learner_of(**settings))
    for name, gradient in alone.items():
        assert (shared[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_training_moves_adapter_and_connector_and_nothing_else(learner_of) -> None:
    learner = learner_of()
    before = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
    losses = [learner.take_step().loss for _ in range(6)]
    moved = {name for name, p in learner.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(learner.parameters)
    assert {name.partition(".")[0] for name in moved} == {"llm", "connector"}
    assert all("lora_" in name or name.startswith("connector.") for name in moved)
    assert losses[-1] < losses[0]


def test_a_run_that_stopped_goes_on_as_if_it_had_not(learner_of, tmp_path: Path) -> None:
    settings = {"adapter": ADAPTER.model_copy(update={"dropout": 0.3}), "batch_size": 3}
    straight = learner_of(**settings)
    steps = [straight.take_step() for _ in range(6)]
    first = learner_of(**settings)
    for _ in range(3):
        first.take_step()
    first.save(tmp_path / "learner.pt")
    second = learner_of(**settings)
    second.restore(tmp_path / "learner.pt")
    assert second.optimizer.state_dict()["state"].keys() == straight.optimizer.state_dict()["state"].keys()
    assert [second.take_step() for _ in range(3)] == steps[3:]
    for name, parameter in parameters(straight).items():
        assert torch.equal(parameters(second)[name], parameter), name


def test_another_models_state_is_refused(learner_of, tmp_path: Path) -> None:
    learner_of(adapter=ADAPTER.model_copy(update={"rank": 2})).save(tmp_path / "learner.pt")
    with pytest.raises(TrainingError, match=r"another model: .*lora_A.* is .*2, 64.* there and .*4, 64.* here"):
        learner_of().restore(tmp_path / "learner.pt")


def test_a_loss_that_is_not_finite_stops_with_the_dialogues(learner_of) -> None:
    learner = learner_of(batch_size=1)
    with torch.no_grad():
        learner.model.connector[0].weight[0, 0] = torch.nan
    before = parameters(learner)
    with pytest.raises(TrainingError, match=r"step 0: loss nan.*ab\w*-narration-0: lower"):
        learner.take_step()
    assert all(torch.equal(p, before[name]) for name, p in parameters(learner).items() if not name.startswith("conn"))


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    config = TrainingConfig(learning_rate=2e-4, warmup=0.05)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[0] > 0
    assert max(rates) == rates[5] == 2e-4
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_epochs_become_steps_and_too_small_batches_are_refused() -> None:
    assert TrainingConfig(epochs=2, batch_size=64).num_steps(100) == 4
    assert TrainingConfig(max_steps=7).num_steps(100) == 7
    with pytest.raises(ConfigError, match=r"batch_size is 3, fewer dialogues than training.workers 4"):
        TrainingConfig(batch_size=3, workers=4).check()
