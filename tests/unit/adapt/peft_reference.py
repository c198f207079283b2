"""The same model with the same adapter twice: in transformers with PEFT, and ours. Random weights, float64."""

import torch
import transformers
from peft import LoraConfig, get_peft_model

from dougong.interop.maps import MAPS

transformers.logging.set_verbosity_error()
V, T = 61, 24
HF = {
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True, attention_dropout=0.0,
        pad_token_id=None, bos_token_id=None, eos_token_id=None)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=64, n_embd=32, n_layer=3, n_head=4, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None)),
}
TARGETS = {"qwen3": "all-linear", "llama": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"]}


def random_hf(family):
    """Weights wide enough that every part matters."""
    torch.manual_seed(3)
    model = HF[family]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.1))
    return exact(model)


def exact(model):
    """transformers computes norms in float32 whatever the model's type: here in the model's own."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: m.weight * x * (x.square().mean(-1, keepdim=True)
                                                                 + m.variance_epsilon).rsqrt()
    return model


def with_peft(family, kind, rank=4, alpha=12):
    """transformers with a PEFT adapter whose B is not zero; in evaluation mode."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[family], use_dora=kind == "dora",
                        fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")
    model = get_peft_model(random_hf(family), config).double()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                p.add_(torch.randn(p.shape, generator=draw, dtype=p.dtype) * 0.1)
    return model


def ours_like(family):
    """(config, our model) with the weights of `random_hf`."""
    theirs = random_hf(family)
    config = MAPS[family].config_from_hf(theirs.config.to_dict())
    model = config.build().double()
    model.compute_dtype = torch.float64
    model.initialise(0)
    model.load_state_dict(MAPS[family].tensors_from_hf(config, dict(theirs.state_dict())), strict=False)
    return config, model


def tokens(rows=3):
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(9))
