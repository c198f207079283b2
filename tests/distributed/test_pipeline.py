"""Pipelines compute what one process computes: every schedule, tied ends, streams that carry more than x."""

import itertools

import matrix
import pytest
import torch
from matrix import CPU, Case, check, decoder, divided, reference
from processes import run_processes
from torch import nn
from torch.distributed.tensor import DTensor

from dougong.core.errors import ConfigError
from dougong.nn.moe import MoEConfig
from dougong.nn.position import LearnedConfig
from dougong.nn.residual import X0ResidualConfig
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import AdamWConfig
from dougong.parallel import pipeline as pipeline_module
from dougong.parallel.stages import TWICE, num_stages, process_of, stages_of, why_not_pipeline
from dougong.runtime.device import Runtime
from dougong.runtime.layout import LayoutConfig

SCHEDULES = ("gpipe", "1f1b", "interleaved", "looped_bfs", "interleaved_zb", "zbv", "dualpipev")

TIED = Case(model=decoder(num_layers=4, embedding_norm=True), packed=True, micro_batches=4)
RICH = Case(model=decoder(num_layers=5, tied=False, residual=X0ResidualConfig(), value_embeddings="all", window=5,
                          window_pattern="SSSL", position=LearnedConfig(), soft_cap=20.0, dropout=0.0),
            objective=CausalLMConfig(z_loss=1e-3), micro_batches=4, seed=1)
UNEVEN = Case(model=decoder(num_layers=2), rows=7, micro_batches=3)     # 2 + 2 + 2 + 1 rows
SHALLOW = Case(model=decoder(num_layers=3), micro_batches=4, steps=3)
ROUTED = Case(model=decoder(num_layers=4, tied=False, feed_forward=MoEConfig(num_experts=8, top_k=2, ffn_dim=16)),
              micro_batches=2, steps=3)
PATTERNS = Case(model=decoder(num_layers=2, tied=False), micro_batches=2,     # parameters of one stage only
                optimizer=AdamWConfig(lr=1e-2, eps=1e-3, rates={"head.*": 0.5}, no_decay=("stack.0.*",)))
DEEP = Case(model=decoder(num_layers=9), micro_batches=8)


@pytest.fixture(scope="module")
def compare():
    known = {}

    def against_one_process(case, layout, work=divided):
        if id(case) not in known:
            known[id(case)] = reference(case)
        traces = run_processes(layout.processes, work, case, layout)
        check(known[id(case)], traces)
        return traces
    return against_one_process


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", [TIED, RICH], ids=["tied", "x0 and values"])
def test_every_schedule(compare, case, schedule):
    compare(case, LayoutConfig(pipeline=2, replicate=1, schedule=schedule))


@pytest.mark.parametrize(("case", "layout"), [
    (UNEVEN, LayoutConfig(pipeline=2)),
    (DEEP, LayoutConfig(pipeline=4, schedule="interleaved_zb")),
    (RICH, LayoutConfig(pipeline=2, replicate=2, schedule="dualpipev")),
    (RICH, LayoutConfig(pipeline=2, shard=2, schedule="interleaved_zb")),
    (TIED, LayoutConfig(pipeline=2, shard=2)),
    (TIED, LayoutConfig(pipeline=2, context=2, schedule="looped_bfs")),
    (TIED, LayoutConfig(pipeline=2, shard=2, tensor=2, schedule="interleaved")),
    (ROUTED, LayoutConfig(pipeline=2, schedule="interleaved_zb")),
    (ROUTED, LayoutConfig(pipeline=2, expert=2, schedule="zbv")),
    (PATTERNS, LayoutConfig(pipeline=2)),
    (Case(model=decoder(num_layers=2), micro_batches=2, checkpoint_activations="selective"), LayoutConfig(pipeline=2)),
], ids=lambda value: f"{value}, {value.schedule}" if isinstance(value, LayoutConfig) else "")
def test_with_other_axes(compare, case, layout):
    compare(case, layout)


