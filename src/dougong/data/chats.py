"""The data kind `chats`: conversations, spelled by the model's template, with loss on what it is to say."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from dougong.core.config import chosen_from, config, to_dict
from dougong.core.errors import ConfigError, DataError
from dougong.core.files import default_cache, write_json
from dougong.data.chat_corpus import FORMAT, ChatCorpus
from dougong.data.chat_sources import CHAT_SOURCES, ChatDataset, ChatFiles, Found
from dougong.data.chat_template import ChatTemplate
from dougong.data.conversations import Conversation
from dougong.data.dedup import digest
from dougong.data.documents import Document
from dougong.data.materialise import Progress, source_fingerprint
from dougong.data.prepare import key_of, ready_tokenizer, turn
from dougong.data.split import SPLITS, by_hash
from dougong.data.turns import TrainOn, encode_turns, template_for_training, with_turns

Overlong = Literal["cut", "turns", "drop", "error"]
_EXAMPLES = 20
_TOLD_EVERY = 500


@config
class ChatData:
    """Conversations, cleaned of duplicates, split, spelled by the tokenizer's chat template and packed."""

    kind: Literal["chats"] = "chats"
    path: str | None = None
    """a folder, file or glob of .jsonl, .json or .parquet, or a saved Hugging Face data set; short for one source"""
    sources: tuple[Annotated[Any, chosen_from(CHAT_SOURCES)], ...] = ()
    """where the conversations come from; with neither path nor sources: questions about Python's own functions, and
    generated tasks"""
    train_on: TrainOn = "assistant"
    """what is learned: assistant (all its turns), last (the last of them), all (what the others say too)"""
    row_tokens: int | None = Field(default=None, ge=8)
    """tokens of a row, and so the most of a conversation that is seen; derived: the model's context, at most 1,024"""
    overlong: Overlong = "cut"
    """conversations longer than a row: cut (at the row's end), turns (behind the last turn that fits whole), drop,
    error"""
    pack: bool = True
    """several conversations in a row, which do not see each other; false: one in a row"""
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05)
    """of training, validation and test, by a hash of what precedes the first reply; sources may divide themselves"""
    dedup: bool = True
    """remove conversations equal to an earlier one but for white space"""

    def __post_init__(self) -> None:
        if self.path is not None and self.sources:
            raise ConfigError("data.path and data.sources are both given. data.path is short for one source: "
                              "leave it out, or add {kind: files, path: …} to data.sources.")

    @field_validator("fractions")
    @classmethod
    def _adds_up(cls, fractions: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(fractions) < 0 or fractions[0] == 0 or abs(sum(fractions) - 1) > 1e-9:
            raise ValueError("give three shares that add up to 1, training's above 0: [0.9, 0.05, 0.05]")
        return fractions

    def resolved_sources(self) -> tuple[Any, ...]:
        """The sources to read: those given, the one `path` stands for, or what dougong makes itself."""
        if self.path is None:
            return self.sources or (CHAT_SOURCES["python_questions"](), CHAT_SOURCES["tasks"]())
        folder = Path(self.path).expanduser()
        if any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            return (ChatDataset(dataset=self.path),)
        return (ChatFiles(path=self.path),)

    def prepare(self, tokenizer: Any, *, context: int, cache: Path | str | None = None, seed: int = 0,
                progress: Progress | None = None) -> ChatCorpus:
        """Makes, or finds in the cache, the ids and weights of every conversation, for rows of `context` tokens.

        `tokenizer` is a config of `TOKENIZERS`; one without a chat template gets ChatML. Raises DataError where nothing
        is left to learn from.
        """
        cache, report = Path(cache) if cache else default_cache(), progress or (lambda done, total, what: None)
        sources = self.resolved_sources()
        read = source_fingerprint(sources)
        chosen = with_turns(ready_tokenizer(tokenizer, _Texts(sources, read), cache, seed, report))
        settings = {name: to_dict(getattr(self, name)) for name in ("train_on", "overlong", "fractions", "dedup")}
        directory = cache / "chats" / key_of([FORMAT, read, settings, context, seed, chosen.fingerprint,
                                            chosen.chat_template])
        with turn(directory.with_suffix(".lock"), report):
            if not (directory / "facts.json").is_file():
                partial = directory.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                _Builder(self, template_for_training(chosen), partial, context, seed, report).build(sources)
                shutil.rmtree(directory, ignore_errors=True)
                partial.replace(directory)
        return ChatCorpus(directory, chosen, context=context, pack=self.pack)


class _Texts:
    """The words of all conversations as documents, for a tokenizer that is learned from them; read when asked for."""

    def __init__(self, sources: Sequence[Any], fingerprint: str) -> None:
        self.fingerprint, self._sources = f"chats {fingerprint}", sources
        self._texts: list[str] | None = None

    def split(self, _name: str) -> "_Texts":
        return self

    def _read(self) -> list[str]:
        if self._texts is None:
            self._texts = [one.text for source in self._sources for one in source.stream(Found())
                           if one.split in (None, "train")]
        return self._texts

    @property
    def bytes(self) -> int:
        return sum(len(text.encode()) for text in self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __getitem__(self, i: int) -> Document:
        return Document(id=str(i), source="chats", text=self._read()[i])

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))


