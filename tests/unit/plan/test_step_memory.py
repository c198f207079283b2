"""Memory of one step, planned without numbers, against what the allocator gives out in real steps."""

import sys
from pathlib import Path

import pytest

from dougong.adapt.lora import LoRAConfig
from dougong.core.config import replace
from dougong.models.families.gpt2 import GPT2Config
from dougong.models.families.llama import LlamaConfig
from dougong.models.families.nano import NanoConfig
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim import OPTIMIZERS
from dougong.plan.step import Step, count_step, step_memory

sys.path.insert(0, str(Path(__file__).parent))

from measured_memory import measured_peak

LLAMA = LlamaConfig(vocab_size=1024, context=128, dim=128, num_layers=6, num_heads=4, num_kv_heads=2, ffn_dim=320)
NANO = NanoConfig(vocab_size=1024, context=128, dim=64, num_layers=6, num_heads=2, ffn_dim=256)
GPT2 = GPT2Config(vocab_size=512, context=128, dim=64, num_layers=3, num_heads=2)


@pytest.mark.parametrize("model", [LLAMA, NANO, GPT2], ids=lambda model: model.kind)
@pytest.mark.parametrize(("precision", "checkpoint", "optimizer", "micro_batches"), [
    ("fp32", "none", "adamw", 1), ("bf16", "none", "muon", 2), ("fp32", "full", "adamw", 2),
    ("bf16", "selective", "sgd", 1)])
def test_planned_memory_is_within_a_tenth_of_the_measured_peak(model, precision, checkpoint, optimizer, micro_batches):
    step = Step(model, CausalLMConfig(), OPTIMIZERS[optimizer](), micro_rows=2, micro_batches=micro_batches,
                precision=precision, checkpoint=checkpoint)
    planned, measured = step_memory(step).peak_bytes, measured_peak(step)
    assert 0.9 < planned / measured < 1.1


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=lambda model: model.kind)
@pytest.mark.parametrize(("kind", "base", "precision", "checkpoint", "micro_batches"), [
    ("lora", "float", "fp32", "none", 1), ("lora", "float", "bf16", "none", 2),
    ("lora", "float", "bf16", "selective", 1), ("dora", "float", "fp32", "full", 1),
    ("lora", "int8", "fp32", "none", 1), ("lora", "int4", "fp32", "full", 2)])
def test_memory_planned_with_an_adapter_is_within_a_tenth_of_the_measured_peak(model, kind, base, precision, checkpoint,
                                                                               micro_batches):
    step = Step(model, CausalLMConfig(), OPTIMIZERS["adamw"](), micro_rows=2, micro_batches=micro_batches,
                precision=precision, checkpoint=checkpoint, adapt=LoRAConfig(kind=kind, base=base, rank=8))
    planned, measured = step_memory(step).peak_bytes, measured_peak(step)
    assert 0.9 < planned / measured < 1.1


def test_an_adapter_needs_less_of_everything_but_activations():
    whole = step_memory(Step(LLAMA, CausalLMConfig(), OPTIMIZERS["adamw"](), micro_rows=2)).kinds
    adapted, integers = (step_memory(Step(LLAMA, CausalLMConfig(), OPTIMIZERS["adamw"](), micro_rows=2,
                                          adapt=LoRAConfig(rank=8, base=base))).kinds for base in ("float", "int4"))
    assert adapted["optimizer"] < whole["optimizer"] / 5
    assert integers["weights"] < adapted["weights"] / 2


def test_a_deep_model_is_planned_from_two_shallow_ones():
    step = Step(replace(LLAMA, num_layers=12), CausalLMConfig(), OPTIMIZERS["adamw"](), micro_rows=2)
    whole = count_step(step)
    assert step_memory(step).peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-3)


def test_kinds_add_up_and_are_those_that_a_reader_can_count():
    step = Step(LLAMA, CausalLMConfig(), OPTIMIZERS["adamw"](), micro_rows=2, micro_batches=2)
    memory = step_memory(step)
    parameters = sum(p.numel() for p in LLAMA.build().parameters())
    assert memory.kinds["weights"] == 4 * parameters
    assert memory.kinds["optimizer"] == pytest.approx(8 * parameters, rel=1e-3)
    assert memory.kinds["gradients"] == 4 * parameters      # all there while the second micro-batch goes forward
    assert sum(memory.kinds.values()) == memory.peak_bytes
