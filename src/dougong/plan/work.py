"""What is to be planned: the sections that decide a run's memory and time, without the recipe around them."""

from dataclasses import dataclass
from typing import Any

from dougong.plan.step import Step


@dataclass(frozen=True)
class Work:
    """A training run in the eyes of the plan. `rows` and `steps` are the whole run's; `micro_rows` is one process's."""

    model: Any
    objective: Any
    optim: Any
    rows: int
    context: int
    steps: int
    precision: str = "bf16"
    device: str = "cuda"
    checkpoint: str = "none"
    """activations kept: "none" are given up, "selective", or "full": only each layer's input is kept"""
    micro_rows: int | None = None
    """None: as many as fit"""
    ema: bool = False
    adapt: Any = None
    """an adapter: everything else is frozen"""
    begun: bool = False
    """from a model that exists, for which an adapter may be trained instead"""
    row_setting: str = "model.context"
    """what of the recipe says how long a row is"""
    compile: bool = False
    """zero-bubble schedules do not take compiled stages"""

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.context

    def step(self, *, micro_rows: int = 1, micro_batches: int = 1) -> Step:
        """One process's step."""
        return Step(self.model, self.objective, self.optim, micro_rows=micro_rows, micro_batches=micro_batches,
                    context=self.context, precision=self.precision, device=self.device, checkpoint=self.checkpoint,
                    ema=self.ema, adapt=self.adapt)


CHECKPOINTING = {False: "none", True: "full", "selective": "selective"}
"""`train.gradient_checkpointing` -> `Work.checkpoint`"""
AS_SETTING = {mode: f"train.gradient_checkpointing={str(value).lower()}" for value, mode in CHECKPOINTING.items()}
"""`Work.checkpoint` -> what the recipe is told"""
