"""Three small recipes that hold the loop to its contract: a closed form, batch statistics, two losses."""

from dougong.data.arrays import DigitsData, RegressionData
from dougong.models.families.cnn import CNNConfig
from dougong.models.families.gan import GANConfig
from dougong.models.families.linear import LinearConfig
from dougong.objectives.classify import ClassifyConfig
from dougong.objectives.gan import GANObjectiveConfig
from dougong.objectives.regression import RegressionConfig
from dougong.optim.build import AdamConfig, AdamWConfig, SGDConfig
from dougong.optim.schedules import ConstantConfig, CosineConfig
from dougong.recipes.recipe import Recipe
from dougong.train import EMAConfig, TrainConfig


def linear_regression() -> Recipe:
    """Fewer rows than features: gradient descent from zero must end at the solution of least norm."""
    return Recipe(
        name="linear_regression",
        about="gradient descent on a linear problem; ends at the minimum-norm solution (seconds)",
        data=RegressionData(features=64, rows=32, precision="float64"),
        model=LinearConfig(),
        objective=RegressionConfig(),
        optim=SGDConfig(lr=0.3),
        schedule=ConstantConfig(),
        train=TrainConfig(steps=1000, rows=32, clip_norm=0, log_every=50, trackers=()),
    )


def digits_cnn() -> Recipe:
    """Batch norm, dropout and early stopping on scikit-learn's digits."""
    return Recipe(
        name="digits_cnn",
        about="a small CNN on scikit-learn's handwritten digits, ≥ 98.5 % on test (seconds)",
        data=DigitsData(),
        model=CNNConfig(),
        objective=ClassifyConfig(),
        optim=AdamWConfig(lr=1e-2, weight_decay=0.05),
        schedule=CosineConfig(warmup=0.05, floor=0.0),
        train=TrainConfig(steps=150, rows=96, evaluate_every=15, patience=5, log_every=5, trackers=()),
    )


def digits_gan() -> Recipe:
    """A generator and a discriminator, each with the gradient of its own loss only."""
    return Recipe(
        name="digits_gan",
        about="a GAN that draws handwritten digits: two losses over two parameter groups (seconds)",
        data=DigitsData(),
        model=GANConfig(dim=64, dropout=0.1),
        objective=GANObjectiveConfig(),
        optim=AdamConfig(lr=3e-4, betas=(0.5, 0.99)),
        schedule=ConstantConfig(),
        train=TrainConfig(steps=1500, rows=64, clip_norm=0, ema=EMAConfig(decay=0.99), log_every=20, trackers=()),
    )
