"""Scores of the models that read arrays: accuracy, squared error, and likeness of what a GAN draws.

A function named after a measure scores one whole split, beside what it should be compared with; those named after a
kind of model return what an evaluation during training computes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from dougong.recipes.recipe import Recipe
from dougong.runtime.device import Runtime
from dougong.runtime.seeds import derive

Score = Callable[[nn.Module], dict[str, Any]]


def classifier(recipe: Recipe, corpus: Any, runtime: Runtime) -> Score:
    def measure(model: nn.Module) -> dict[str, Any]:
        found = accuracy_on(recipe, corpus, model, runtime, "validation", baselines=False)
        return {name: found[name] for name in ("loss", "accuracy")}

    return measure


def accuracy_on(recipe: Recipe, corpus: Any, model: nn.Module, runtime: Runtime, split: str, *,
                baselines: bool) -> dict[str, Any]:
    """Share of right answers; beside it a random forest and a linear SVM fitted on the same training split."""
    from dougong.evaluate import accuracy, classical_rivals

    arrays, train = corpus.arrays(split), corpus.arrays("train")
    found = accuracy(model, torch.from_numpy(arrays["pixels"]), torch.from_numpy(arrays["labels"]), runtime=runtime)
    rivals = classical_rivals((train["pixels"], train["labels"]), (arrays["pixels"], arrays["labels"]),
                              seed=recipe.seed) if baselines else []
    return {"accuracy": found.accuracy, "interval": list(found.interval()),
            "baselines": [rival.against(found.correct, seed=recipe.seed) for rival in rivals], "loss": found.loss,
            "examples": len(found.correct)}


def regression(recipe: Recipe, corpus: Any, runtime: Runtime) -> Score:
    return lambda model: {
        "loss": squared_error_on(recipe, corpus, model, runtime, "validation", baselines=False)["loss"]}


def squared_error_on(recipe: Recipe, corpus: Any, model: nn.Module, runtime: Runtime, split: str, *,
                     baselines: bool) -> dict[str, Any]:
    """Mean squared error; with `baselines` also how far a weight is at most from the closed-form solution."""
    arrays = corpus.arrays(split)
    with torch.no_grad():
        prediction = model(torch.from_numpy(arrays["features"]).to(runtime.device)).cpu()
    error = float((prediction - torch.from_numpy(arrays["targets"])).double().square().mean())
    found = {"loss": error / 2, "mean_squared_error": error, "examples": len(prediction)}
    if baselines and recipe.model.kind == "linear" and not recipe.model.bias:
        found["distance_to_minimum_norm"] = _distance_to_minimum_norm(model, corpus)
    return found


def _distance_to_minimum_norm(model: nn.Module, corpus: Any) -> float:
    """The largest difference of a weight from the least-squares solution of least norm."""
    from dougong.data.arrays import minimum_norm

    train = corpus.arrays("train")
    weights = next(model.parameters()).detach().cpu().double().numpy()
    return float(np.abs(weights.T - minimum_norm(train["features"], train["targets"])).max())


def likeness_to(recipe: Recipe, corpus: Any, model: nn.Module, runtime: Runtime, split: str, *,
                baselines: bool) -> dict[str, Any]:
    """Fréchet distance of drawn images to those of a split, in the space of their pixels: 0 for the same Gaussian.

    As many are drawn as there are training images, so that the distances beside it are measured alike: of the training
    images (about what can be reached) and of uniform noise (what an untrained generator may as well be).
    """
    from dougong.evaluate import frechet_distance

    real, train = (_flat(corpus.arrays(name)["pixels"]) for name in (split, "train"))
    random = torch.Generator().manual_seed(derive(recipe.seed, "drawn"))
    noise = torch.randn(len(train), recipe.model.noise_dim, generator=random)
    with torch.no_grad():
        drawn = model(noise.to(runtime.device)).float().cpu().numpy()
    found: dict[str, Any] = {"frechet_distance": frechet_distance(_flat(drawn), real), "examples": len(real)}
    if baselines:
        uniform = np.random.default_rng(recipe.seed).random(train.shape)
        found["baselines"] = [{"name": name, "frechet_distance": frechet_distance(points, real)}
                              for name, points in (("training images", train), ("uniform noise", uniform))]
    return found


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)