def test_both_copies_of_a_tied_embedding_stay_bit_equal(compare):
    first, middle, last = compare(SHALLOW, LayoutConfig(pipeline=3))
    name = "stem.tokens.weight"
    for a, b, c in zip(first, middle, last):
        assert torch.equal(a.weights[name], c.weights[name]) and torch.equal(a.gradients[name], c.gradients[name])
        assert name not in b.weights


def test_the_matrix_sees_when_the_ends_do_not_sum(compare, monkeypatch):
    monkeypatch.setattr(pipeline_module, "_add_the_others", lambda *_: None)
    with pytest.raises(AssertionError, match=r"gradient of stem\.tokens\.weight"):
        compare(TIED, LayoutConfig(pipeline=2))


def _owners(layout):
    with torch.device("meta"):
        model = decoder(num_layers=4).build()
    mesh = Runtime.start(CPU, layout).mesh
    pipeline_module.split(model, mesh, micro_batches=4)
    return {name: pipeline_module.owned(model, mesh, name) for name, _ in model.named_parameters()}


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_each_parameter_has_one_owner_and_its_usual_name(schedule):
    whole = {name for name, _ in decoder(num_layers=4).build().named_parameters()}
    held = run_processes(2, _owners, LayoutConfig(pipeline=2, schedule=schedule))
    owned = [name for names in held for name, mine in names.items() if mine]
    assert sorted(owned) == sorted(whole)
    assert sum(len(names) for names in held) == len(whole) + (schedule == "1f1b")


