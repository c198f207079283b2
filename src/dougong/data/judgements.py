"""Judged replies out of records, in the shapes in which people keep them.

| shape   | keys                                                                                                  |
|---------|-------------------------------------------------------------------------------------------------------|
| pairs   | `chosen` and `rejected`, texts or lists of messages; `prompt` where the lists do not begin with it     |
| singles | `prompt`, `completion` and `label` (true: a good reply)                                                |

`system` and `tools` may stand beside them, as in `data.conversations`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dougong.data.conversations import Conversation, conversation_of, messages_of
from dougong.data.decode import NotText
from dougong.data.walk import Skipped


@dataclass(frozen=True)
class Judged:
    """One or two conversations that share what precedes the judged reply: the preferred and the rejected one, or a
    single one with its `label` (1 good, 0 bad). Only the judged reply is to be learned. `shared`: how many messages
    precede it."""

    sides: tuple[Conversation, ...]
    shared: int
    label: float | None = None

    @property
    def id(self) -> str:
        return self.sides[0].id

    @property
    def asked(self) -> list[Any]:
        """What precedes the reply: records that ask the same are on the same side of a split."""
        return [message["content"] for message in self.sides[0].messages[:self.shared]]

    @property
    def text(self) -> str:
        return "\n".join(side.text for side in self.sides)

    def apart(self) -> "tuple[Judged, Judged]":
        """A pair as a good reply and a bad one."""
        good, bad = self.sides
        return (replace(self, sides=(good,), label=1.0),
                replace(self, sides=(replace(bad, id=f"{bad.id} (rejected)"),), label=0.0))


def judged_of(record: Any, *, id: str, source: str) -> Judged:
    """The judgement in a record. Raises NotText with the reason where there is none."""
    if not isinstance(record, Mapping):
        raise NotText("record that is not an object", type(record).__name__)
    if record.get("chosen") is not None and record.get("rejected") is not None:
        return _pair(record, id, source)
    if record.get("completion") is not None and record.get("label") is not None:
        return _single(record, id, source)
    held = ", ".join(str(key) for key in list(record)[:8]) or "nothing"
    raise NotText("record without a judgement", f"it has {held}; known: chosen + rejected, or completion + label")


def judged_in(records: Iterator[tuple[str, Any]], *, source: str, skipped: Skipped) -> Iterator[Judged]:
    """The judgements of named records; what is none is counted in `skipped`."""
    for name, record in records:
        try:
            yield judged_of(record, id=name, source=source)
        except NotText as problem:
            skipped.add(problem.reason, name, problem.where)
        except RecursionError:
            skipped.add("value nested too deeply", name)


def _pair(record: Mapping[str, Any], id: str, source: str) -> Judged:
    chosen, rejected = (_conversation(record, key, id, source) for key in ("chosen", "rejected"))
    if chosen.messages == rejected.messages:
        raise NotText("both replies are the same")
    both = zip(chosen.messages, rejected.messages)
    shared = next((i for i, (a, b) in enumerate(both) if a != b), min(len(chosen.messages), len(rejected.messages)))
    if shared == 0:
        raise NotText("two replies to different prompts", "chosen and rejected differ from their first message on")
    if shared in (len(chosen.messages), len(rejected.messages)):
        raise NotText("one reply is the beginning of the other")
    return Judged(tuple(_only_from(side, shared) for side in (chosen, rejected)), shared)


def _single(record: Mapping[str, Any], id: str, source: str) -> Judged:
    label = record["label"]
    if label not in (True, False, 0, 1):
        raise NotText("label that is neither true nor false", str(label)[:40])
    conversation = _conversation(record, "completion", id, source)
    shared = len(conversation.messages) - 1
    return Judged((_only_from(conversation, shared),), shared, float(label))


def _conversation(record: Mapping[str, Any], key: str, id: str, source: str) -> Conversation:
    """The prompt with the reply under `key`, which may hold the whole conversation itself."""
    reply = messages_of(record[key], "assistant")
    whole = bool(reply) and _role(reply[0]) in ("system", "user", "human")
    if not whole and record.get("prompt") is None:
        raise NotText("reply without a prompt", "give prompt, or lists of messages that begin with it")
    prompt = [] if whole else messages_of(record["prompt"], "user")
    context = {name: record[name] for name in ("system", "tools") if record.get(name)}
    conversation, _ = conversation_of({"messages": [*prompt, *reply], **context}, id=id, source=source)
    if conversation.messages[-1]["role"] != "assistant":
        raise NotText("reply that does not end with the assistant", conversation.messages[-1]["role"])
    return conversation


def _role(message: Any) -> str:
    return str(message.get("role") or message.get("from") or "").lower() if isinstance(message, Mapping) else ""


def _only_from(conversation: Conversation, shared: int) -> Conversation:
    """The conversation of which only what the assistant says from message `shared` on is learned."""
    messages = tuple({**message, "train": False} if i < shared and message["role"] == "assistant" else message
                     for i, message in enumerate(conversation.messages))
    return replace(conversation, messages=messages)
