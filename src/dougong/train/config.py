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
class SpikeConfig:
    """Steps whose loss or gradient norm leaps are not taken; when leaps persist, training goes back.

    A value leaps when it lies `sigmas` standard deviations above the mean of the last `window` steps (OLMo 2, 2024,
    arXiv:2501.00656, section 3) and, for the gradient norm, which clipping bounds anyway, above `times` that mean.
    """

    sigmas: Annotated[float, Field(gt=0)] = 6.0
    """standard deviations above the mean"""
    times: Annotated[float, Field(ge=1)] = 3.0
    """a gradient norm must also be this many times the mean: rare but healthy batches reach twice"""
    window: Annotated[int, Field(ge=8)] = 128
    """steps that are remembered; nothing is judged before half of them are known"""
    rewind_after: Annotated[int, Field(ge=1)] | None = 8
    """leaps or non-finite steps among the last `rewind_within` after which training goes back to the last checkpoint
    before them, and passes over their batches; None: never"""
    rewind_within: Count = 32
    """steps"""
    max_rewinds: Annotated[int, Field(ge=0)] = 3
    """times that training goes back before it stops"""


@config
class TrainConfig:
    """How long, in what portions, and what happens on the way."""

    steps: Count | None = None
    """optimiser steps; derived: from `minutes` and the measured speed, from `epochs`, or from the size"""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """time budget from which `steps` is derived before training begins; None: `steps` decides"""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """passes over the data from which `steps` is derived once they are prepared"""
    rows: Count | None = None
    """rows of the batch of one step; derived: from the size"""
    micro_rows: Count | None = None
    """rows that go through the model at once; derived: as many as fit in memory"""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """largest norm of a parameter group's gradient; 0: no clipping"""
    ema: EMAConfig | None = None
    """None: no average is kept"""
    gradient_checkpointing: bool | Literal["selective"] = False
    """true: keep only each block's input and compute the block again on the way back: least memory, about a third
    slower; selective: keep the results of matrix products and attention too, and compute the cheap rest again"""
    log_every: Count = 1
    """steps that one `step` event sums up"""
    evaluate_every: Count | None = None
    """steps; derived: about ten evaluations a run"""
    sample_every: Count | None = None
    """steps; derived: as often as evaluations"""
    checkpoint_every: Count | None = None
    """steps; derived: about a minute of training"""
    keep_last: Count = 2
    """checkpoints kept besides the best, and besides those that leaps may make training go back to"""
    keep_every: Count | None = None
    """steps between checkpoints that are saved and never removed; None: there are none"""
    keep_best: bool = True
    """keep the checkpoint with the lowest validation loss"""
    patience: Count | None = None
    """evaluations without a better loss after which training stops; None: never"""
    max_skips: Annotated[int, Field(ge=0)] = 10
    """steps in a row with a non-finite loss or gradient that are skipped before training stops"""
    spikes: SpikeConfig | None = None
    """skip steps whose loss or gradient leaps; None: only those that are not finite"""
    rerun: bool = True
    """compute a suspicious step a second time, to tell its data from its hardware"""
    log_layers_every: Count = 50
    """steps between gradient norms by layer in the events; before a leap the last ones are always kept"""
    gc_every: Count | None = None
    """steps between Python's garbage collections, on all processes at once; None: whenever Python wants"""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """where metrics go besides events.jsonl"""

    @property
    def checkpoint_activations(self) -> Literal["none", "selective", "full"]:
        """`gradient_checkpointing` as the stack of layers names it."""
        value = self.gradient_checkpointing
        return value if isinstance(value, str) else "full" if value else "none"
