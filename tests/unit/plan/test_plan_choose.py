"""The ranking of layouts, its machines, and the pipeline's bubble."""

from types import SimpleNamespace

import pytest
import torch

from dougong.adapt.lora import LoRAConfig
from dougong.core.config import replace
from dougong.core.errors import ConfigError
from dougong.models.families.llama import LlamaConfig
from dougong.models.families.qwen3_moe import Qwen3MoEConfig
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim import OPTIMIZERS
from dougong.parallel.pipeline import split
from dougong.plan import choose, choose_layout
from dougong.plan.choose import nothing_fits, rank
from dougong.plan.counts import Counts
from dougong.plan.machine import KINDS, here, known_gpu, load_machine, machine
from dougong.plan.memory import heaviest, held_parameters, kept_per_row, parts
from dougong.plan.option import bill, evaluate
from dougong.plan.schedule import SCHEDULES, pipeline
from dougong.plan.work import Work
from dougong.runtime.layout import LayoutConfig

SMALL = LlamaConfig(vocab_size=1024, context=256, dim=256, num_layers=4, num_heads=4, num_kv_heads=4, ffn_dim=768)
BIG = LlamaConfig(vocab_size=32_000, context=1024, dim=8192, num_layers=80, num_heads=64, num_kv_heads=8,
                  ffn_dim=28_672)
EIGHT_B = LlamaConfig(vocab_size=128_256, context=8192, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8,
                      ffn_dim=14_336)


def work(model=SMALL, rows=64, **given):
    return Work(model=model, objective=CausalLMConfig(), optim=OPTIMIZERS["adamw"](), rows=rows, context=model.context,
                steps=100, **given)


def test_what_fits_one_device_is_only_copied():
    best = rank(work(), machine("h200"), 8).best[0]
    assert best.layout.on(8) == LayoutConfig(replicate=8) and best.fits


def test_what_does_not_fit_one_device_is_divided():
    ranking = rank(work(EIGHT_B, rows=64), machine("h100"), 8, keep=3)
    divided = [option.layout.size("shard", "tensor", "pipeline", "context") for option in ranking.best]
    assert all(option.fits for option in ranking.best) and min(divided) > 1
    copies = next(o for o in ranking.others if o.layout.size("replicate") == 8)
    assert not copies.fits and "does not fit" in copies.reason
    speeds = [option.tokens_per_s for option in ranking.best]
    assert speeds[0] >= 0.97 * max(speeds)


def test_experts_are_divided_where_they_do_not_fit_and_never_beside_tensor():
    mixture = Qwen3MoEConfig(vocab_size=32_000, context=2048, dim=2048, num_layers=8, num_heads=16, num_kv_heads=4,
                             head_dim=128, num_experts=64, top_k=2, ffn_dim=1024)
    ranking = rank(work(mixture, rows=64), machine("h100"), 8, keep=10)
    tried = [option.layout for option in [*ranking.best, *ranking.others]]
    assert all(layout.tensor == 1 for layout in tried) and {layout.expert for layout in tried} > {1}
    option = next(o for o in ranking.best if o.layout.expert > 1)
    assert f"experts in {option.layout.expert} places" in option.reason and option.refused is None
    sent = next(t for t in option.traffic if t.axis == "expert" and "experts" in t.what)
    rows = 2048 * 2 * option.micro_rows * option.micro_batches         # tokens that a process sends, twice each way
    share, passes = 1 - 1 / option.layout.expert, 3 if option.checkpoint == "full" else 2
    assert sent.bytes == pytest.approx(2 * passes * rows * 2048 * 2 * 8 * share) and not sent.hidden
    assert not any(o.layout.expert > 1 for o in rank(work(), machine("h100"), 8).others)


def test_refusals_are_those_of_the_rooms_below():
    odd = LlamaConfig(vocab_size=1000, context=256, dim=240, num_layers=4, num_heads=3, num_kv_heads=3, ffn_dim=768)
    ranking = rank(work(odd), machine("h200"), 2)
    tensor = next(o for o in ranking.others if o.layout.tensor == 2 and o.layout.processes == 2)
    assert tensor.refused and "num_heads=3" in tensor.refused


