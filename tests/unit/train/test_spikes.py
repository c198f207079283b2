"""Leaps are skipped by host and device alike, their cause is named, and training goes back when they persist."""

import json
import math

import pytest
import torch
from tiny_training import ADAMW, OBJECTIVE, RUNTIME, CountingLoader, assert_same, flat, tiny_config, tiny_state

from dougong.core.errors import DougongError
from dougong.core.run import RunDirectory
from dougong.data.batch import Batch
from dougong.models import FAMILIES
from dougong.objectives import OBJECTIVES
from dougong.objectives.losses import Losses
from dougong.optim.build import AdamConfig, MuonConfig, SGDConfig
from dougong.train import step as step_module
from dougong.train.checkpoint import Checkpointer, latest_valid, load_checkpoint
from dougong.train.config import SpikeConfig
from dougong.train.loop import fit
from dougong.train.rewind import go_back
from dougong.train.spikes import NO_LIMIT, Spikes
from dougong.train.state import TrainState
from dougong.train.suspects import Before

QUICK = SpikeConfig(window=8, sigmas=6.0, times=2.0, rewind_after=3, rewind_within=6)


class Numbered(CountingLoader):
    """Batches with numbers, whose rows have names; `wild` ones carry a hundred times the weight in one row's loss,
    `empty` ones no weight."""

    def __init__(self, *args, wild=(), empty=(), **named):
        super().__init__(*args, **named)
        self.wild, self.empty = set(wild), set(empty)

    number = property(lambda self: self.position)

    def seek(self, number):
        self.position = number

    def documents(self, number):
        return [[f"batch {number} row {row}.txt"] for row in range(self.rows)]

    def __iter__(self):
        for batch in super().__iter__():
            if self.position - 1 in self.wild:
                weight = batch["weight"].clone()
                weight[2] = -500.0 * weight[2].clamp(min=1)    # a huge gradient the wrong way
                batch = Batch(**{**batch, "weight": weight})
            if self.position - 1 in self.empty:
                batch = Batch(**{**batch, "weight": torch.zeros_like(batch["weight"])})
            yield batch


class Steady(type(OBJECTIVE)):
    """The objective, divided by a weight that wild rows do not change."""

    def weight(self, batch):
        return float((batch["weight"] > 0).sum()) or 1.0


STEADY = Steady.__new__(Steady)
STEADY.__dict__.update(OBJECTIVE.__dict__)


def state_with(*, wild=(), empty=(), steps=40, optimizer=None, spoil=(), seed=1):
    state = tiny_state(steps=steps, dropout=0.2, optimizer=optimizer, seed=seed)
    state.loader = Numbered(wild=wild, empty=empty, spoil=spoil)
    return state


def config(steps=40, **changes):
    return tiny_config(steps, spikes=QUICK, **changes)


# ---- statistics


def fed(values, config=QUICK):
    spikes = Spikes(config)
    for number, value in enumerate(values, 1):
        spikes.add(value, value, step=number, batch=number, skipped=False)
    return spikes


def test_limits_are_those_of_mean_and_deviation_over_the_window():
    assert fed([1.0, 2.0, 3.0]).limits() == (NO_LIMIT, NO_LIMIT)    # fewer than half a window
    loss, norm = fed([9.0, 3.0, 5.0, 4.0, 4.0, 3.0, 5.0, 4.0, 4.0]).limits()   # the 9 has left the window of 8
    deviation = math.sqrt(4 / 7)
    assert loss == pytest.approx(4.0 + 6 * deviation) and norm == pytest.approx(max(loss, 2 * 4.0))
    assert "gradient norm leapt to 9" in fed([4.0] * 8).why(3.0, 9.0) and fed([4.0] * 8).why(4.0, 7.9) is None


def test_a_leap_hardly_widens_the_limits_and_a_lasting_change_is_accepted():
    spikes = fed([4.0, 4.1, 3.9, 4.0, 4.0, 4.1, 3.9, 4.0])
    before = spikes.limits()[0]
    spikes.add(1e6, 4.0, step=9, batch=9, skipped=True)
    assert before < spikes.limits()[0] < before + 3
    for number in range(10, 40):
        if spikes.why(12.0, 4.0) is None:
            break
        spikes.add(12.0, 4.0, step=number, batch=number, skipped=True)
    assert number < 25, "a level that stays would be skipped for ever"


