"""Conversations out of records, in the shapes in which people keep them.

| shape        | keys                                                                   |
|--------------|------------------------------------------------------------------------|
| messages     | `messages` of role and content, as OpenAI's; also `tools`              |
| conversations| `conversations` of from and value, as ShareGPT's; also `system`, `tools`|
| instruction  | `instruction`, `input`, `output`, as Alpaca's; also `system`           |
| prompt       | `prompt` with `completion` or `response`, `question` with `answer`     |

In all of them `skill` names what is practised and `answer` a reply that can be checked.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dougong.data.decode import NotText

ROLES = ("system", "user", "assistant", "tool")
_ROLE_OF = {"developer": "system", "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
            "model": "assistant", "bot": "assistant", "function_call": "assistant", "observation": "tool",
            "function": "tool", "function_response": "tool", "ipython": "tool", **{role: role for role in ROLES}}
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("question", "response"))
_KEPT = ("name", "tool_call_id", "reasoning_content")
KEYS = ("messages", "conversations", "instruction", *dict.fromkeys(first for first, _ in _PAIRS))


@dataclass(frozen=True)
class Conversation:
    """Messages are dicts with `role` and `content`, and where they apply `tool_calls`, `name`, `tool_call_id`,
    `reasoning_content` and `train` (false: no loss on this one). `tools` are those that the assistant may call, as JSON
    schemas. `split` is given by sources that divide themselves."""

    id: str
    source: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    skill: str | None = None
    answer: str | None = None
    split: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without what is empty."""
        return {key: value for key, value in asdict(self).items() if value not in (None, (), [])}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Conversation":
        lists = {key: tuple(values.get(key, ())) for key in ("messages", "tools")}
        return cls(**{**values, **lists})

    @property
    def text(self) -> str:
        """All that was said, for counting and for learning a tokenizer."""
        return "\n".join(f"{message['role']}\n{message['content']}" for message in self.messages)


def conversation_of(record: Any, *, id: str, source: str) -> tuple[Conversation, str]:
    """The conversation in a record, and the record's shape.

    Raises NotText with the reason where it is none: no shape that is known, roles out of order, an empty reply, content
    that is no text.
    """
    if not isinstance(record, Mapping):
        raise NotText("record that is not an object", type(record).__name__)
    shape, messages = _messages(record)
    spoken = tuple(_message(message) for message in messages)
    check_order(spoken)
    tools = _parsed(record.get("tools")) or ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise NotText("tools that are no list of objects", type(tools).__name__)
    answer = record.get("answer") if shape != "question" else None
    conversation = Conversation(id=id, source=source, messages=spoken, tools=tuple(map(dict, tools)),
                                skill=record["skill"] if isinstance(record.get("skill"), str) else None,
                                answer=None if answer is None else str(answer))
    _check_writable(conversation)
    return conversation, shape


