"""What a model answers in conversations: its own template around what was said, and tokens until it ends its turn."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from dougong.data.chat_template import ChatTemplate
from dougong.data.tokenizer import Tokenizer
from dougong.generate.engine import Engine
from dougong.generate.sampling import SamplingConfig
from dougong.runtime.device import Runtime

GREEDY = SamplingConfig(temperature=0, max_tokens=128, long_prompt="truncate")


def replies(model: nn.Module | Engine, tokenizer: Tokenizer, talks: Sequence[Sequence[dict[str, Any]]],
            config: SamplingConfig = GREEDY, *, tools: Sequence[Sequence[dict[str, Any]]] = (),
            runtime: Runtime | None = None, rows: int = 32, poll: Callable[[], None] = lambda: None) -> list[str]:
    """The reply to each talk (messages that end before the assistant's turn); `tools` stand beside them.

    At most `rows` are written at a time, those of similar length together. Raises ConfigError where the template
    refuses a talk.
    """
    engine = model if isinstance(model, Engine) else Engine(model, runtime or Runtime())
    template = ChatTemplate(tokenizer)
    ends = template.stop_ids | (frozenset() if tokenizer.document_id is None else {tokenizer.document_id})
    prompts = [template.encode(talk, tools=tools[i] if tools else ()) for i, talk in enumerate(talks)]
    written: list[list[int]] = [[] for _ in talks]
    by_length = sorted(range(len(talks)), key=lambda i: -len(prompts[i]))
    for begin in range(0, len(by_length), rows):
        group = by_length[begin:begin + rows]
        for step in engine.start([prompts[i] for i in group], config, stop_ids=ends, vocab_size=tokenizer.vocab_size):
            poll()
            for token in step:
                if token.finish != "stop":
                    written[group[token.row]].append(token.id)
    return [tokenizer.decode(ids) for ids in written]