def _evaluated(case, layout):
    from dougong.parallel.parallelize import parallelize

    runtime, objective = Runtime.start(CPU, layout), case.objective.build()
    with torch.device("meta"):
        model = case.model.build()
    parallel = parallelize(model, objective, runtime, micro_batches=case.micro_batches)
    model = parallel.model.to_empty(device="cpu").eval()
    model.initialise(case.seed)
    batch = matrix._slice(case.batch(0), runtime.mesh.data_rank, runtime.mesh.data_size)
    found, in_parts = [], []
    for rows in (batch.rows, 3, batch.rows):        # a last batch may be shorter
        losses = parallel.losses(batch.split(rows)[-1])
        found.append([float(losses.sums["model"]), *map(float, losses.metrics.values())])
        in_parts += [isinstance(p, DTensor) for p in model.parameters() if p.ndim]      # nothing stays gathered
        parallel.gradients(model, objective, batch.split(batch.rows // case.micro_batches), 1.0, runtime)
    return found, list(losses.metrics), in_parts


@pytest.mark.parametrize("layout", [LayoutConfig(pipeline=2), LayoutConfig(pipeline=2, shard=2, schedule="interleaved"),
                                    LayoutConfig(pipeline=2, schedule="dualpipev")], ids=lambda v: v.schedule)
def test_evaluation_between_steps(layout):
    case = RICH
    model = case.model.build()
    model.initialise(case.seed)
    results = run_processes(layout.processes, _evaluated, case, layout)
    for index, rows in enumerate((8 // layout.shard, 3, 8 // layout.shard)):
        batches = [part.split(rows)[-1] for part in case.batch(0).split(8 // layout.shard)]
        with torch.no_grad():
            losses = [case.objective.build().losses(model, batch) for batch in batches]
        want = [sum(float(one.sums["model"]) for one in losses),
                *(sum(float(one.metrics[name]) for one in losses) for name in losses[0].metrics)]
        got = [sum(column) for column in zip(*(found[index] for found, _, _ in results))]
        assert got == pytest.approx(want, rel=1e-5)
        assert all(names == list(losses[0].metrics) for _, names, _ in results)
    assert all(in_parts == [layout.shard > 1] * len(in_parts) for _, _, in_parts in results)


def test_stages_are_cut_so_that_the_slowest_is_fastest():
    for layers, pipeline, schedule, head in itertools.product((4, 6, 9), (1, 2), ("1f1b", "zbv"), (0.0, 0.7, 2.5)):
        if layers < (stages := num_stages(pipeline, schedule)):
            continue
        cut = stages_of(layers, pipeline, schedule, head=head)
        assert [i for part in cut for i in part] == list(range(layers)) and all(len(part) for part in cut)

        def slowest(counts, head=head):
            return max(count + (head if i == len(counts) - 1 else 0) + (0.01 * head if i == 0 else 0)
                       for i, count in enumerate(counts))
        every = (counts for counts in itertools.product(range(1, layers + 1), repeat=stages) if sum(counts) == layers)
        assert slowest([len(part) for part in cut]) == pytest.approx(min(map(slowest, every)))


def test_which_process_has_which_stage():
    assert [process_of(stage, 3, "interleaved") for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [process_of(stage, 3, "zbv") for stage in range(6)] == [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize(("layers", "layout", "micro_batches", "more", "words"), [
    (3, LayoutConfig(pipeline=2, schedule="interleaved"), 4, {}, ["4 stages", "has 3", "layout.schedule=1f1b"]),
    (3, LayoutConfig(pipeline=4), 4, {}, ["layout.pipeline=2"]),
    (4, LayoutConfig(pipeline=4), 2, {}, ["2 micro-batches", "4 or more", "gpipe"]),
    (8, LayoutConfig(pipeline=4, schedule="interleaved"), 9, {}, ["8 or 12"]),
    (4, LayoutConfig(pipeline=2, shard=2, replicate=1, schedule="zbv"), 4, {}, ["tied", "interleaved_zb"]),
    (4, LayoutConfig(pipeline=2, schedule="zbv"), 4, {"compile": True}, ["compile=false"]),
    (4, LayoutConfig(pipeline=2, schedule="zbv"), 4, {"checkpoint_activations": "selective"}, ["selective"]),
])
def test_what_does_not_fit_is_refused_with_what_does(layers, layout, micro_batches, more, words):
    reason = why_not_pipeline(decoder(num_layers=layers), layout, micro_batches, **more)
    assert reason and all(word in reason for word in words), reason
    assert why_not_pipeline(decoder(num_layers=8), LayoutConfig(pipeline=2), 4) is None


def test_a_model_without_layers_is_refused():
    from dougong.models import FAMILIES

    assert "decoder" in (why_not_pipeline(FAMILIES["cnn"](), LayoutConfig(pipeline=2), 4) or "")


def _accepted(size):
    """Numbers of micro-batches that PyTorch's schedules take."""
    from torch.distributed import get_rank
    from torch.distributed.pipelining import PipelineStage

    found = {}
    for schedule, number in itertools.product(SCHEDULES, range(1, 10)):
        stages = [PipelineStage(nn.Identity(), stage, num_stages(size, schedule), torch.device("cpu"))
                  for stage in range(num_stages(size, schedule)) if process_of(stage, size, schedule) == get_rank()]
        try:
            pipeline_module._SCHEDULES[schedule](stages if schedule in TWICE else stages[0], number)
            found[schedule, number] = True
        except ValueError:
            found[schedule, number] = False
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_numbers_of_micro_batches_are_refused_where_pytorch_refuses_them(size):
    for (schedule, number), accepted in run_processes(size, _accepted, size)[0].items():
        reason = why_not_pipeline(decoder(num_layers=8), LayoutConfig(pipeline=size, schedule=schedule), number)
        assert (reason is None) == accepted, (schedule, number, reason)


def test_a_refused_layout_raises_before_anything_is_divided():
    def work(layout):
        with torch.device("meta"):
            model = decoder(num_layers=2).build()
        with pytest.raises(ConfigError, match="micro-batches"):
            pipeline_module.split(model, Runtime.start(CPU, layout).mesh, micro_batches=1)
        return len(model.stack)

    assert run_processes(2, work, LayoutConfig(pipeline=2)) == [2, 2]