def test_nothing_fits_says_how_many_would():
    ranking = rank(work(BIG, rows=64), machine("rtx3090"), 2)
    assert ranking.chosen is None
    text = nothing_fits(work(BIG, rows=64), machine("rtx3090"), 2, ranking)
    number = int(text.split("that fits is ")[1].split()[0])
    assert 2 < number <= 256 and rank(work(BIG, rows=max(64, number)), machine("rtx3090"), number).chosen


@pytest.fixture
def no_number_fits(monkeypatch):
    """Seconds are spent on looking for one up to 65,536."""
    monkeypatch.setattr(choose, "fewest_devices", lambda *_: None)


@pytest.mark.usefixtures("no_number_fits")
@pytest.mark.parametrize(("devices", "base", "advised"), [
    (1, "float", True), (2, "float", False), (1, "int4", False), (2, "int4", False)])
def test_integers_are_advised_where_they_would_be_new_and_can_be_trained(devices, base, advised):
    job = work(BIG, rows=64, adapt=LoRAConfig(rank=8, base=base))
    small = replace(machine("rtx3090"), memory_bytes=2**30)
    advice = nothing_fits(job, small, devices, rank(job, small, devices)).splitlines()[-1]
    assert ("adapt.base=int4" in advice) == advised and "train.rows" not in advice


@pytest.mark.usefixtures("no_number_fits")
@pytest.mark.parametrize(("devices", "begun", "words"), [
    (1, True, "or adapt=lora adapt.rank=16 (adapt.base=int4)"), (2, True, "or adapt=lora adapt.rank=16."),
    (2, False, None)])
def test_where_a_whole_model_that_exists_does_not_fit_adapters_are_named(devices, begun, words):
    job, small = work(BIG, rows=64, begun=begun), replace(machine("rtx3090"), memory_bytes=2**30)
    text = nothing_fits(job, small, devices, rank(job, small, devices))
    assert (words in text) if words else "adapt" not in text


@pytest.mark.usefixtures("no_number_fits")
@pytest.mark.parametrize(("changes", "checkpoint", "advised"), [
    (True, "none", False), (False, "none", True), (False, "full", False)])
def test_checkpointing_is_advised_only_where_it_was_not_tried(changes, checkpoint, advised):
    job, small = work(BIG, rows=64, checkpoint=checkpoint), machine("rtx3090")
    text = nothing_fits(job, small, 1, rank(job, small, 1, changes=changes))
    assert ("train.gradient_checkpointing=true" in text.splitlines()[-1]) == advised


@pytest.mark.usefixtures("no_number_fits")
def test_a_shorter_row_is_asked_for_where_rows_are_set():
    job, small = work(BIG, rows=64), machine("rtx3090")
    ranking = rank(job, small, 1)
    for setting in ("model.context", "data.row_tokens"):
        assert f"({setting})" in nothing_fits(replace(job, row_setting=setting), small, 1, ranking)


def test_auto_layout_is_quick_and_fits_the_processes(monkeypatch):
    small = machine("h200")
    monkeypatch.setattr(choose, "here", lambda: small)
    tried = []
    monkeypatch.setattr(choose, "evaluate", lambda *given, **more: tried.append(given) or evaluate(*given, **more))
    for processes in (1, 2, 4, 8):
        layout, reason = choose_layout(work(rows=16, device="cpu", precision="fp32"), processes)
        assert layout.on(processes).processes == processes and reason
    assert len(tried) == 3      # copies have room: nothing else is worked out


def test_auto_copies_what_has_room_and_divides_what_has_none(monkeypatch):
    monkeypatch.setattr(choose, "here", lambda: machine("h200"))
    small, reason = choose_layout(work(rows=16), 8)
    assert small == LayoutConfig(replicate=8) and "room for the whole model" in reason
    large, _ = choose_layout(work(EIGHT_B, rows=16), 8)
    assert large.size("shard", "tensor", "pipeline") > 1


def test_auto_leaves_out_what_the_recipe_says_no_to(monkeypatch):
    monkeypatch.setattr(choose, "here", lambda: replace(machine("h200"), memory_bytes=32 * 2**30))
    job = work(EIGHT_B, rows=16)
    layout, _ = choose_layout(job, 16)
    assert layout.context > 1, "or this shows nothing"
    other, _ = choose_layout(job, 16, why_not=lambda one: "no" if one.context > 1 else None)
    assert other.context == 1 and other.processes == 16
    adapted, reason = choose_layout(replace(job, adapt=LoRAConfig(), context=64), 16)
    assert adapted == LayoutConfig(replicate=16), reason