def test_what_is_not_finite_does_not_enter():
    spikes = fed([4.0] * 8)
    before = spikes.limits()
    spikes.add(math.nan, math.inf, step=9, batch=9, skipped=True)
    assert spikes.limits() == before


# ---- skipping, by the host and by the device


@pytest.mark.parametrize("optimizer", [ADAMW, AdamConfig(), SGDConfig(lr=0.1, momentum=0.9), SGDConfig(lr=0.1),
                                       MuonConfig(weight_decay=0.1), MuonConfig(weight_decay=0.1, cautious=True)])
def test_the_device_decides_as_the_host_does(optimizer, monkeypatch):
    """torch's fused kernels and Muon skip by `found_inf`; the same numbers as when the host leaves the step out."""

    def trained(on_device):
        monkeypatch.setattr(step_module, "decides_on_device",
                            lambda optimizer, _: on_device and state.step > 0)    # from the second step on
        state = state_with(wild={12}, spoil={20}, optimizer=optimizer, steps=24)
        results = list(fit(state, STEADY, RUNTIME, config(24)))
        return flat(state), [result.skipped for result in results]

    host, skipped = trained(False)
    device, skipped_there = trained(True)
    assert skipped == skipped_there and [n for n, why in enumerate(skipped) if why] == [12, 20]
    assert "leapt" in skipped[12] and ("loss is" in skipped[20])
    assert host.keys() == device.keys()
    for name in host:
        torch.testing.assert_close(host[name], device[name], rtol=1e-5, atol=1e-7, msg=name)


def test_leaps_are_of_one_loss_alone_for_the_device_as_for_the_host(monkeypatch):
    """A game's losses play against each other; a batch far from the others is taken by both."""

    def trained(on_device):
        monkeypatch.setattr(step_module, "decides_on_device", lambda optimizer, _: on_device and state.step > 0)
        torch.manual_seed(1)
        model = FAMILIES["gan"](image_size=8, dim=4).build()
        model.initialise(0)
        batches = [Batch(pixels=torch.rand(6, 1, 8, 8) * (1e3 if number == 12 else 1)) for number in range(16)]
        state = TrainState(model, AdamConfig().build(model), lambda step: 1.0, batches)
        results = list(fit(state, OBJECTIVES["gan"]().build(), RUNTIME, config(16)))
        assert max(result.loss for result in results[12:13]) > 20 * results[11].loss
        assert not any(result.skipped for result in results)
        return model.state_dict()

    host, device = trained(False), trained(True)
    for name in host:
        torch.testing.assert_close(host[name], device[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_leap_moves_nothing_and_without_spikes_it_would():
    for spikes, skipped in ((QUICK, True), (None, False)):
        state = state_with(wild={12})
        for result in fit(state, STEADY, RUNTIME, tiny_config(40, spikes=spikes)):
            if result.step == 12:
                before = {k: v for k, v in flat(state).items() if not k.startswith("rng")}
            if result.step == 13:
                break
        assert bool(result.skipped) is skipped
        if skipped:
            assert_same(before, {k: v for k, v in flat(state).items() if not k.startswith("rng")})


def test_statistics_survive_saving_so_that_a_resumed_run_is_the_same(tmp_path):
    whole = state_with(wild={12, 17}, steps=24)
    skipped = [r.step for r in fit(whole, STEADY, RUNTIME, config(24)) if r.skipped]
    end = flat(whole)
    half = state_with(wild={12, 17}, steps=24)
    run = RunDirectory(tmp_path)
    for result in fit(half, STEADY, RUNTIME, config(24)):
        if result.step == 11:
            saving = Checkpointer(run)
            saving.save(half, "interval")
            saving.wait()
            break
    other = state_with(wild={12, 17}, steps=24, seed=2)
    load_checkpoint(latest_valid(run).path, other)
    later = [r.step for r in fit(other, STEADY, RUNTIME, config(24)) if r.skipped]
    assert later == [n for n in skipped if n > 11] == [13, 18]
    assert_same(end, flat(other))


# ---- whose fault it was


class Flaky(Steady):
    """Its loss is wrong once: when it is computed for the `at`-th time."""

    def __init__(self, at, wrong):
        self.__dict__.update(OBJECTIVE.__dict__)
        self.at, self.wrong, self.calls = at, wrong, 0

    def losses(self, model, batch):
        found, self.calls = super().losses(model, batch), self.calls + 1
        factor = self.wrong if self.calls == self.at else 1.0
        return Losses({name: loss * factor for name, loss in found.sums.items()}, found.metrics)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e4])
