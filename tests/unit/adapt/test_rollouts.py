"""Experience: whose samples, in which order, and what each of them counts."""

import numpy as np
import pytest
import torch

from dougong.adapt.rewards import Rewards, Task
from dougong.adapt.rollouts import Rollouts, greedy_score
from dougong.core.errors import CheckpointError, ConfigError
from dougong.models.families.qwen3 import Qwen3Config
from dougong.objectives.policy import FIGURES, GRPOConfig, RejectionConfig
from dougong.runtime.device import Runtime

LETTERS = "abcdefgh."


class Letters:
    """A letter a token; the full stop ends a reply."""

    stop_ids = frozenset({LETTERS.index(".")})
    vocab_size = len(LETTERS)

    def prompt(self, task):
        return [LETTERS.index(letter) for letter in task.prompt[0]["content"]]

    def text(self, ids):
        return "".join(LETTERS[i] for i in ids)


TASKS = [Task(({"role": "user", "content": text},), text[0]) for text in ("abc", "bad", "cab", "deaf", "hag", "fed")]


@pytest.fixture
def model():
    made = Qwen3Config(vocab_size=9, context=24, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
                       ffn_dim=24, init_std=0.3).build()
    made.initialise(0)
    return made


def rollouts(model, settings=None, *, rows=12, reward="contains", seed=5, rank=0, world_size=1, tasks=TASKS):
    return Rollouts(tasks, model, Letters(), Rewards(reward), settings or GRPOConfig(samples=4, max_tokens=5),
                    rows=rows, seed=seed, runtime=Runtime(), fingerprint="tasks", rank=rank, world_size=world_size)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_a_step_is_a_function_of_its_number_and_of_the_weights(model):
    loader = rollouts(model)
    first, second = next(loader), next(loader)
    assert not torch.equal(first["tokens"][:1, :3], second["tokens"][:1, :3]) or first.rows != second.rows
    again = rollouts(model)
    again.load_state_dict({**again.state_dict(), "position": 1})
    same(dict(next(again)), dict(second))
    with torch.no_grad():
        model.stem.tokens.weight.mul_(-1)
    moved = rollouts(model)
    assert not torch.equal(next(moved)["targets"][:1], first["targets"][:1])


def test_ranks_ask_the_prompts_that_one_process_would(model):
    settings = RejectionConfig(samples=3, max_tokens=5, passes=0)       # keeps every sample
    whole = rollouts(model, settings).batch(3)
    parts = [rollouts(model, settings, rank=rank, world_size=2).batch(3) for rank in (0, 1)]
    written = [_rows(batch) for batch in (whole, *parts)]
    assert written[0] == written[1] + written[2] and len(written[0]) == 12


def _rows(batch):
    return [(row[:int(weight.nonzero().max()) + 1].tolist(), target[weight > 0].tolist())
            for row, target, weight in zip(batch["tokens"], batch["targets"], batch["weight"])]


def test_every_pass_asks_every_task_once(model):
    loader = rollouts(model, GRPOConfig(samples=2, max_tokens=1), rows=4)
    assert loader.batches_per_epoch == 3
    for epoch in range(2):
        asked = [place for step in range(3) for place in loader._places(3 * epoch + step)]
        assert sorted(asked) == list(range(6))


def test_the_samples_of_a_group_differ_and_only_what_was_written_weighs(model):
    batch = rollouts(model, RejectionConfig(samples=4, max_tokens=5, passes=0)).batch(0)
    written = [tuple(target[weight > 0].tolist()) for target, weight in zip(batch["targets"], batch["weight"])]
    assert len(set(written[:4])) > 1
    for row in range(batch.rows):
        places = batch["weight"][row].nonzero().flatten()
        prompt = Letters().text(batch["tokens"][row, :int(places[0]) + 1].tolist())
        assert prompt in {task.prompt[0]["content"] for task in TASKS}
        ended = batch["targets"][row, places] == LETTERS.index(".")
        assert not ended[:-1].any() and (ended[-1] or len(places) == 5)


def test_groups_that_agree_are_left_out_and_counted(model):
    batch = rollouts(model).batch(0)
    advantage = batch["advantage"]
    assert batch.rows % 4 == 0 and (advantage.view(-1, 4).amax(-1) > advantage.view(-1, 4).amin(-1)).all()
    torch.testing.assert_close(advantage.view(-1, 4).sum(-1), torch.zeros(batch.rows // 4))
    assert float(batch["idle_groups"][0]) == pytest.approx(1 - batch.rows / 12)


def test_where_all_groups_agree_the_step_has_next_to_no_weight_and_no_gradient(model):
    found = rollouts(model, RejectionConfig(samples=4, max_tokens=5, passes=9)).batch(0)
    objective = GRPOConfig().build()
    loss = objective.losses(model, found).sums["model"] / objective.weight(found)
    assert float(found["idle_groups"][0]) == 1 and 0 < objective.weight(found) < 1e-3
    assert all((g == 0).all() for g in torch.autograd.grad(loss, list(model.parameters())))
    assert set(FIGURES) <= found.keys()


def test_samples_are_drawn_from_the_models_own_distribution(model):
    tasks = TASKS[:1]
    settings = RejectionConfig(samples=4000, max_tokens=1, passes=0)
    batch = rollouts(model, settings, rows=4000, tasks=tasks).batch(0)
    drawn = np.bincount(batch["targets"][batch["weight"] > 0].numpy(), minlength=9) / 4000
    with torch.no_grad():
        expected = model(torch.tensor([Letters().prompt(tasks[0])]))[0, -1].softmax(-1).numpy()
    assert np.abs(drawn - expected).max() < 0.03


def test_a_greedy_score_reads_every_task_and_stops_when_enough_was_written(model):
    found = greedy_score(model, Letters(), Rewards("contains"), TASKS, max_tokens=5, runtime=Runtime())
    assert found["tasks"] == 6 and found["loss"] == -found["reward"] and 0 <= found["pass_rate"] <= 1
    model.train()
    assert greedy_score(model, Letters(), Rewards("contains"), TASKS, max_tokens=5, runtime=Runtime()) == found
    assert model.training


def test_one_process_can_be_stopped_at_every_token_of_a_greedy_score(model):
    polled = []
    greedy_score(model, Letters(), Rewards("contains"), TASKS[:1], max_tokens=5, runtime=Runtime(),
                 poll=lambda: polled.append(1))
    written = greedy_score(model, Letters(), Rewards("contains"), TASKS[:1], max_tokens=5, runtime=Runtime())
    assert len(polled) >= written["tokens_per_reply"] > 1


def test_rows_that_make_no_groups_and_other_tasks_are_refused(model):
    with pytest.raises(ConfigError, match=r"Try train\.rows=12"):
        rollouts(model, rows=13)
    with pytest.raises(ConfigError, match=r"2 processes\. Try train\.rows=16"):
        rollouts(model, rows=12, world_size=2)
    state = rollouts(model).state_dict()
    with pytest.raises(CheckpointError, match="other tasks"):
        rollouts(model).load_state_dict({**state, "data": "others"})
    with pytest.raises(CheckpointError, match="seed=5"):
        rollouts(model, seed=6).load_state_dict(state)
