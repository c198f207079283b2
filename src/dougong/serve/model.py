"""A model being served: its tokenizer, its template, its runner; and requests as the engine takes them."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dougong.core.config import from_dict
from dougong.core.errors import CheckpointError, ConfigError
from dougong.data.chat_template import ChatTemplate
from dougong.generate import Engine, SamplingConfig
from dougong.generate.grammar import Grammar
from dougong.generate.request import Request
from dougong.generate.scheduler import Scheduler, default_cache_tokens, token_bytes
from dougong.generate.text import AHEAD
from dougong.runtime.device import end_team
from dougong.serve.bodies import Message, Writing
from dougong.serve.errors import ApiError
from dougong.serve.metrics import Metrics
from dougong.serve.runner import Runner
from dougong.serve.settings import ServeConfig
from dougong.serve.structured import Structured
from dougong.serve.tools import Spelling, spelling_of
from dougong.train.memory import available_bytes

_LONG_TEXT = 20_000        # characters; longer ones are encoded beside the event loop
_DEFAULT_CONTEXT = 4096    # for a model that names none
_CHUNK = 256


class ServedModel:
    """One model under one name. `facts` are what /v1/models adds about it."""

    def __init__(self, name: str, engine: Engine, tokenizer: Any, config: ServeConfig, *,
                 facts: dict[str, Any] | None = None, fingerprint: str = "", template: str | None = None,
                 draft: Engine | None = None, beside: int = 0) -> None:
        """`beside`: how many other models share the machine's memory."""
        self.name, self.engine, self.tokenizer, self.config = name, engine, tokenizer, config
        self.created = int(time.time())
        self.context = engine.context or _DEFAULT_CONTEXT
        self.template = ChatTemplate(tokenizer, template)
        self.spelling: Spelling | str = _spelling(self.template)
        self.structured = Structured(tokenizer)
        self.fingerprint = fingerprint
        self.facts = facts or {}
        self.speculate = (0 if draft is None else AHEAD) if config.speculate is None else config.speculate
        if draft is not None and not self.speculate:
            raise ConfigError("--draft has no effect with --speculate 0. Leave one of them out.")
        least = -(-self.context // 64) * 64 + 128
        free = available_bytes(engine.runtime.device) / (1 + beside)
        each = token_bytes(engine) + (0 if draft is None else token_bytes(draft))
        self.cache_tokens = max(least, config.cache_tokens or default_cache_tokens(
            free, each, least=least, most=max(config.rows, 2) * least))
        self.cache_bytes = self.cache_tokens * each
        self._scheduler = Scheduler(engine, max_rows=config.rows, chunk=_CHUNK, vocab_size=tokenizer.vocab_size,
                                    cache_tokens=self.cache_tokens, draft=draft)
        end_team()      # from here on the runner's thread computes

    @classmethod
    def open(cls, path: Path, config: ServeConfig, *, checkpoint: str = "best", name: str | None = None,
             draft: Path | None = None, beside: int = 0) -> "ServedModel":
        """Loads a run, and the smaller run `draft` that guesses for it. Raises ConfigError or CheckpointError where it
        holds nothing that writes."""
        from dougong.recipes.open_run import open_run

        opened = open_run(path, checkpoint=checkpoint, to_read=True)
        if opened.tokenizer is None:
            raise ConfigError(f"{opened.directory.path} holds no language model "
                              f"(model.kind={opened.recipe.model.kind}), so there is nothing to talk to.")
        rows = getattr(opened.model.config, "vocab_size", None)
        if rows is not None and rows < opened.tokenizer.vocab_size:
            raise CheckpointError(f"{opened.directory.path}: the tokenizer ({opened.tokenizer_path}) has "
                                  f"{opened.tokenizer.vocab_size} entries, the embedding (model.vocab_size) {rows} "
                                  "rows. They do not belong together.")
        parameters = sum(parameter.numel() for parameter in opened.model.parameters())
        facts = {"family": opened.recipe.model.kind, "parameters": parameters, "step": opened.step}
        fingerprint = f"{opened.weights}-{opened.step}-{opened.tokenizer.fingerprint[:12]}"
        guesses = None if draft is None else open_run(draft, to_read=True).drafting_for(opened)
        return cls(name or opened.name, Engine(opened.model, opened.runtime),
                   opened.tokenizer, config, facts=facts, fingerprint=fingerprint, draft=guesses, beside=beside)

    def start(self, metrics: Metrics) -> None:
        """Begins the model's thread, in the running event loop."""
        step, tokens = metrics.step.labels(self.name), metrics.tokens.labels(self.name)

        def told(seconds: float, count: int) -> None:
            step.observe(seconds)
            tokens.inc(count)

        self.runner = Runner(self._scheduler, rows=self.config.rows, queue=self.config.queue, on_step=told).start()
        metrics.watch(self.name, self.runner)

    def describe(self) -> dict[str, Any]:
        """The entry of /v1/models; what OpenAI's does not have is under `dougong`."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "dougong", "dougong": {
            "context": self.context, "vocab_size": self.tokenizer.vocab_size, **self.facts,
            "chat_template": "its own" if self.template.own else "plain (a base model: not trained on conversations)",
            "tools": isinstance(self.spelling, Spelling), "mode": "chat" if self.template.own else "continue"}}

    # ---- text and ids

    async def encode(self, text: str) -> list[int]:
        """A text as the model reads it: after the token that begins a document, where there is one."""
        ids = [] if self.begin_id is None else [self.begin_id]
        ids += await self.plain_ids(text)
        if not ids:
            raise ApiError(400, "the prompt is empty, and this model's tokenizer has no token that begins a document. "
                           "Give at least one character.", param="prompt", code="empty_prompt")
        return ids

    async def plain_ids(self, text: str) -> list[int]:
        if len(text) > _LONG_TEXT:
            return (await asyncio.to_thread(self.tokenizer.encode, text)).tolist()
        return self.tokenizer.encode(text).tolist()

    async def encode_chat(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """A conversation as the model reads it. Raises ApiError for calls that the template cannot spell."""
        called, told = {}, []
        for message in messages:
            if message.role == "tool" or message.tool_calls:
                self.calls("messages")
            for call in message.tool_calls or []:
                called[call.id] = call.function.name
            plain = message.plain(as_text=isinstance(self.spelling, Spelling) and self.spelling.as_text)
            if message.role == "tool":
                if message.tool_call_id not in called:
                    raise ApiError(400, f"a tool answers the call {message.tool_call_id!r}, which no earlier message "
                                   "made.", param="messages", code="invalid_value")
                plain["name"] = called[message.tool_call_id]
            told.append(plain)
        ids = await asyncio.to_thread(lambda: self.template.encode(told, tools=list(tools) or None))
        if not ids:
            raise ApiError(400, "the template makes no token of this conversation.", param="messages",
                           code="empty_prompt")
        return ids

    def calls(self, param: str) -> Spelling:
        """How the template spells tool calls. Raises ApiError where it cannot, for what the request asked."""
        if isinstance(self.spelling, Spelling):
            return self.spelling
        raise ApiError(400, self.spelling, param=param, code="unsupported_by_model")

    @property
    def begin_id(self) -> int | None:
        return self.tokenizer.begin_id

    def spell(self, id: int) -> tuple[str, list[int]]:
        """A token as text and as bytes; special ones by their name."""
        spelled = self.tokenizer.pieces[id]
        return spelled.decode("utf-8", "replace"), list(spelled)

    # ---- requests

    def request(self, prompt: Sequence[int], sampling: SamplingConfig, *, sample: int, stop_ids: frozenset[int],
                grammar: Grammar | None = None) -> Request:
        """A request of the engine; each has a grammar of its own, which follows its text."""
        return Request(prompt, sampling, stop_ids=stop_ids, sample=sample, speculate=self.speculate,
                       constraint=None if grammar is None else grammar.copy())

    def fit(self, prompt: Sequence[int], body: Writing, most: int) -> tuple[list[int], int]:
        """The prompt as it will be read, and how many tokens may follow. Raises ApiError 400 for one too long."""
        limit = min(self.config.prompt_tokens or self.context, self.context)
        if body.truncation == "auto":
            keep = max(1, min(limit, self.context - min(most, self.context // 2)))
            prompt = prompt[-keep:]
        if len(prompt) > limit:
            what = ("the model reads" if limit == self.context else "this server takes")
            raise ApiError(400, f"the prompt has {len(prompt):,} tokens; {what} at most {limit:,}. Shorten it, or send "
                           "\"truncation\": \"auto\" to keep its end.", param="messages" if hasattr(body, "messages")
                           else "prompt", code="context_length_exceeded")
        return [int(id) for id in prompt], min(most, self.context + 1 - len(prompt))

    def sampling(self, body: Writing, *, max_tokens: int, seed: int, logprobs: int | None) -> SamplingConfig:
        """The engine's words for a request's. Raises ConfigError for fields that have no effect together."""
        return from_dict(SamplingConfig, {
            "max_tokens": max_tokens, "temperature": body.temperature, "seed": seed, "logprobs": logprobs,
            "top_k": body.top_k, "top_p": body.top_p if body.top_p < 1 else None, "min_p": body.min_p or None,
            "repetition_penalty": body.repetition_penalty, "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty, "logit_bias": self._bias(body)})

    def _bias(self, body: Writing) -> tuple[tuple[int, float], ...]:
        pairs = []
        for id, bias in (body.logit_bias or {}).items():
            if not (id.isascii() and id.isdigit() and int(id) < self.tokenizer.vocab_size):
                raise ApiError(400, f"logit_bias names {id!r}, which is no token id below {self.tokenizer.vocab_size}.",
                               param="logit_bias", code="invalid_value")
            pairs.append((int(id), float(bias)))
        return tuple(pairs)

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> list[float]:
        """The mean over positions of the hidden state after the final norm, in fp32, scaled to length 1."""
        tokens_1T = torch.tensor([list(ids)], device=self.engine.runtime.device)
        hidden_D = self.engine.model.hidden(tokens_1T)[0].float().mean(0)
        if not bool(hidden_D.isfinite().all()):
            raise CheckpointError("the model's hidden states are not finite. Its training probably diverged.")
        return (hidden_D / hidden_D.norm().clamp(min=1e-12)).tolist()


def _spelling(template: ChatTemplate) -> Spelling | str:
    """How it spells tool calls, or why it cannot."""
    try:
        return spelling_of(template)
    except ConfigError as error:
        return str(error)