def test_auto_names_what_would_do_where_nothing_fits(monkeypatch):
    monkeypatch.setattr(choose, "here", lambda: machine("rtx3090"))
    with pytest.raises(ConfigError, match="no layout of 2 processes fits") as refused:
        choose_layout(work(BIG, rows=16, begun=True), 2)
    assert "The smallest number of" in str(refused.value) and "adapt=lora" in str(refused.value)


def test_figures_follow_the_machine():
    one = rank(work(), machine("h200"), 1).best[0]
    assert one.seconds["compute"] == pytest.approx(
        work().tokens_per_step * rank_flops() / (KINDS["h200"].peak_bf16_flops * KINDS["h200"].efficiency))
    from dougong.core.config import replace

    priced = bill(one, work(), replace(machine("h200"), price_per_hour=2.0))
    assert priced["cost"] == pytest.approx(2.0 * 24 * priced["days"])
    assert bill(one, work(), machine("h200"))["cost"] is None


def rank_flops():
    from dougong.models import count

    return count.flops_per_token(SMALL, SMALL.context)


@pytest.mark.parametrize(("schedule", "theory"), [
    ("gpipe", 7 / 23), ("1f1b", 7 / 23), ("interleaved", 7 / 39), ("looped_bfs", 7 / 39)])
def test_bubbles_are_those_of_theory(schedule, theory):
    """(p - 1) / (v m + p - 1): p = 8 processes, m = 16 micro-batches, v stages each (arXiv:2104.04473, section 2.2)."""
    assert pipeline(schedule, 8, 16).bubble == pytest.approx(theory)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_long_steps_repeat_what_short_ones_do(schedule, monkeypatch):
    from dougong.plan import schedule as module

    short = pipeline(schedule, 4, 32)
    monkeypatch.setattr(module, "_STEADY", 100)
    whole = module.pipeline.__wrapped__(schedule, 4, 32)
    assert short.bubble == pytest.approx(whole.bubble) and short.in_flight == whole.in_flight


def test_1f1b_holds_fewer_micro_batches_at_later_stages():
    assert pipeline("1f1b", 4, 8).in_flight == (((4,),), ((3,),), ((2,),), ((1,),))
    assert pipeline("gpipe", 4, 8).in_flight == (((8,),),) * 4
    assert pipeline("looped_bfs", 2, 4).in_flight == (((4, 4),),) * 2
    assert pipeline("interleaved", 2, 8).in_flight[0] == ((4, 1), (3, 2)), "the first stage's and the second's"
    assert pipeline("zbv", 8, 16).bubble < pipeline("1f1b", 8, 16).bubble / 3


WIDE = LlamaConfig(vocab_size=131_072, context=2048, dim=2048, num_layers=16, num_heads=16, num_kv_heads=16,
                   ffn_dim=8192)
CUTS = [(2, "1f1b", [10, 6]), (4, "1f1b", [5, 5, 5, 1]), (2, "interleaved", [10, 6]), (4, "interleaved", None),
        (2, "zbv", None), (4, "dualpipev", None)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("size", "schedule", "layers"), CUTS)
def test_a_planned_process_holds_the_layers_and_weights_that_training_gives_it(size, schedule, layers, tied):
    model = replace(WIDE, tied=tied)
    layout, counts = LayoutConfig(replicate=1, pipeline=size, schedule=schedule), Counts(work(model).step())
    planned, held = parts(counts, layout), []
    for part in planned:
        with torch.device("meta"):
            whole = model.build()
        stages = split(whole, SimpleNamespace(layout=layout, rank=lambda axis, part=part: part.process),
                       micro_batches=4 * size)
        assert part.stages == tuple(len(stage.layers) for stage in stages)
        assert part.first == (stages[0].index == 0) and part.last == stages[-1].last
        held.append(len(whole.stack))
        assert held_parameters(counts, layout, part) == pytest.approx(sum(p.numel() for p in whole.parameters()))
    assert [part.layers for part in planned] == held and (layers is None or held == layers)