def test_a_fault_that_does_not_come_back_is_the_machines_and_costs_nothing(wrong):
    """The step is taken with the second, good gradient: the run is the one without the fault, bit for bit."""
    flaky = state_with()
    results = list(fit(flaky, Flaky(at=16, wrong=wrong), RUNTIME, config(24)))
    flaky_end, sound = flat(flaky), state_with()
    healthy = list(fit(sound, STEADY, RUNTIME, config(24)))
    assert [r.step for r in results if r.fault] == [16] and not any(r.skipped for r in results)
    bad = results[15]
    assert bad.verdict == "transient" and bad.fault["here"] and bad.fault["taken"]
    assert bad.fault["second"]["loss"] == pytest.approx(healthy[15].loss)
    assert_same(flaky_end, flat(sound))


class Misread(Flaky):
    """The `at`-th time it reads other tokens, too."""

    def losses(self, model, batch):
        if self.calls + 1 == self.at:
            batch = Batch(**{**batch, "tokens": torch.zeros_like(batch["tokens"])})
        return super().losses(model, batch)


def test_experts_forget_the_tokens_of_a_faulty_run():
    runs = []
    for objective in (Misread(at=3, wrong=math.nan), STEADY):
        model = FAMILIES["qwen3_moe"](vocab_size=11, context=5, dim=16, num_layers=1, num_heads=2, num_experts=4,
                                      top_k=1, ffn_dim=8, balance="bias", balance_rate=0.1).build()
        model.initialise(0)
        state = TrainState(model, ADAMW.build(model), lambda step: 1.0, Numbered())
        assert [r.verdict for r in fit(state, objective, RUNTIME, config(4)) if r.verdict] == (
            ["transient"] if objective is not STEADY else [])
        runs.append(flat(state))
    assert_same(*runs)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_step_is_computed_again_with_the_random_numbers_of_its_device(name, monkeypatch):
    there = torch.Generator().manual_seed(3)    # stands for the device's
    monkeypatch.setattr(getattr(torch, name), "get_rng_state", there.get_state)
    monkeypatch.setattr(getattr(torch, name), "set_rng_state", there.set_state)
    before = Before.of(torch.nn.Linear(1, 1), torch.device(name))
    expected = torch.rand(3), torch.rand(3, generator=there)
    before.put_back()
    assert torch.equal(torch.rand(3), expected[0]) and torch.equal(torch.rand(3, generator=there), expected[1])


def test_bad_data_come_back_and_the_row_and_its_document_are_named():
    state = state_with(spoil={13})
    results = list(fit(state, OBJECTIVE, RUNTIME, config(20)))
    (bad,) = [r for r in results if r.skipped]
    assert (bad.step, bad.number, bad.verdict) == (14, 13, "persistent")
    worst = bad.suspects[0]
    assert worst["row"] == 0 and not math.isfinite(worst["loss"]) and worst["documents"] == ["batch 13 row 0.txt"]
    assert all(math.isfinite(other["loss"]) for other in bad.suspects[1:])


def test_looking_for_the_cause_changes_nothing():
    runs = []
    for rerun in (True, False):
        state = state_with(spoil={13})
        list(fit(state, OBJECTIVE, RUNTIME, config(20, rerun=rerun)))
        runs.append(flat(state))
    assert_same(*runs)


# ---- going back


