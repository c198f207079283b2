"""A conversation as token ids with a loss weight for each: what a model is to learn to say, and nothing else.

The text is what the model's own template writes. An assistant's turn begins where the template's invitation to reply
ends (the same text that stands before a reply when the model is asked), and ends with the token by which the template
closes it, which is learned too: without it a model never stops. Ids are cut at both ends, so a reply has the ids here
that it has when it is generated.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

import numpy as np

from dougong.core.errors import ConfigError
from dougong.data.chat_template import ChatTemplate
from dougong.data.conversations import Conversation
from dougong.data.tokenizer import Tokenizer

TrainOn = Literal["assistant", "last", "all"]
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = """\
{%- if tools %}
    {{- "<|im_start|>system\\n" }}
    {%- if messages[0].role == "system" %}{{- messages[0].content + "\\n\\n" }}{%- endif %}
    {{- "You may call these functions, described inside <tools></tools>:\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\nFor each call write a JSON object with name and arguments inside <tool_call></tool_call>." }}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- "<|im_start|>user" }}{%- endif %}
        {{- "\\n<tool_response>\\n" + message.content + "\\n</tool_response>" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- "<|im_end|>\\n" }}{%- endif %}
    {%- elif not (tools and loop.first and message.role == "system") %}
        {{- "<|im_start|>" + message.role + "\\n" + (message.content or "") }}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}{{- "\\n" }}{%- endif %}
            {%- set call = call.function if call.function else call %}
            {{- '<tool_call>\\n{"name": ' + (call.name | tojson) + ', "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- "}\\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}
"""
"""ChatML, with tools by the convention of Hermes that Qwen follows: what vLLM, llama.cpp and Ollama know by sight."""

FIRST = "{{ bos_token }}"
"""before it where a model has a first token of its own"""

_DAY = datetime(2024, 7, 26)
"""today, for templates that write the date (it is what Llama 3's takes where it knows none): data made on another day
are the same data"""
_HERE = "\ufdd1"


def with_turns(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as it is where it has a chat template; else with ChatML and the two tokens that it needs, behind
    the token that a text begins with where the model has one of its own (Llama)."""
    if tokenizer.chat_template:
        return tokenizer
    own = tokenizer.begin_id not in (None, tokenizer.document_id)
    return tokenizer.with_chat_template(FIRST * own + CHATML, TURN_TOKENS)


def template_for_training(tokenizer: Tokenizer) -> ChatTemplate:
    """The tokenizer's template, for which it is always the same day."""
    return ChatTemplate(tokenizer, day=_DAY)


def encode_turns(conversation: Conversation, template: ChatTemplate, *,
                 train_on: TrainOn = "assistant") -> tuple[np.ndarray, np.ndarray]:
    """Ids (int32) and the weight (float32) that each has as a target; what follows the last turn learned is left out.

    `train_on`: the assistant's turns, the last of them, or everything. A message with `"train": false` weighs nothing.
    Raises ConfigError where the template refuses the conversation or hides where a reply begins.
    """
    text, mark, spans = reply_spans(conversation.messages, template, tools=conversation.tools)
    ids: list[int] = []
    weight: list[float] = []
    last = max(spans, default=-1)
    at, others = 0, float(train_on == "all")
    for number, (begin, end) in spans.items():
        learned = conversation.messages[number].get("train", True) and (train_on != "last" or number == last)
        for part, value in ((text[at:begin], others), (text[begin:end], float(learned))):
            ids += template.ids(part, mark)
            weight += [value] * (len(ids) - len(weight))
        at = end
    if train_on == "all":
        ids += template.ids(text[at:], mark)
        weight += [others] * (len(ids) - len(weight))
    kept = int(np.flatnonzero(weight)[-1]) + 1 if any(weight) else len(ids)
    return np.array(ids[:kept], np.int32), np.array(weight[:kept], np.float32)


def reply_spans(messages: Sequence[dict[str, Any]], template: ChatTemplate, *, tools: Sequence[dict[str, Any]] = (),
                ) -> tuple[str, str, dict[int, tuple[int, int]]]:
    """The text that the template writes, the mark in it, and where each assistant's turn begins and ends.

    A template may write earlier turns otherwise than the last (without their reasoning, say), or change the words'
    ends; then a turn's begin is found by a sign put before its first word. Raises ConfigError where that is lost too.
    """
    shown = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    mark = template.mark_for([shown, list(tools)])

    def spell(some: Sequence[dict[str, Any]], *, reply: bool = False) -> str:
        return template.spell(some, reply=reply, tools=tools, mark=mark)[0]

    whole, spans = spell(shown), {}
    for number, message in enumerate(shown):
        if message["role"] != "assistant":
            continue
        invitation = spell(shown[:number], reply=True)
        if whole.startswith(invitation):
            begin = len(invitation)
        else:
            begin = _begin_of_words(shown, number, whole, spell)
        spans[number] = begin, _end_of_turn(shown, number, whole, begin, template, spell)
    return whole, mark, spans


def _begin_of_words(messages: list[dict[str, Any]], number: int, whole: str, spell: Any) -> int:
    content = messages[number]["content"]
    words = content.lstrip()
    signed = {**messages[number], "content": content[:len(content) - len(words)] + _HERE + words}
    text = spell([*messages[:number], signed, *messages[number + 1:]])
    if not words or text.count(_HERE) != 1 or text.replace(_HERE, "") != whole:
        raise ConfigError(f"the chat template does not show where the reply in message {number + 1} begins.")
    return text.index(_HERE)


def _end_of_turn(messages: list[dict[str, Any]], number: int, whole: str, begin: int, template: ChatTemplate,
                 spell: Any) -> int:
    """Behind the token that closes the turn; without such a token, where the conversation so far would end."""
    ends = [found + len(name) for name in template.stop_names if (found := whole.find(name, begin)) >= 0]
    if ends:
        return min(ends)
    so_far = spell(messages[:number + 1])
    same = next((at for at, (a, b) in enumerate(zip(so_far, whole)) if a != b), min(len(so_far), len(whole)))
    return max(begin, same)
