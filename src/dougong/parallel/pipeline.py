"""A pipeline: each process holds some of the layers, and passes the stream on (GPipe: arXiv:1811.06965).

The schedules are PyTorch's. A stage is the decoder itself with fewer parts, so the same forward serves it; between
stages travel `x` and, where residuals read it, `x0`. Everything else a stage needs (tokens, segments, targets, weights)
it has from its own batch, as all processes of a pipeline read the same rows. The loss is computed in the last stage.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules

from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.models.compose import Decoder
from dougong.nn.position import Position
from dougong.nn.residual import PlainResidual
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Objective
from dougong.parallel import stages as order
from dougong.parallel.context import context_slice
from dougong.parallel.stages import num_stages, process_of, why_not_pipeline
from dougong.runtime.device import Runtime
from dougong.runtime.mesh import Mesh
from dougong.runtime.parts import local

_SCHEDULES: dict[str, Any] = {
    "gpipe": torch_schedules.ScheduleGPipe,
    "1f1b": torch_schedules.Schedule1F1B,
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "looped_bfs": torch_schedules.ScheduleLoopedBFS,
    "interleaved_zb": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}
_TIED = "stem.tokens.weight"


def split(model: nn.Module, mesh: Mesh, *, micro_batches: int, compile: bool = False) -> "list[Stage]":
    """Removes from `model` what other processes of the pipeline hold, and returns the stages that this one runs.

    Names stay those of the whole model; `model.names_of_whole` lists them all, for patterns to be checked against. A
    tied embedding lies on the first and the last process; `model.held_elsewhere` (name -> processes that hold it) says
    so. Raises ConfigError where model, layout and micro-batches do not fit.
    """
    layout = mesh.layout
    checkpointing = model.stack.checkpoint_activations if isinstance(model, Decoder) else "none"
    if reason := why_not_pipeline(getattr(model, "config", None), layout, micro_batches, compile=compile,
                                  checkpoint_activations=checkpointing):
        raise ConfigError(reason)
    assert isinstance(model, Decoder)
    cuts = order.stages_of(len(model.stack), layout.pipeline, layout.schedule, head=order.head_work(model.config))
    here, last = mesh.rank("pipeline"), len(cuts) - 1
    mine = [stage for stage in range(len(cuts)) if process_of(stage, layout.pipeline, layout.schedule) == here]
    tied = not list(model.head.parameters())
    model.names_of_whole = [name for name, p in model.named_parameters() if p.requires_grad]    # type: ignore[assignment]
    x0 = any(not isinstance(block.residual, PlainResidual) for block in model.stack.values())
    _keep(model, {str(i) for stage in mine for i in cuts[stage]}, first=0 in mine, last=last in mine, tied=tied)
    ends = {process_of(stage, layout.pipeline, layout.schedule) for stage in (0, last)}
    held: dict[str, int] = {_TIED: len(ends)} if tied and len(ends) > 1 and here in ends else {}
    model.held_elsewhere = held     # type: ignore[assignment]
    return [Stage(model, stage, cuts[stage], last=stage == last, x0=x0) for stage in mine]


def _keep(model: Decoder, layers: set[str], *, first: bool, last: bool, tied: bool) -> None:
    stem: Any = model.stem
    for container in (model.stack, stem.values):
        for name in set(container.keys()) - layers:
            del container[name]
    if not first:
        stem.norm = nn.Identity()
        if not (last and tied):
            stem.tokens = None
        if list(model.position.parameters()):       # only added to embedded tokens
            model.position = Position()
    if not last:
        model.norm = nn.Identity()
        model.head = None       # type: ignore[assignment]


class Stage(nn.Module):
    """Some of a decoder's layers and what lies at their end, as one call.

    The modules are the decoder's own, registered for those who look for them (FSDP, the schedules); the forward is the
    decoder's. The last stage returns the summed loss and the metrics instead of the stream.
    """

    def __init__(self, decoder: Decoder, index: int, layers: range, *, last: bool, x0: bool) -> None:
        super().__init__()
        self.index, self.last, self.x0 = index, last, x0
        self.layers = [str(i) for i in layers]
        self._decoder = (decoder,)      # a tuple, because nn.Module registers modules it is given bare
        self.objective: Objective | None = None
        self.names: tuple[list[str], list[str]] | None = None

    def register_modules(self) -> None:
        """Once the decoder's modules are those that will run."""
        decoder: Any = self._decoder[0]
        self.blocks = nn.ModuleDict({name: decoder.stack[name] for name in self.layers})
        self.values = nn.ModuleDict({name: decoder.stem.values[name] for name in self.layers
                                     if name in decoder.stem.values})
        ends = [decoder.stem.tokens, decoder.stem.norm, decoder.position] if self.index == 0 else []
        if self.last:
            ends += [decoder.norm, decoder.head, *([] if list(decoder.head.parameters()) else [decoder.stem.tokens])]
        self.ends = nn.ModuleList(dict.fromkeys(ends))

    def forward(self, *carry: Tensor, **fields: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Stream (and x0) B T D -> the same, or, in the last stage, loss and metrics one after another."""
        decoder, batch = self._decoder[0], Batch(**fields)
        arrived = None if self.index == 0 else (carry[0], carry[-1])
        if not self.last:
            after = decoder.stream(batch["tokens"], segment_BT=batch.get("segment"), carry=arrived, layers=self.layers)
            # the schedules detach what a stage returns in place, and PyTorch does that to no view
            return tuple(t.clone() if t._is_view() else t.contiguous() for t in (after if self.x0 else after[:1]))
        assert self.objective is not None, "set before each step"
        rest: Any = _Rest(decoder, arrived, self.layers)
        losses = self.objective.losses(rest, batch)
        self.names = list(losses.sums), list(losses.metrics)
        return torch.stack([*losses.sums.values(), *losses.metrics.values()])


class _Rest:
    """What an objective takes for a whole model: a decoder whose `hidden` goes on from what arrived."""

    def __init__(self, decoder: Decoder, carry: Any, layers: list[str]) -> None:
        self._decoder, self._carry, self._layers = decoder, carry, layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def hidden(self, tokens_BT: Tensor, *, segment_BT: Tensor | None = None) -> Tensor:
        return self._decoder.norm(self._decoder.stream(
            tokens_BT, segment_BT=segment_BT, carry=self._carry, layers=self._layers)[0])


class Pipeline:
    """Runs the stages of this process in the layout's order, together with the other processes of the pipeline."""

    def __init__(self, model: nn.Module, stages: "list[Stage]", runtime: Runtime) -> None:
        self.stages, self.runtime = stages, runtime
        self.model: Any = model
        self.layout, self.group = runtime.mesh.layout, runtime.mesh.group("pipeline")
        self._schedules: dict[Any, Any] = {}
        self._weight = 1.0
        self._names: tuple[list[str], list[str]] | None = None
        for stage in stages:
            stage.register_modules()

    def gradients(self, model: nn.Module, objective: Objective, batches: Sequence[Batch], weight: float,
                  runtime: Runtime) -> Losses:
        """A `GradientFunction`. The sums are in the process of the last stage; in the others they are zeros."""
        self._weight = weight
        losses = self._run(objective, batches, training=True)
        for name in self.model.held_elsewhere:
            gradient = self.model.get_parameter(name).grad
            assert gradient is not None, "both ends have used the tied embedding"
            _add_the_others(local(gradient), self._other_end(), self.group)
        return losses

    @torch.no_grad()
    def losses(self, objective: Objective, batch: Batch) -> Losses:
        """The sums of `gradients`, forward only: this process's share. As many micro-batches as there are stages."""
        count = num_stages(self.layout.pipeline, self.layout.schedule)
        return self._run(objective, batch.split(-(-batch.rows // count)), training=False)

    def _run(self, objective: Objective, batches: Sequence[Batch], *, training: bool) -> Losses:
        for stage in self.stages:
            stage.objective = objective
        fields = _side_by_side([context_slice(batch, self.runtime.mesh) for batch in batches], self.runtime.device)
        schedule = self._schedule(len(batches), {name: tensor.shape for name, tensor in fields.items()}, training)
        target = {"target": fields["targets"]} if training else {}
        found = schedule.step(**target, **fields)
        return self._share(None if found is None else found.detach().view(len(batches), -1).sum(0))

    def _schedule(self, micro_batches: int, shapes: dict[str, torch.Size], training: bool) -> Any:
        """PyTorch's schedule for batches of these shapes, made at their first step: buffers have fixed sizes."""
        key = (micro_batches, tuple(shapes.items()), training)
        if key not in self._schedules:
            if not self._schedules:
                dist.barrier(group=self.group)      # NCCL: all of a group take part in its first message
            kind = self.layout.schedule if training else _forward_only(self.layout.schedule)
            rows, T = shapes["tokens"]
            stages = [self._stage(stage, num_stages(self.layout.pipeline, kind), (rows // micro_batches, T))
                      for stage in self.stages]
            loss = (lambda output, target: output[0] / self._weight) if training else None
            self._schedules[key] = made = _SCHEDULES[kind](
                stages if kind in order.TWICE else stages[0], micro_batches, loss_fn=loss, scale_grads=False)
            if not training and kind in order.TWICE:
                _without_backward(made)
        return self._schedules[key]

    def _stage(self, stage: Stage, count: int, tokens: tuple[int, int]) -> PipelineStage:
        """PyTorch's stage. It is told what arrives and what leaves; else it would find out by a forward of its own, on
        numbers of no meaning, and routers count what they see."""
        B, T = tokens
        if self.layout.sequence_parallel:
            T //= self.layout.tensor
        x_BTD = torch.empty(B, T, self.model.config.decoder().dim,
                            dtype=self.model.compute_dtype, device="meta", requires_grad=True)
        carry = (x_BTD,) * (2 if stage.x0 else 1)
        return PipelineStage(stage, stage.index, count, self.runtime.device, group=self.group,
                             input_args=carry if stage.index else (), output_args=x_BTD if stage.last else carry)

    def _share(self, sums: Tensor | None) -> Losses:
        """Losses from the last stage's output; the other processes learn their names once, and bring zeros."""
        if self._names is None:
            box = [next((stage.names for stage in self.stages if stage.last), None)]
            dist.broadcast_object_list(box, group_src=self._last_process(), group=self.group,
                                       device=self.runtime.device)
            self._names = box[0]
        assert self._names is not None
        losses, metrics = self._names
        values = iter(torch.zeros(len(losses) + len(metrics), device=self.runtime.device) if sums is None else sums)
        return Losses({name: next(values) for name in losses}, {name: next(values) for name in metrics})

    def _last_process(self) -> int:
        return process_of(num_stages(self.layout.pipeline, self.layout.schedule) - 1, self.layout.pipeline,
                          self.layout.schedule)

    def _other_end(self) -> int:
        return 0 if self.runtime.mesh.rank("pipeline") else self._last_process()


def owned(model: nn.Module, mesh: Mesh, name: str) -> bool:
    """Whether this process is the one of its pipeline that answers for a parameter it holds, in a checkpoint for
    example: all are, but the last stage's copy of a tied embedding."""
    return mesh.rank("pipeline") == 0 or name not in getattr(model, "held_elsewhere", {})


def _forward_only(schedule: str) -> str:
    """The schedule for evaluations: one that finds the stages where they lie."""
    return "zbv" if schedule in order.THERE_AND_BACK else "looped_bfs" if schedule in order.TWICE else "gpipe"


def _without_backward(schedule: Any) -> None:
    """PyTorch's schedules of two stages look for a backward's results even where there was none."""
    def nothing(action: Any, context: Any) -> None:
        schedule.bwd_recv_ops.pop((action.stage_index, action.microbatch_index), None)

    for action in (torch_schedules.FULL_BACKWARD, torch_schedules.BACKWARD_INPUT, torch_schedules.BACKWARD_WEIGHT,
                   torch_schedules.REDUCE_GRAD):
        schedule.register_custom_function(action, nothing)


def _side_by_side(batches: Sequence[Batch], device: torch.device) -> dict[str, Tensor]:
    """Micro-batches as one batch that falls into equal parts: a shorter last one is filled with rows of no weight."""
    missing = batches[0].rows - batches[-1].rows
    fields = {name: [batch[name] for batch in batches] for name in batches[0]}
    if missing:
        for name, parts in fields.items():
            filler = parts[0][:missing]
            parts.append(torch.zeros_like(filler) if name == "weight" else filler)
    return {name: torch.cat(parts).to(device, non_blocking=True) for name, parts in fields.items()}


def _add_the_others(tensor: Tensor, process: int, group: Any) -> None:
    """Adds another process's tensor to this one's, there as here: both end with the same bits."""
    theirs = torch.empty_like(tensor)
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, group=group, group_peer=process),
                                        dist.P2POp(dist.irecv, theirs, group=group, group_peer=process)]):
        work.wait()
    tensor += theirs
