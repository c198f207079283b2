"""The `train` section of a recipe. No torch here."""

from typing import Annotated, Literal

from pydantic import Field

from dougong.core.config import config

Count = Annotated[int, Field(ge=1)]
Tracker = Literal["tensorboard", "wandb", "mlflow"]


@config
class EMAConfig:
    """A running average of the weights, evaluated beside or instead of them."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """share of the old average kept at each update; early on less is kept, so the start is forgotten"""
    every: Count = 1
    """steps between updates"""


@config
class TrainConfig:
    """How long, in what portions, and what happens on the way."""

    steps: Count | None = None
    """optimiser steps; derived: from `minutes` and the measured speed, or from the size"""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """time budget from which `steps` is derived before training begins; None: `steps` decides"""
    rows: Count | None = None
    """rows of the batch of one step; derived: from the size"""
    micro_rows: Count | None = None
    """rows that go through the model at once; derived: as many as fit in memory"""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """largest norm of a parameter group's gradient; 0: no clipping"""
    ema: EMAConfig | None = None
    """None: no average is kept"""
    gradient_checkpointing: bool = False
    """keep only each block's input and compute the block again on the way back: less memory, about a third
    slower"""
    log_every: Count = 1
    """steps that one `step` event sums up"""
    evaluate_every: Count | None = None
    """steps; derived: about ten evaluations a run"""
    sample_every: Count | None = None
    """steps; derived: as often as evaluations"""
    checkpoint_every: Count | None = None
    """steps; derived: about a minute of training"""
    keep_last: Count = 2
    """checkpoints kept besides the best"""
    keep_best: bool = True
    """keep the checkpoint with the lowest validation loss"""
    patience: Count | None = None
    """evaluations without a better loss after which training stops; None: never"""
    max_skips: Annotated[int, Field(ge=0)] = 10
    """steps in a row with a non-finite loss or gradient that are skipped before training stops"""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """where metrics go besides events.jsonl"""
