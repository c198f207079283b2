"""A conversation in the terminal: what the chat page does, without a server."""

import json
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dougong.core.config import from_dict
from dougong.core.errors import ConfigError, did_you_mean
from dougong.core.files import write_text
from dougong.data.chat_template import ChatTemplate
from dougong.generate import Engine, SamplingConfig
from dougong.generate.request import Request
from dougong.generate.scheduler import Scheduler, default_cache_tokens, token_bytes
from dougong.serve.writing import Writer
from dougong.train.memory import available_bytes

HELP = """\
/reset            begin again              /system TEXT      set the system prompt (none: show it)
/set NAME=VALUE   temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, seed (none: show them)
/retry            write the last answer again      /undo             take the last exchange back
/mode chat|continue                        /save FILE        the conversation as JSON
/help             this list                /quit             or Ctrl-D
Ctrl-C stops an answer; what was written stays. A line that ends with \\ goes on in the next."""
_SETTABLE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
             "max_tokens", "seed", "stop")
_BLOCK = 64


@dataclass
class Conversation:
    """Turns, settings and a scheduler that keeps what it has read, so that a next turn reads only what is new."""

    engine: Engine
    tokenizer: Any
    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.8, "top_p": 0.95, "max_tokens": 400})
    mode: str = ""
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    answers: int = 0

    def __post_init__(self) -> None:
        self.template = ChatTemplate(self.tokenizer)
        self.mode = self.mode or ("chat" if self.template.own else "continue")
        self.context = self.engine.context or 4096
        least, free = 4 * _BLOCK + self.context, available_bytes(self.engine.runtime.device)
        tokens = default_cache_tokens(free, token_bytes(self.engine), least=least, most=least + self.context)
        self._scheduler = Scheduler(self.engine, max_rows=1, vocab_size=self.tokenizer.vocab_size, cache_tokens=tokens)

    def answer(self, said: str) -> Generator[str, None, None]:
        """Adds what was said and yields the answer as it is written, at every step, "" where nothing is certain yet.

        Closing it stops the work and keeps what came.

        Raises ConfigError, and leaves the conversation as it was, where it cannot be answered.
        """
        before = list(self.turns)
        if said or self.mode == "chat":
            self.turns.append({"role": "user", "content": said})
        try:
            request, writer = self._request()
            id = self._scheduler.add(request)
        except ConfigError:
            self.turns = before
            raise
        self.answers += 1
        self.seed, begin = request.sampling.seed, time.perf_counter()
        self.turns.append({"role": "assistant", "content": ""})
        try:
            while writer.finish is None:
                for token in self._scheduler.step():
                    if token.finish == "error":
                        raise ConfigError(f"the model could not go on: {token.error}.")
                    if writer.finish is None:
                        yield writer.write(token).text
        finally:
            self._scheduler.cancel(id)
            self.turns[-1]["content"] = writer.text
            self.written, self.seconds = writer.count, time.perf_counter() - begin

    def command(self, line: str) -> str:
        """Does what a line that begins with `/` asks and says so. Raises ConfigError for what it cannot."""
        name, _, rest = line[1:].partition(" ")
        known: dict[str, Callable[[str], str]] = {
            "reset": self._reset, "system": self._system, "set": self._set, "mode": self._mode, "save": self._save,
            "undo": self._undo, "help": lambda _rest: HELP}
        if name not in known:
            raise ConfigError(f"there is no /{name}.{did_you_mean(name, [*known, 'retry', 'quit'])} /help lists them.")
        return known[name](rest.strip())

    def take_back(self) -> str | None:
        """Takes the last answer back, and what was said for it, which it returns; None where there is none."""
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
            if not self.turns or self.turns[-1]["role"] != "user":
                return ""
        return self.turns.pop()["content"] if self.turns else None

    def _request(self) -> tuple[Request, Writer]:
        chat = self.mode == "chat"
        settings = {"seed": int(time.time() * 1000) % 2**31, **self.sampling}   # another text each time, unless set
        stops = tuple(settings.pop("stop", ()))
        sampling = from_dict(SamplingConfig, settings)
        end = self.tokenizer.document_id
        ends = frozenset(() if end is None else (end,)) | (self.template.stop_ids if chat else frozenset())
        ids = self._chat_ids(sampling) if chat else self._text_ids(sampling)
        writer = Writer(self.tokenizer, ids, (*stops, *(self.template.stops if chat else ())), hidden=ends,
                        strip=chat and not self.template.own)
        return Request(ids, sampling, stop_ids=ends), writer

    def _chat_ids(self, sampling: SamplingConfig) -> list[int]:
        """The conversation with the oldest exchanges left out until there is room for an answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        room = self.context - min(sampling.max_tokens, self.context // 4)
        for begin in range(0, len(self.turns), 2):
            ids = self.template.encode([*system, *self.turns[begin:]])
            if len(ids) <= room:
                return ids
        raise ConfigError(f"what you said leaves no room for an answer: the model reads {self.context} tokens.")

    def _text_ids(self, sampling: SamplingConfig) -> list[int]:
        begin = self.tokenizer.begin_id
        text = "".join(turn["content"] for turn in self.turns)
        ids = [*(() if begin is None else (begin,)), *(int(id) for id in self.tokenizer.encode(text))]
        if not ids:
            raise ConfigError("write at least one character: this tokenizer has no token that begins a document.")
        return ids[-(self.context - min(sampling.max_tokens, self.context // 2)):]

    def _reset(self, _rest: str) -> str:
        self.turns = []
        return "a new conversation."

    def _system(self, rest: str) -> str:
        if rest and self.mode == "continue":
            raise ConfigError("a text that is continued has no system prompt. /mode chat has one.")
        self.system = rest or self.system
        return f"system prompt: {self.system or 'none'}"

    def _mode(self, rest: str) -> str:
        if rest not in ("chat", "continue"):
            raise ConfigError(f"/mode takes chat or continue; this is {self.mode}.")
        if rest != self.mode:
            self.mode, self.turns = rest, []
        return f"{rest}, from the beginning" + ("" if rest == "continue" or self.template.own else
                                                " (a base model, not trained on conversations: expect rough answers)")

    def _set(self, rest: str) -> str:
        changed = dict(self.sampling)
        for pair in rest.split():
            name, sign, value = pair.partition("=")
            if not sign or name not in _SETTABLE:
                raise ConfigError(f"{pair!r} is no setting.{did_you_mean(name, _SETTABLE)} Try: /set temperature=0.7")
            if value in ("", "off", "none"):
                changed.pop(name, None)
            else:
                changed[name] = (value,) if name == "stop" else _number(name, value)
            if name == "temperature" and changed.get(name) == 0:   # which leaves nothing for these to do
                changed = {key: held for key, held in changed.items() if key not in ("top_p", "top_k", "min_p")}
        from_dict(SamplingConfig, changed)
        self.sampling = changed
        return "  ".join(f"{name}={value}" for name, value in self.sampling.items())

    def _save(self, rest: str) -> str:
        if not rest:
            raise ConfigError("where? Try: /save talk.json")
        path = Path(rest).expanduser()
        if path.exists():
            raise ConfigError(f"{path} is there already, and is not written over. Choose another name.")
        write_text(path, json.dumps({"mode": self.mode, "system": self.system, "sampling": self.sampling,
                                     "turns": self.turns}, ensure_ascii=False, indent=1) + "\n")
        return f"saved: {path}"

    def _undo(self, _rest: str) -> str:
        said = self.take_back()
        return "there is nothing to take back." if said is None else f"taken back: {said[:60]!r}"


def _number(name: str, value: str) -> float | int:
    try:
        return int(value) if name in ("top_k", "max_tokens", "seed") else float(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} is no number.") from None

