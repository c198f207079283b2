"""How a decoder's layers are cut into pipeline stages, and which process runs which stage.

A process of a pipeline holds one stage, or two where the schedule goes through the processes twice: in a loop
(interleaved, looped_bfs, interleaved_zb: 0 1 0 1) or there and back (zbv, dualpipev: 0 1 1 0).
"""

import itertools
from typing import Any

from dougong.runtime.layout import LayoutConfig

TWICE = ("interleaved", "looped_bfs", "interleaved_zb", "zbv", "dualpipev")
"""schedules with two stages on each process"""
THERE_AND_BACK = ("zbv", "dualpipev")
"""schedules whose first process holds the last stage too"""
SPLIT_BACKWARD = ("interleaved_zb", "zbv", "dualpipev")
"""schedules that compute gradients of activations first and those of weights when there is time"""
_LOOKUP = 0.01
"""work of embedding tokens beside that of the head: measured at 0.005 to 0.010, forward and backward"""


def num_stages(pipeline: int, schedule: str) -> int:
    return pipeline * (2 if schedule in TWICE else 1)


def process_of(stage: int, pipeline: int, schedule: str) -> int:
    """The place in the pipeline of the process that holds a stage."""
    if schedule in THERE_AND_BACK and stage >= pipeline:
        return 2 * pipeline - 1 - stage
    return stage % pipeline


def stages_of(num_layers: int, pipeline: int, schedule: str, *, head: float = 0.0) -> tuple[range, ...]:
    """The layers of each stage, in order: at least one each, the most loaded stage as light as can be.

    `head` is the work of the head in layers (`head_work`); the look-up of embeddings is a hundredth of it. Of equal
    cuts the one with fewer layers in front: the first stages hold most activations at a time.
    """
    stages = num_stages(pipeline, schedule)
    assert num_layers >= stages, "why_not_pipeline refuses it"
    load, counts = [1.0] * stages, [1] * stages
    load[0] += _LOOKUP * head
    load[-1] += head
    for _ in range(num_layers - stages):
        lightest = min(reversed(range(stages)), key=load.__getitem__)
        load[lightest] += 1
        counts[lightest] += 1
    starts = [sum(counts[:stage]) for stage in range(stages + 1)]
    return tuple(range(start, end) for start, end in itertools.pairwise(starts))


def head_work(config: Any) -> float:
    """Work of the head in layers (the average one): their products are as the weights that a token meets there."""
    from dougong.models import count

    section = config.decoder()
    head = section.vocab_size * section.dim
    return head * section.num_layers / (count.parameters(config)["matrices"] - head)


def why_not_pipeline(config: Any, layout: LayoutConfig, micro_batches: int, *, compile: bool = False,
                     checkpoint_activations: str = "none") -> str | None:
    """Why a model of this config cannot be trained so, with the nearest that works; None where it can.

    `micro_batches` is their number in a step of one process.
    """
    if layout.pipeline == 1:
        return None
    schedule, stages = layout.schedule, num_stages(layout.pipeline, layout.schedule)
    if not hasattr(config, "decoder"):
        return (f"layout.pipeline={layout.pipeline} divides the layers of a decoder, and a {config.kind} model has no "
                "such layers. Try layout.replicate instead.")
    layers = config.decoder().num_layers or 0
    if layers < stages:
        return f"{_layers(layers, layout, stages)}\n{_fewer_stages(layers, layout)}"
    if fitting := _nearest_micro_batches(micro_batches, layout):
        return (f"layout.schedule={schedule} over {layout.pipeline} processes does not work with {micro_batches} "
                f"micro-batches in a step. Set train.micro_rows so that there are {fitting}, or layout.schedule=gpipe, "
                "which takes any number.")
    if schedule in SPLIT_BACKWARD and (compile or checkpoint_activations == "selective"):
        what, other = ("a compiled layer", "runtime.compile=false") if compile else (
            "selective checkpointing", "train.gradient_checkpointing=true")
        return (f"layout.schedule={schedule} computes each backward in two parts, which {what} does not allow. "
                f"Try layout.schedule=interleaved, or {other}.")
    if schedule in THERE_AND_BACK and config.decoder().tied and layout.processes > layout.pipeline:
        return (f"layout.schedule={schedule} holds the first and the last stage on one process, where a tied embedding "
                "cannot be divided for both. Try layout.schedule=interleaved_zb, or model.tied=false.")
    return None


def _layers(layers: int, layout: LayoutConfig, stages: int) -> str:
    twice = ", two for each process," if layout.schedule in TWICE else ""
    return (f"layout.pipeline={layout.pipeline} with layout.schedule={layout.schedule} cuts the model into {stages} "
            f"stages{twice} of at least one layer, and it has {layers}.")


def _fewer_stages(layers: int, layout: LayoutConfig) -> str:
    if layout.schedule in TWICE and layers >= layout.pipeline:
        return f"Try layout.schedule=1f1b, or layout.pipeline={max(1, layers // 2)}."
    fewer = next(size for size in range(min(layers, layout.pipeline), 0, -1) if layout.pipeline % size == 0)
    return f"Try layout.pipeline={fewer}, or a model of more layers."


def _nearest_micro_batches(given: int, layout: LayoutConfig) -> str | None:
    """Numbers of micro-batches that work, in words, where the given one does not."""
    size, schedule = layout.pipeline, layout.schedule
    least = {"1f1b": size, "dualpipev": 2 * size}.get(schedule, 1)
    if given < least:
        return f"{least} or more"
    if schedule in ("interleaved", "interleaved_zb") and given % max(1, given // size):
        return f"{given // size * size} or {(given // size + 1) * size}"
    return None