class _Builder:
    """Writes the files of a `ChatCorpus`: one pass over the sources, memory for a few numbers of each conversation."""

    def __init__(self, data: ChatData, template: ChatTemplate, directory: Path, context: int, seed: int,
                 report: Progress) -> None:
        self.data, self.template, self.directory = data, template, directory
        self.context, self.seed, self.report = context, seed, report
        self.found = Found()
        self.duplicates: dict[str, Any] = {"documents": 0, "bytes": 0, "examples": []}
        self.untrained = 0
        self._seen: dict[bytes, str] = {}
        # of each conversation: tokens, bytes of text, bytes of its line, tokens learned, whether it was cut
        self._index: list[tuple[int, int, int, int, bool]] = []
        self._splits: list[int] = []
        self._digests: list[bytes] = []
        self._sources: list[int] = []

    def build(self, sources: Sequence[Any]) -> None:
        self.directory.mkdir(parents=True)
        read, names = 0, ("tokens.i32", "weights.f32", "conversations.jsonl")
        with contextlib.ExitStack() as files:
            tokens, weights, lines = (files.enter_context(open(self.directory / name, "wb")) for name in names)
            for number, source in enumerate(sources):
                for conversation in source.stream(self.found):
                    if read % _TOLD_EVERY == 0:
                        self.report(read, None, f"spelling conversations ({source.label})")
                    read += 1
                    if (encoded := self._encoded(conversation)) is None:
                        continue
                    ids, weight, cut = encoded
                    line = json.dumps(conversation.to_dict(), ensure_ascii=False).encode() + b"\n"
                    tokens.write(ids.astype("<i4").tobytes())
                    weights.write(weight.astype("<f4").tobytes())
                    lines.write(line)
                    self._index.append((len(ids), len(conversation.text.encode()), len(line),
                                        int(np.count_nonzero(weight[1:])), cut))
                    self._digests.append(digest(_asked(conversation)))
                    self._splits.append(SPLITS.index(conversation.split) if conversation.split else -1)
                    self._sources.append(number)
        self._refuse_nothing(read, sources)
        self._write(sources)

    def _encoded(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray, bool] | None:
        """Ids and weights, and whether it was cut; None for what is left out, which is counted."""
        if self.data.dedup:
            key = digest([conversation.messages, conversation.tools])
            if (kept := self._seen.get(key)) is not None:
                self.duplicates["documents"] += 1
                self.duplicates["bytes"] += len(conversation.text.encode())
                if len(self.duplicates["examples"]) < _EXAMPLES:
                    self.duplicates["examples"].append({"removed": conversation.id, "kept": kept})
                return None
            self._seen[key] = conversation.id
        try:
            ids, weight = encode_turns(conversation, self.template, train_on=self.data.train_on)
        except (ConfigError, DataError) as problem:
            self.found.add("the chat template or the tokenizer refuses it", conversation.id,
                           str(problem).split("\n")[0])
            return None
        if cut := len(ids) > self.context + 1:
            if (fitting := self._fitted(conversation, weight, len(ids))) is None:
                return None
            ids, weight = ids[:fitting], weight[:fitting]
        if not weight[1:].any():       # the first token is no target
            self.untrained += 1
            self.found.add("nothing to learn in it", conversation.id, "no token of a reply that counts fits the row")
            return None
        return ids, weight, cut

    def _fitted(self, conversation: Conversation, weight: np.ndarray, tokens: int) -> int | None:
        """How many tokens of one too long are kept. Every token but the first is a target, so a row takes one more."""
        most = self.context + 1
        if self.data.overlong == "error":
            raise DataError(f"conversation {conversation.id} has {tokens:,} tokens, more than a row of "
                            f"{self.context:,} (data.overlong=error).\nTry a longer data.row_tokens (up to the model's "
                            "context), or data.overlong=cut, turns or drop.")
        if self.data.overlong == "drop":
            self.found.add("longer than a row", conversation.id, f"{tokens:,} tokens")
            return None
        if self.data.overlong == "turns" and self.data.train_on != "all" and weight[most]:
            ends = np.flatnonzero((weight[:most - 1] > 0) & (weight[1:most] == 0))
            return int(ends[-1]) + 1 if len(ends) else 0
        return most

    def _refuse_nothing(self, read: int, sources: Sequence[Any]) -> None:
        if self._index:
            return
        where = ", ".join(source.label for source in sources)
        if self.untrained:
            raise DataError(
                f"none of the {read:,} conversations of {where} has a token to learn: the loss counts "
                f"{'everything' if self.data.train_on == 'all' else 'only what the assistant says'} "
                f"(data.train_on={self.data.train_on}; messages with \"train\": false never), within the first "
                f"{self.context:,} tokens.\n{self.found}\n"
                "Look at the mask with `dougong data inspect`; try a longer data.row_tokens, or data.train_on=all.")
        raise DataError(f"{where} holds no conversation that can be used. Skipped:\n{self.found}\n"
                        "One JSON object a line with `messages` is read best: "
                        "[{\"role\": \"user\", \"content\": …}, {\"role\": \"assistant\", …}].")

    def _divide(self) -> np.ndarray:
        """The split of each conversation. Where the hash would leave a wanted part of few empty, they are divided by
        the order of their hashes."""
        splits = np.array(self._splits, np.int8)
        open_ones = np.flatnonzero(splits < 0)
        if not len(open_ones):
            return splits
        digests = np.frombuffer(b"".join(self._digests[i] for i in open_ones), "<u8").reshape(-1, 2)
        fractions = self.data.fractions
        chosen = by_hash(digests, fractions, self.seed)
        empty = any(fraction and not (chosen == split).any() for split, fraction in enumerate(fractions))
        if empty and len(open_ones) >= 3:
            groups, group_of = np.unique(digests, axis=0, return_inverse=True)
            held = [max(1, round(len(groups) * fraction)) if fraction else 0 for fraction in fractions[1:]]
            if sum(held) < len(groups):
                of_group = np.zeros(len(groups), np.int8)
                of_group[:held[0]], of_group[held[0]:sum(held)] = 1, 2
                chosen = of_group[group_of.ravel()]
        splits[open_ones] = chosen
        return splits

    def _write(self, sources: Sequence[Any]) -> None:
        splits, index = self._divide(), np.array(self._index, np.int64)
        if not (splits == 0).any():
            raise DataError("the training split holds no conversation. Try 'data.fractions=[1,0,0]', or add some.")
        starts = np.concatenate([np.zeros((1, index.shape[1]), np.int64), np.cumsum(index, axis=0)])
        for name, values in (("starts", starts[:, 0]), ("lines", starts[:, 2]), ("bytes", index[:, 1]),
                             ("trained", index[:, 3]), ("split", splits),
                             ("source", np.array(self._sources, np.int32))):
            np.save(self.directory / f"{name}.npy", values)
        content = hashlib.sha256()
        for name in ("tokens.i32", "weights.f32"):
            content.update((self.directory / name).read_bytes())
        content.update(starts[:, 0].tobytes() + splits.tobytes())
        own = sorted({source.label for source in sources if source.kind in ("python_questions", "tasks")})
        write_json(self.directory / "facts.json", {
            "format": FORMAT, "fingerprint": content.hexdigest(), "train_on": self.data.train_on,
            "sources": [{"name": source.label, "kind": source.kind, **source.about()} for source in sources],
            "shapes": self.found.shapes, "skipped": self.found.facts(),
            "cut": {name: int(index[splits == split, 4].sum()) for split, name in enumerate(SPLITS)},
            "overlong": self.data.overlong,
            "duplicates": {"searched": {"exact": self.data.dedup}, "exact": self.duplicates},
            "split": {"rule": "conversations", "sentence": "Split by a hash of what precedes the first reply: the same "
                      "question is always on the same side." + (f" {' and '.join(own)} divide themselves." if own
                                                                else "")}})


def _asked(conversation: Conversation) -> list[str]:
    """What precedes the first reply: conversations that ask the same are on the same side of the split."""
    first = next((i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"), 0)
    return [message["content"] for message in conversation.messages[:first]]