@pytest.mark.parametrize(("size", "schedule", "most"), [(2, "1f1b", 10), (4, "1f1b", 5), (2, "interleaved", 10)])
def test_memory_is_that_of_the_process_that_holds_most_and_time_that_of_the_busiest(size, schedule, most):
    layout, counts = LayoutConfig(replicate=1, pipeline=size, schedule=schedule), Counts(work(WIDE).step())
    held = heaviest(counts, layout, "none", 1, 8, gpu=False)
    assert held.part.process == 0 and held.part.layers == most
    table = WIDE.vocab_size * WIDE.dim
    assert held.kinds["weights"] == pytest.approx(4 * (most * counts.layer_parameters + table))
    head = table / counts.layer_parameters
    loads = [part.layers + head * part.last for part in parts(counts, layout)]
    one = evaluate(work(WIDE), counts, LayoutConfig(replicate=1), machine("h200"), checkpoint="none", micro_rows=1)
    both = evaluate(work(WIDE), counts, layout, machine("h200"), checkpoint="none", micro_rows=1)
    ratio = both.seconds["compute"] * size / one.seconds["compute"]
    assert ratio == pytest.approx(max(loads) * size / sum(loads), rel=0.01)
    assert ratio < 1.17, "the cut weighs the head"


def test_of_two_stages_each_counts_with_its_own_layers_in_flight():
    layout, counts = LayoutConfig(replicate=1, pipeline=4, schedule="zbv"), Counts(work(WIDE).step())
    held = heaviest(counts, layout, "none", 1, 8, gpu=False)
    assert (held.part.stages, held.in_flight) == ((2, 1), (7, 1))
    line, one = kept_per_row(counts, layout, "none"), held.kinds["activations"]
    assert one - counts.ends_kept().per_row == pytest.approx(15 * (line.fixed + line.per_row))


def test_a_pipelines_stages_keep_gathered_weights_for_the_step_whatever_is_asked():
    counts = Counts(work(EIGHT_B).step())
    by_layer, step = (heaviest(counts, LayoutConfig(replicate=1, pipeline=2, shard=4, gathered=gathered), "full", 1, 8,
                               gpu=False).kinds for gathered in ("layer", "step"))
    assert by_layer == step


def test_an_unknown_gpu_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"h200(.|\n)*--machine FILE\.yaml.*`like: h100`.*memory_bytes"):
        machine("h2000")
    assert machine("A100") is KINDS["a100-80"]


def test_a_machine_of_your_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("like: h100\nhost_devices: 4\nefficiency: 0.3\n")
    mine = load_machine(file)
    assert (mine.name, mine.host_devices, mine.efficiency, mine.watts) == ("mine", 4, 0.3, KINDS["h100"].watts)
    assert mine.link(4) == KINDS["h100"].host_link_bytes_per_s and mine.link(8) == KINDS["h100"].network_bytes_per_s
    file.write_text("like: h100\nhost_device: 4\n")
    with pytest.raises(ConfigError, match="host_devices"):
        load_machine(file)
    file.write_bytes("like: h100  # größer\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_machine(file)
    file.write_text("like: h100\nwatts: 300\nwatts: 700\n")
    with pytest.raises(ConfigError, match="line 3: the key 'watts' stands here again, first in line 2"):
        load_machine(file)


@pytest.mark.parametrize("title, memory_gib, kind", [
    ("NVIDIA H200", 139.8, "h200"), ("NVIDIA H100 80GB HBM3", 79.1, "h100"), ("NVIDIA L4", 22, "l4"),
    ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"), ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80"),
    ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"), ("NVIDIA L40S", 44.4, None), ("NVIDIA GH200 480GB", 94.5, None),
    ("NVIDIA H100 PCIe", 79.1, None), ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None)])
def test_a_gpu_is_known_by_its_name_and_not_by_a_part_of_another(title, memory_gib, kind):
    found = known_gpu(title, memory_gib * 2**30)
    assert (found and found.name) == kind


def test_this_machine_is_measured():
    assert here().peak_fp32_flops > 1e8 and here().memory_bytes > 1e8 and here() is here()