def _check_writable(conversation: Conversation) -> None:
    """Raises NotText where it cannot be written as JSON in UTF-8: records can hold halves of surrogate pairs, Parquet
    files dates."""
    try:
        json.dumps(conversation.to_dict(), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise NotText("lone surrogate", f"after {error.object[:error.start][-20:]!r}") from None
    except TypeError as error:
        raise NotText("value that is not JSON", str(error)) from None


def messages_of(value: Any, role: str) -> list[Any]:
    """A prompt, a reply or a list of turns as raw messages; a plain text is said by `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Sequence):
        return list(value)
    raise NotText("content that is no text", type(value).__name__)


def _messages(record: Mapping[str, Any]) -> tuple[str, list[Any]]:
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    if record.get("messages") is not None:
        return "messages", [*system, *messages_of(record["messages"], "user")]
    if record.get("conversations") is not None:
        return "conversations", [*system, *messages_of(record["conversations"], "user")]
    if record.get("instruction") is not None and record.get("output") is not None:
        asked = map(_text, (record["instruction"], record.get("input")))
        return "instruction", [*system, *messages_of("\n\n".join(part for part in asked if part), "user"),
                               *messages_of(record["output"], "assistant")]
    for asked, replied in _PAIRS:
        if record.get(asked) is not None and record.get(replied) is not None:
            return asked, [*system, *messages_of(record[asked], "user"), *messages_of(record[replied], "assistant")]
    held = ", ".join(str(key) for key in list(record)[:8]) or "nothing"
    raise NotText("record in no shape of a conversation", f"it has {held}; known: messages, conversations, "
                  "instruction + output, prompt + completion, prompt + response, question + answer")


def _message(message: Any) -> dict[str, Any]:
    """One message by our names. Raises NotText where it has no role that is known or no text."""
    if not isinstance(message, Mapping):
        raise NotText("message that is not an object", type(message).__name__)
    said = str(message.get("role") or message.get("from") or "")
    role = _ROLE_OF.get(said.lower())
    if role is None:
        raise NotText("unknown role", said or "none")
    kept = {key: message[key] for key in _KEPT if message.get(key) is not None}
    calls = _parsed(message.get("tool_calls")) or ()
    if said.lower() == "function_call":
        calls, message = [_parsed(message.get("value"))], {"content": ""}
    if not isinstance(calls, list | tuple):
        raise NotText("tool calls that are no list", type(calls).__name__)
    if calls:
        kept["tool_calls"] = [_call(call) for call in calls]
    if message.get("train") is False or message.get("weight") == 0:     # OpenAI's key is weight
        kept["train"] = False
    content = message.get("content") if "content" in message else message.get("value")
    return {"role": role, "content": _text(content), **kept}


def _text(content: Any) -> str:
    """A message's words; of a list of parts those of its texts."""
    if content is None:
        return ""
    if isinstance(content, list | tuple):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise NotText("content that is no text", "images and sounds cannot be learned from")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise NotText("content that is no text", type(content).__name__)
    return content


def _call(call: Any) -> dict[str, Any]:
    """A tool call in OpenAI's shape, its arguments as an object: templates spell them themselves."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise NotText("tool call without a name", str(call)[:80])
    arguments = _parsed(inner.get("arguments"))
    return {"type": "function", **({"id": call["id"]} if call.get("id") else {}),
            "function": {"name": inner["name"], "arguments": {} if arguments is None else arguments}}


def _parsed(value: Any) -> Any:
    """JSON that was kept as text, as many data sets keep tools and arguments; other text stays."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises NotText unless a system turn, if any, comes first, then user and assistant take turns, with the results of
    tools after the calls for them; and unless each assistant's turn says or calls something."""
    may_come = {"start": ("system", "user"), "system": ("user",), "user": ("assistant",),
                "assistant": ("user",), "calling": ("tool",), "tool": ("tool", "assistant", "user")}
    before = "start"
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in may_come[before]:
            after = f"after {'a tool call' if before == 'calling' else before}" if number > 1 else "at the start"
            raise NotText("roles out of order", f"message {number} is {role} {after}")
        calling = bool(message.get("tool_calls"))
        if role == "assistant" and not message["content"].strip() and not calling:
            raise NotText("empty assistant turn", f"message {number}")
        before = "calling" if role == "assistant" and calling else role
    if not any(message["role"] == "assistant" for message in messages):
        raise NotText("conversation without a reply", f"{len(messages)} messages")


def conversations_in(records: Iterator[tuple[str, Any]], *, source: str, skipped: Any,
                     shapes: dict[str, int] | None = None) -> Iterator[Conversation]:
    """The conversations of named records; what is none is counted in `skipped`, shapes in `shapes`."""
    for name, record in records:
        try:
            conversation, shape = conversation_of(record, id=name, source=source)
        except NotText as problem:
            skipped.add(problem.reason, name, problem.where)
            continue
        except RecursionError:
            skipped.add("value nested too deeply", name)
            continue
        if shapes is not None:
            shapes[shape] = shapes.get(shape, 0) + 1
        yield conversation
