"""README.md of an exported model, made from what its run recorded: nothing is claimed that was not measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dougong.interop.hub import HUBS


@dataclass(frozen=True)
class CardFacts:
    """What a card tells. Mappings are events of docs/design/events.md; empty where a run has none."""

    name: str
    architecture: str
    parameters: int
    context: int
    dtype: str
    step: int
    license: str
    version: str
    recipe: str = ""
    """YAML, without the data's place on this machine"""
    data: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    """read in training, repetitions counted"""
    imported_from: str | None = None
    begun_from: str | None = None
    """the model whose weights training began from"""
    begins_with: str | None = None
    """the token that a text is read after"""
    ends_with: str | None = None
    chat: bool = False
    rounding: str = ""
    library: Literal["transformers", "onnx"] = "transformers"
    """what reads it"""


def model_card(facts: CardFacts) -> str:
    """Markdown with the front matter that Hugging Face's hub reads."""
    parts = [_front_matter(facts), f"# {facts.name}", _summary(facts), _use(facts), _data(facts), _figures(facts),
             _limits(facts), _recipe(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: CardFacts) -> str:
    hub, _, named = (facts.begun_from or facts.imported_from or "").partition(":")
    base = named.partition("@")[0] if hub in HUBS else ""
    return (f"---\nlibrary_name: {facts.library}\npipeline_tag: text-generation\nlicense: {facts.license}\n"
            + (f"base_model: {base}\n" if base else "") + "tags:\n- dougong\n---")


def _summary(facts: CardFacts) -> str:
    origin = f"imported from `{facts.imported_from}`" if facts.imported_from else f"trained to step {facts.step:,}"
    if facts.begun_from:
        origin = f"begun from `{facts.begun_from}` and {origin}"
    if facts.tokens:
        origin += f" on {facts.tokens:,} tokens, repetitions counted"
    return (
        f"A language model of {facts.parameters:,} parameters (`{facts.architecture}`, {facts.dtype}, context of "
        f"{facts.context:,} tokens), {origin} with dougong {facts.version}.{facts.rounding}")


def _use(facts: CardFacts) -> str:
    ends = "" if facts.ends_with is None else " It is also what the model ends a text with." \
        if facts.ends_with == facts.begins_with else f" It ends a text with `{facts.ends_with}`."
    why = (f"Every training document followed `{facts.begins_with}`, and so should a prompt, as above.{ends}\n"
           if facts.begins_with else "")
    chat = "For conversations use `tokenizer.apply_chat_template(messages, add_generation_prompt=True)` of " \
        "transformers.\n" if facts.chat else "It continues text; it was not taught to hold a conversation.\n"
    return f"## Use\n\n```python\n{_SNIPPETS[facts.library](facts.begins_with)}\n```\n\n{why}{chat}".rstrip()


def _with_transformers(begins_with: str | None) -> str:
    prompt = ("tokenizer.bos_token + " if begins_with else "") + '"Once upon a time"'
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer({prompt}, return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))"""


def _with_onnxruntime(begins_with: str | None) -> str:
    return f"""import numpy as np, onnxruntime
from tokenizers import Tokenizer

tokenizer, session = Tokenizer.from_file("tokenizer.json"), onnxruntime.InferenceSession("model.onnx")
text = tokenizer.encode({(begins_with or "") + "Once upon a time"!r}, add_special_tokens=False).ids
past = {{i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), "float32") for i in session.get_inputs() if "past" in i.name}}
new = text[:]
for _ in range(40):
    places = range(len(text) - len(new), len(text))
    logits, *present = session.run(None, {{
        "input_ids": np.array([new]), "position_ids": np.array([places]),
        "attention_mask": np.ones((1, len(text)), "int64"), **past}})
    past, new = dict(zip(past, present)), [int(logits[0, -1].argmax())]
    text += new
print(tokenizer.decode(text))"""


_SNIPPETS = {"transformers": _with_transformers, "onnx": _with_onnxruntime}


def _data(facts: CardFacts) -> str:
    data = facts.data
    if not data.get("splits"):
        return "## Data\n\nNot recorded." if not facts.imported_from else \
            "## Data\n\nOf the imported model's training nothing is known here; see its own card."
    rows = ["| split | documents | bytes | tokens |", "| --- | ---: | ---: | ---: |"]
    rows += [f"| {name} | {split.get('documents', 0):,} | {split.get('bytes', 0):,} | {split.get('tokens', 0):,} |"
             for name, split in data["splits"].items()]
    sources = [f"- `{source['name']}`: {source.get('documents', 0):,} documents, {source.get('bytes', 0):,} bytes"
               for source in data.get("sources", []) if "name" in source]
    sentence = (data.get("split") or {}).get("sentence")
    split = f"\n\nSplit: {sentence.rstrip('.')}." if sentence else ""
    return "## Data\n\n" + "\n".join(rows) + ("\n\nSources:\n\n" + "\n".join(sources) if sources else "") + \
        split + f"\n\nFingerprint of the data and the tokenizer: `{data.get('fingerprint', '')}`."


def _figures(facts: CardFacts) -> str:
    result = facts.result
    if result.get("bits_per_byte") is None:
        return "## Figures\n\nNot scored on held-out text."
    rows = [f"| {result.get('split', 'held-out')} split | bits per byte | 95 % interval | model − this (paired 95 %) |",
            "| --- | ---: | ---: | ---: |",
            f"| this model | {result['bits_per_byte']:.4f} | {_interval(result.get('interval'))} | |"]
    rows += [f"| {row['name']} | {row['bits_per_byte']:.4f} | | {row['difference']:+.4f} "
             f"{_interval(row.get('interval'))} |" for row in result.get("baselines", [])]
    of = f" of step {result['step']:,}" if "step" in result else ""
    other = "" if result.get("step", facts.step) == facts.step else \
        f" **The weights here are those of step {facts.step:,}, which these figures are not about.**"
    return ("## Figures\n\n" + "\n".join(rows) + f"\n\nEvery token{of} scored once ({result.get('weights', 'raw')} "
            f"weights before any rounding; {result.get('documents', 0):,} documents, {result.get('bytes', 0):,} "
            f"bytes). Lower is better; below 0 in the last column says that the model is better.{other}")


def _limits(facts: CardFacts) -> str:
    limits = [f"It reads at most {facts.context:,} tokens; beyond them nothing was learned.",
              "It repeats what its data say, errors and prejudices included, and invents what they do not say.",
              "It was not tested for safety, and not outside the data above."]
    if not facts.imported_from and facts.parameters < 1_000_000_000:
        limits.append(f"At {facts.parameters:,} parameters it is small: do not expect facts or reasoning.")
    if facts.license == "unknown":
        limits.append("No licence was named when it was exported; ask its maker before you use it.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _recipe(facts: CardFacts) -> str:
    return f"## Recipe\n\n```yaml\n{facts.recipe.strip()}\n```" if facts.recipe else ""


def _interval(pair: Any) -> str:
    return f"[{pair[0]:.4f}, {pair[1]:.4f}]" if pair else ""