def train_with_going_back(state, run, settings, *, save_every=4):
    """What a caller of `fit` does."""
    checkpointer, seen, went = Checkpointer(run), [], []
    while True:
        for result in fit(state, STEADY, RUNTIME, settings, directory=run.path):
            seen.append((result.step, result.number, bool(result.skipped)))
            if result.step % save_every == 0:
                checkpointer.save(state, "interval")
        checkpointer.wait()
        if state.rewind is None:
            return seen, went
        went.append(go_back(state, checkpointer))


def test_when_leaps_persist_training_goes_back_and_passes_over_their_batches(tmp_path):
    run, state = RunDirectory(tmp_path), state_with(wild={21, 22, 24})
    seen, went = train_with_going_back(state, run, config(30))
    (event,) = went
    assert event | {"leaps": 0} == {"step": 25, "to_step": 20, "first_batch": 21, "last_batch": 24, "first_leap": 22,
                                    "leaps": 0, "checkpoint": "step-000020", "count": 1}
    assert json.dumps(event)
    again = seen[25:]
    assert [number for _, number, _ in again] == [20, *range(25, 34)] and not any(bad for *_, bad in again)
    assert state.step == 30 and again[0][0] == 21
    clean = state_with()
    clean.spikes.banned = [[21, 25]]
    list(fit(clean, STEADY, RUNTIME, config(30)))
    assert_same({k: v for k, v in flat(state).items() if not k.startswith("rng")},
                {k: v for k, v in flat(clean).items() if not k.startswith("rng")})


def test_checkpoints_that_training_may_have_to_go_back_to_are_kept_as_long_as_it_may(tmp_path):
    run, leaping = RunDirectory(tmp_path), range(101, 130, 4)
    state = state_with(wild={step - 1 for step in leaping}, steps=140)
    seen, (event,) = train_with_going_back(state, run, tiny_config(140, spikes=SpikeConfig()), save_every=14)
    assert [step for step, _, skipped in seen if skipped] == list(leaping)
    assert (event["step"], event["first_leap"], event["checkpoint"]) == (129, 101, "step-000098")
    assert state.step == 140 and run.checkpoint_steps() == [126, 140]


def test_a_crash_after_going_back_does_not_forget_it(tmp_path):
    run, state = RunDirectory(tmp_path), state_with(wild={21, 22, 24})
    checkpointer = Checkpointer(run, keep_last=9)
    for result in fit(state, STEADY, RUNTIME, config(30)):
        if result.step in (16, 20, 23):
            checkpointer.save(state, "interval")
    spent = state.elapsed_s
    go_back(state, checkpointer)
    assert [(saved.step, saved.reason) for saved in checkpointer.poll()] == [(20, "rewind")] and not checkpointer.poll()
    other = state_with(wild={21, 22, 24}, seed=5)
    found = latest_valid(run)
    assert found.step == 20, "the checkpoint from among the leaps was kept"
    load_checkpoint(found.path, other)
    assert state.elapsed_s == other.elapsed_s == spent, "the way that was left took its time too"
    other.spikes.config = QUICK
    numbers = [result.number for result in fit(other, STEADY, RUNTIME, config(30))]
    assert numbers == [20, *range(25, 34)] and other.spikes.rewinds == 1


def test_going_back_ends_with_a_reason(tmp_path):
    run = RunDirectory(tmp_path)
    state = state_with(wild=range(18, 99))
    few = tiny_config(40, spikes=SpikeConfig(window=8, times=2.0, rewind_after=3, rewind_within=6, max_rewinds=2))
    with pytest.raises(DougongError, match=r"gone back 2 times.*\n.*optim\.lr"):
        train_with_going_back(state, run, few)
    with pytest.raises(DougongError, match="no whole checkpoint"):
        train_with_going_back(state_with(wild={12, 13, 14}), RunDirectory(tmp_path / "empty"), config(), save_every=99)


def test_batches_of_no_weight_are_no_leaps():
    empty = range(10, 24, 2)
    state = state_with(empty=empty)
    skipped = [result.number for result in fit(state, OBJECTIVE, RUNTIME, config(24)) if result.skipped]
    assert skipped == list(empty) and state.step == 24 and state.rewind is None
