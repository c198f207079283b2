"""The three small recipes that hold the loop to its contract: a closed form, batch statistics, two losses."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from tiny_recipe import dougong

from dougong.core.events import read_events
from dougong.evaluate import frechet_distance, paired_accuracy
from dougong.objectives.losses import Losses
from dougong.recipes.assemble import assemble, prepare_data
from dougong.recipes.derive import resolve
from dougong.recipes.recipe import load_recipe
from dougong.train.step import group_parameters, plain_gradients

ONE_THREAD = ("runtime.threads=1", "runtime.device=cpu")


def trained(tmp_path, *arguments):
    outcome = dougong("train", *arguments, *ONE_THREAD, "--run", tmp_path / "run", "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json["result"]
    json.dumps(result, allow_nan=False)
    return result, outcome


def test_gradient_descent_ends_at_the_minimum_norm_solution(tmp_path):
    result, _ = trained(tmp_path, "linear_regression")
    assert 0 <= result["distance_to_minimum_norm"] < 1e-6


def test_another_start_ends_elsewhere_so_the_distance_can_fail(tmp_path):
    result, _ = trained(tmp_path, "linear_regression", "model.init_std=0.1")
    assert result["distance_to_minimum_norm"] > 1e-2
    steps = [e for e in read_events(tmp_path / "run/events.jsonl") if e["event"] == "step"]
    assert steps[-1]["loss"] < 1e-12, "it solves the training rows all the same"


def test_the_cnn_beats_forest_and_support_vectors(tmp_path):
    result, outcome = trained(tmp_path, "digits_cnn")
    assert result["accuracy"] >= 0.985 and result["examples"] > 300
    assert {row["name"] for row in result["baselines"]} == {"random forest", "linear SVM"}
    for row in result["baselines"]:
        assert 0.9 < row["accuracy"] < result["accuracy"]
        assert row["difference"] == pytest.approx(result["accuracy"] - row["accuracy"])
        assert 0 < row["interval"][0] < row["difference"] < row["interval"][1]
        assert row["name"] in outcome.err
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "random forest" in page and "linear SVM" in page


def test_early_stopping_ends_the_cnn_before_its_steps(tmp_path):
    outcome = dougong("train", "digits_cnn", *ONE_THREAD, "train.steps=100", "train.evaluate_every=2",
                      "train.patience=2", "optim.lr=1e-9", "schedule=constant", "evaluate.baselines=false",
                      "--run", tmp_path / "run", "--json")
    assert outcome.code == 0 and outcome.json["reason"] == "early stop" and outcome.json["step"] < 100


def test_the_gan_draws_digits_rather_than_noise(tmp_path):
    """After 600 of 1,500 steps; measured over seeds 0 and 1: 1.5 to 2.1, noise 10.0, training images 0.1."""
    result, _ = trained(tmp_path, "digits_gan", "train.steps=600")
    references = {row["name"]: row["frechet_distance"] for row in result["baselines"]}
    assert 0 < references["training images"] < result["frechet_distance"] < 0.35 * references["uniform noise"]
    assert result["weights"] == "ema"


def test_each_player_gets_the_gradient_of_its_own_loss():
    recipe, _ = resolve(load_recipe("digits_gan", list(ONE_THREAD))[0])
    built = assemble(recipe, prepare_data(recipe))
    model, objective, batch = built.state.model, built.objective, next(iter(built.state.loader))
    losses: dict[str, torch.Tensor] = {}

    class Recorded(type(objective)):
        def losses(self, model, batch) -> Losses:
            found = super().losses(model, batch)
            losses.update(found.sums)
            return found

    torch.manual_seed(3)
    plain_gradients(model.eval(), Recorded(), [batch], float(batch.rows), built.runtime)
    got = {group: [p.grad.clone() for p in group_parameters(model, group)] for group in losses}
    assert set(got) == {"generator", "discriminator"}
    torch.manual_seed(3)
    again = objective.losses(model, batch).sums
    for group, loss in again.items():
        own = torch.autograd.grad(loss / batch.rows, group_parameters(model, group), retain_graph=True)
        other = torch.autograd.grad(sum(l for g, l in again.items() if g != group) / batch.rows,
                                    group_parameters(model, group), retain_graph=True, allow_unused=True)
        for a, b in zip(got[group], own, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert any(g is not None and float(g.abs().max()) > 1e-4 for g in other), "the other loss reaches it too"


# -- the measures behind the scores ------------------------------------------------------------------------------------

def test_frechet_distance_equals_the_formula_and_is_zero_for_equal_sets():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(400, 6)) @ random.normal(size=(6, 6)), random.normal(size=(300, 6)) + 0.5
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * np.real(sqrtm(ca @ cb)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2.0) == pytest.approx(4.0 * 6, rel=1e-9)


def test_frechet_distance_of_images_without_any_spread():
    flat = np.full((10, 4), 0.5)
    assert frechet_distance(flat, flat) == 0 and math.isfinite(frechet_distance(flat, np.eye(4)))


def test_paired_accuracy_counts_only_where_they_differ():
    a, b = np.array([1, 1, 1, 0, 1] * 40, bool), np.array([1, 1, 0, 0, 1] * 40, bool)
    difference, interval = paired_accuracy(a, b)
    assert difference == pytest.approx(0.2) and interval[0] > 0.1 and interval[1] < 0.3
    assert paired_accuracy(a, a) == (0.0, (0.0, 0.0))
