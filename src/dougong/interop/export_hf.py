"""A directory that transformers loads with no code of ours: config, safetensors, tokenizer, generation settings, card.

Keys of two generations stand side by side (`dtype` and `torch_dtype`, `rope_parameters` and `rope_theta`, the chat
template as a file and inline), because readers of both are in use.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dougong.core.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from dougong.core.files import write_json, write_text
from dougong.data.chat_template import ChatTemplate
from dougong.data.tokenizer import Tokenizer
from dougong.interop.maps.family_map import FamilyMap
from dougong.interop.tensor_files import SHARD_BYTES, write_shards
from dougong.interop.verify import UNUSUAL, Mismatch, Verified, compare_ids, compare_logits, readable, rows_of
from dougong.train.shadow import tracked
from dougong.train.state import load_weights

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_LONG_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def write_hf(directory: Path, family: FamilyMap, config: Any, state: Mapping[str, Tensor], tokenizer: Tokenizer, *,
             dtype: str = "f32", card: str = "", shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Writes everything into an existing directory; returns the names of the weight files.

    Raises ConfigError for values that the type cannot hold.
    """
    tensors = family.tensors_to_hf(config, rounded(state, dtype))
    names = write_shards(directory, tensors, shard_bytes=shard_bytes)
    write_beside(directory, family.config_to_hf(config), tokenizer, dtype=dtype, context=config.context, card=card)
    return names


def write_beside(directory: Path, config: Mapping[str, Any], tokenizer: Tokenizer, *, dtype: str, context: int,
                 card: str) -> None:
    """What lies beside the weights: config, generation settings, tokenizer and card."""
    ids = special_ids(tokenizer)
    write_json(directory / "config.json", {
        **config, **ids, "dtype": _LONG_NAMES[dtype], "torch_dtype": _LONG_NAMES[dtype], "use_cache": True})
    write_json(directory / "generation_config.json", {
        **ids, **reply_ends(tokenizer), "do_sample": True, "temperature": 0.8, "top_p": 0.95})
    _write_tokenizer(directory, tokenizer, context)
    write_text(directory / "README.md", card)


def rounded(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The weights as they will be stored. Raises ConfigError naming one that leaves the type's range."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known. Known: {', '.join(DTYPES)}.")
    found = {}
    for name, tensor in state.items():
        found[name] = tensor.detach().to("cpu", DTYPES[dtype])
        if not bool(torch.isfinite(found[name]).all()):
            if bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"{name} holds {tensor.abs().max().item():.3g}, beyond the range of {dtype} "
                                  f"({torch.finfo(DTYPES[dtype]).max:.3g}). Try --dtype bf16.")
            raise CheckpointError(f"{name} holds values that are no numbers (NaN or infinity): this training failed. "
                                  "Export an earlier checkpoint with --checkpoint.")
    return found


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Which tokens begin and end a text; none where the data were one stream."""
    ids = {"bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.document_id}
    return {name: token for name, token in ids.items() if token is not None}


def reply_ends(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """What ends a text and a reply, for whoever writes with a model that converses; nothing for others."""
    ends = ChatTemplate(tokenizer).stop_ids - {tokenizer.document_id} if tokenizer.chat_template else ()
    own = [] if tokenizer.document_id is None else [tokenizer.document_id]
    return {"eos_token_id": [*own, *sorted(ends)]} if ends else {}


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, context: int) -> None:
    tokenizer.save(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_bytes()) | {"model_max_length": context}
    # else transformers 4 makes token types too, which its GPT-2 refuses to generate with
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if tokenizer.begin_id is not None:
        settings["bos_token"] = tokenizer.backend.id_to_token(tokenizer.begin_id)
    settings.pop("chat_template", None)
    if tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template
        write_text(directory / "chat_template.jinja", tokenizer.chat_template)
    write_json(path, settings)


def verify_hf(directory: Path, model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], *, dtype: str) -> Verified:
    """Loads the directory with transformers and compares. `model` is the run's. Raises Mismatch, or MissingExtraError
    without transformers."""
    transformers = transformers_package()
    texts = without_special_tokens([*texts, *UNUSUAL], tokenizer)
    with readable("transformers"):
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
    compare_ids(texts, tokenizer.encode, lambda text: theirs(text, add_special_tokens=False)["input_ids"],
                "transformers")
    _compare_special(theirs, tokenizer, transformers.GenerationConfig.from_pretrained(directory))
    _compare_chat(theirs, tokenizer)
    with readable("transformers"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = with_weights(model, rounded(tracked(model), dtype))
    rows = rows_of(tokenizer.encode_batch(list(texts), threads=1), first=tokenizer.begin_id,
                   context=context_of(ours))
    return compare_logits(ours, loaded, rows, "transformers", texts=len(texts), layers=_layers(loaded))


def without_special_tokens(texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Texts that do not spell a special token: other programs make the token of it, dougong never does. Of texts that a
    vocabulary of characters cannot spell, none."""
    fitting = []
    for text in texts:
        if any(name in text for name in tokenizer.special_tokens):
            continue
        try:
            tokenizer.encode(text)
        except DataError:
            continue
        fitting.append(text)
    return fitting


def with_weights(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A float32 copy of a model, on the CPU, that computes with these weights."""
    config: Any = model.config
    with torch.device("meta"):
        other = config.build()
    other = other.to_empty(device="cpu")
    other.initialise(0)         # what is no parameter, such as tables of positions
    load_weights(other, {name: tensor.float() for name, tensor in state.items()})
    return other.eval()


def context_of(model: Any) -> int:
    """Tokens that a model was made to read."""
    return model.config.context


def _compare_special(theirs: Any, tokenizer: Tokenizer, generation: Any) -> None:
    ends = reply_ends(tokenizer).get("eos_token_id", tokenizer.document_id)
    for name, found, ours in (("the tokenizer's end", theirs.eos_token_id, tokenizer.document_id),
                              ("generation_config", generation.eos_token_id, ends)):
        if found != ours:
            raise Mismatch(f"{name} is token {found} in transformers; the run's documents end with {ours}.")


def _compare_chat(theirs: Any, tokenizer: Tokenizer) -> None:
    """Rendered by transformers and by jinja2 alone, set up as the published templates expect."""
    template = tokenizer.chat_template
    if template != theirs.chat_template:
        raise Mismatch("the chat template that transformers reads is not the run's.")
    if not template:
        return
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])

    def fail(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = fail
    turns = [{"role": "user", "content": "你好 <b>"}, {"role": "assistant", "content": "Hello!"},
             {"role": "user", "content": "2 + 2?"}]
    names = {key: value for key, value in theirs.special_tokens_map.items() if isinstance(value, str)}
    ours = environment.from_string(template).render(messages=turns, add_generation_prompt=True, **names)
    other = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if ours != other:
        raise Mismatch(f"transformers renders a chat as {other[:200]!r}, the run's template as {ours[:200]!r}.")


def _layers(loaded: Any) -> Any:
    """Hidden states of a transformers model under the names of `verify.hidden_states`."""
    def read(tokens: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            output = loaded(tokens, output_hidden_states=True)
        *inner, last = output.hidden_states
        names = ["the embedding", *(f"layer {i}" for i in range(len(inner) - 1))]
        return dict(zip(names, inner)) | {"the final norm": last, "the head": output.logits}

    return read


def transformers_package() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "hf", "Reading the export back with transformers (or --no-verify)"
                                ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
