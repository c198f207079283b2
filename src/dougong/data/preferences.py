"""The data kind `preferences`: pairs of a preferred and a rejected reply, or single replies judged good or bad."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from dougong.core.config import config, to_dict
from dougong.core.errors import ConfigError, DataError
from dougong.core.files import default_cache, write_json
from dougong.data.conversations import Conversation
from dougong.data.decode import NotText
from dougong.data.dedup import digest
from dougong.data.documents import Document
from dougong.data.judgements import Judged, judged_in
from dougong.data.materialise import Progress
from dougong.data.preference_corpus import FORMAT, PreferenceCorpus
from dougong.data.prepare import key_of, ready_tokenizer, turn
from dougong.data.records import read_records
from dougong.data.sources import HuggingFaceSource
from dougong.data.split import SPLITS, by_hash
from dougong.data.tokenizer import Tokenizer
from dougong.data.turns import encode_turns, template_for_training, with_turns
from dougong.data.walk import Skipped, find

Encoded = tuple[np.ndarray, np.ndarray]
_HUB = "hf:"
_TOLD_EVERY, _EXAMPLES = 500, 20


@config
class PreferenceData:
    """Judged replies, cleaned of what cannot be learned from, split and spelled by the tokenizer's chat template."""

    kind: Literal["preferences"] = "preferences"
    path: str | None = None
    """a folder, file or glob of .jsonl, .json or .parquet, a saved Hugging Face data set, or hf:OWNER/NAME"""
    hub_split: str = "train"
    """of a Hugging Face data set: the split to read; dougong makes its own split of it"""
    spelling: Literal["chat", "text"] = "chat"
    """chat: by the chat template; text: prompt and reply as they are, one behind the other, for a model that is none of
    chats"""
    unpair: bool = False
    """take each pair as a good reply and a bad one, as KTO wants them"""
    row_tokens: int | None = Field(default=None, ge=8)
    """most tokens of a prompt with its reply; derived: the model's context"""
    overlong: Literal["cut", "drop"] = "drop"
    """a reply that goes beyond a row: cut it there, or leave its record out"""
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05)
    """of training, validation and test, by a hash of the prompt"""

    @field_validator("fractions")
    @classmethod
    def _adds_up(cls, fractions: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(fractions) < 0 or fractions[0] == 0 or abs(sum(fractions) - 1) > 1e-9:
            raise ValueError("give three shares that add up to 1, training's above 0: [0.9, 0.05, 0.05]")
        return fractions

    def prepare(self, tokenizer: Any, *, context: int, cache: Path | str | None = None, seed: int = 0,
                progress: Progress | None = None) -> PreferenceCorpus:
        """Makes, or finds in the cache, the ids of every judged reply, for rows of `context` tokens.

        `tokenizer` is a config of `TOKENIZERS`. All records are held in memory while this works. Raises DataError where
        nothing is left to learn from.
        """
        if not self.path:
            raise ConfigError("data.path is not given, and preferences are nobody's but yours. Name a .jsonl file with "
                              "prompt, chosen and rejected in each line: data.path=pairs.jsonl")
        cache, report = Path(cache) if cache else default_cache(), progress or (lambda done, total, what: None)
        reader = _Reader(self)
        read = reader.fingerprint
        chosen = ready_tokenizer(tokenizer, reader, cache, seed, report)
        chosen = with_turns(chosen) if self.spelling == "chat" else chosen
        directory = cache / "preferences" / key_of([FORMAT, read, to_dict(self), context, seed, chosen.fingerprint,
                                                    chosen.chat_template])
        with turn(directory.with_suffix(".lock"), report):
            if not (directory / "facts.json").is_file():
                partial = directory.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                _Builder(self, reader, chosen, partial, context, seed).build(report)
                shutil.rmtree(directory, ignore_errors=True)
                partial.replace(directory)
        return PreferenceCorpus(directory, chosen, context=context)


class _Reader:
    """The records of a section, read once; to a tokenizer that learns, the words of all of them as documents."""

    def __init__(self, data: PreferenceData) -> None:
        self._data, self._path = data, data.path or ""
        self.skipped = Skipped()
        self._records: list[Judged] | None = None

    @property
    def label(self) -> str:
        path = self._path
        return path.removeprefix(_HUB) if path.startswith(_HUB) else Path(path).expanduser().name or "files"

    def _hub(self) -> HuggingFaceSource | None:
        folder = Path(self._path).expanduser()
        saved = any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json"))
        if not saved and not self._path.startswith(_HUB):
            return None
        return HuggingFaceSource(dataset=self._path.removeprefix(_HUB), split=self._data.hub_split)

    @property
    def fingerprint(self) -> str:
        """Of what would be read, without reading it."""
        if hub := self._hub():
            listed = list(hub.inventory())
        else:
            listed = [(name, path.stat().st_size, path.stat().st_mtime_ns)
                      for name, path in find(self._path, Skipped())]
        return f"preferences {key_of([self._path, self._data.hub_split, listed])}"

    def records(self) -> list[Judged]:
        if self._records is None:
            found = list(self._read())
            apart = self._data.unpair
            self._records = [one for judged in found
                             for one in (judged.apart() if apart and judged.label is None else (judged,))]
        return self._records

    def _read(self) -> Iterator[Judged]:
        if hub := self._hub():
            named = ((f"{hub.split}:{number}", record) for number, record in enumerate(hub.open()))
            yield from judged_in(named, source=self.label, skipped=self.skipped)
            return
        for name, path in find(self._path, self.skipped):
            try:
                yield from judged_in(read_records(path, name, self.skipped), source=self.label, skipped=self.skipped)
            except NotText as problem:
                self.skipped.add(problem.reason, name, problem.where)
            except OSError as error:
                self.skipped.add("unreadable file", name, error.strerror or str(error))

    def split(self, _name: str) -> "_Reader":
        return self

    @property
    def bytes(self) -> int:
        return sum(len(judged.text.encode()) for judged in self.records())

    def __len__(self) -> int:
        return len(self.records())

    def __getitem__(self, i: int) -> Document:
        return Document(id=str(i), source=self.label, text=self.records()[i].text)

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))


class _Builder:
    """Writes the files of a `PreferenceCorpus`."""

    def __init__(self, data: PreferenceData, reader: _Reader, tokenizer: Tokenizer, directory: Path, context: int,
                 seed: int) -> None:
        self.data, self.reader, self.tokenizer, self.directory = data, reader, tokenizer, directory
        self.context, self.seed = context, seed
        self.template = template_for_training(tokenizer) if data.spelling == "chat" else None
        self.skipped = reader.skipped
        self.duplicates: dict[str, Any] = {"documents": 0, "bytes": 0, "examples": []}

    def build(self, report: Progress) -> None:
        records: list[Judged] = self.reader.records()
        seen: dict[bytes, str] = {}
        kept: list[Judged] = []
        encoded: list[list[Encoded]] = []
        cut: list[bool] = []
        for number, judged in enumerate(records):
            if number % _TOLD_EVERY == 0:
                report(number, len(records), "spelling replies")
            key = digest([[side.messages for side in judged.sides], judged.label])
            if key in seen:
                self._count_duplicate(judged, seen[key])
                continue
            seen[key] = judged.id
            if (found := self._sides(judged)) is not None:
                kept.append(judged)
                encoded.append(found[0])
                cut.append(found[1])
        shape = self._shape(kept)
        prompts, splits = self._divide(kept, least=2 if shape == "singles" else 1)
        if shape == "singles":
            self._add_mismatched(kept, encoded, prompts, splits)
        self._write(kept, encoded, splits, np.array(cut), shape)

    def _count_duplicate(self, judged: Judged, kept: str) -> None:
        self.duplicates["documents"] += 1
        self.duplicates["bytes"] += len(judged.text.encode())
        if len(self.duplicates["examples"]) < _EXAMPLES:
            self.duplicates["examples"].append({"removed": judged.id, "kept": kept})

    def _sides(self, judged: Judged) -> tuple[list[Encoded], bool] | None:
        """Ids and weights of each side, and whether one was cut; None for what is left out, which is counted."""
        try:
            sides = [self._spelled(side, judged.shared) for side in judged.sides]
        except (ConfigError, DataError) as problem:
            self.skipped.add("the chat template or the tokenizer refuses it", judged.id, str(problem).split("\n")[0])
            return None
        longest = max(len(ids) for ids, _ in sides)
        if cut := longest > self.context + 1:
            if self.data.overlong == "drop":
                self.skipped.add("longer than a row", judged.id, f"{longest:,} tokens")
                return None
            sides = [(ids[:self.context + 1], weight[:self.context + 1]) for ids, weight in sides]
        if not all(weight[1:].any() for _, weight in sides):      # the first token is no target
            self.skipped.add("nothing of a reply within a row", judged.id)
            return None
        if len(sides) == 2 and np.array_equal(sides[0][0], sides[1][0]):
            self.skipped.add("both replies have the same tokens", judged.id)
            return None
        return sides, cut

    def _spelled(self, conversation: Conversation, shared: int) -> Encoded:
        if self.template is not None:
            return encode_turns(conversation, self.template)
        asked, said = conversation.messages[:shared], conversation.messages[shared:]
        prompt = plain_ids(self.tokenizer, asked, first=True)
        end = self.tokenizer.document_id
        reply = plain_ids(self.tokenizer, said) + ([] if end is None else [end])
        return (np.array(prompt + reply, np.int32),
                np.array([0.0] * len(prompt) + [1.0] * len(reply), np.float32))

    def _shape(self, kept: list[Judged]) -> str:
        if not kept:
            raise DataError(f"{self.reader.label} holds no judgement that can be used. Skipped:\n{self.skipped}\n"
                            "One JSON object a line with prompt, chosen and rejected is read best.")
        pairs = sum(judged.label is None for judged in kept)
        if 0 < pairs < len(kept):
            raise DataError(f"{self.reader.label} holds {pairs:,} pairs and {len(kept) - pairs:,} single replies, and "
                            "an objective reads one or the other.\nTry data.unpair=true, which takes pairs as single "
                            "replies (for objective=kto).")
        return "pairs" if pairs else "singles"

    def _divide(self, kept: list[Judged], *, least: int) -> tuple[np.ndarray, np.ndarray]:
        """The number of each record's prompt, and its split. Where the hash leaves a wanted part fewer than `least`
        prompts, they are divided by the order of their hashes."""
        digests = np.frombuffer(b"".join(digest(judged.asked) for judged in kept), "<u8").reshape(-1, 2)
        prompts, prompt_of = np.unique(digests, axis=0, return_inverse=True)
        fractions, prompt_of = self.data.fractions, prompt_of.ravel()
        chosen = by_hash(prompts, fractions, self.seed)
        if any(fraction and (chosen == split).sum() < least for split, fraction in enumerate(fractions)):
            held = [max(least, round(len(prompts) * fraction)) if fraction else 0 for fraction in fractions[1:]]
            if len(prompts) - sum(held) < least:
                raise DataError(f"{len(prompts)} different prompts are too few for the splits asked for"
                                f"{', as KTO needs two in each' if least == 2 else ''}. Add some, or hold out less: "
                                "'data.fractions=[1,0,0]'.")
            chosen = np.zeros(len(prompts), np.int8)
            chosen[:held[0]], chosen[held[0]:sum(held)] = 1, 2
        return prompt_of, chosen[prompt_of]

    def _add_mismatched(self, kept: list[Judged], encoded: list[list[Encoded]], prompts: np.ndarray,
                        splits: np.ndarray) -> None:
        """Beside each single reply one that was given to another prompt of its split, to the same prompt: what KTO
        estimates its reference point from. Where that does not fit a row it is cut."""
        for split in range(len(SPLITS)):
            members = np.flatnonzero(splits == split)
            for number, another in zip(members, members[_to_other_prompts(prompts[members])]):
                own, other = kept[number].sides[0], kept[another]
                messages = (*own.messages[:kept[number].shared], *other.sides[0].messages[other.shared:])
                ids, weight = self._spelled(Conversation(own.id, own.source, messages, own.tools), kept[number].shared)
                encoded[number].append((ids[:self.context + 1], weight[:self.context + 1]))

    def _write(self, kept: list[Judged], encoded: list[list[Encoded]], splits: np.ndarray, cut: np.ndarray,
               shape: str) -> None:
        if not (splits == 0).any():
            raise DataError("the training split holds no judgement. Try 'data.fractions=[1,0,0]', or add some.")
        self.directory.mkdir(parents=True)
        sides = [side for pair in encoded for side in pair]
        tokens, weights = (np.concatenate([side[i] for side in sides]) for i in (0, 1))
        starts = np.cumsum([0, *(len(ids) for ids, _ in sides)])
        labels = np.array([-1.0 if judged.label is None else judged.label for judged in kept], np.float32)
        sizes = np.array([len(self.tokenizer.decode_bytes(ids)) for ids, _ in sides], np.int64).reshape(-1, 2)
        for name, values in (("tokens", tokens), ("weights", weights), ("starts", starts), ("split", splits),
                             ("labels", labels), ("bytes", sizes)):
            np.save(self.directory / f"{name}.npy", values)
        content = hashlib.sha256()
        for values in (tokens, weights, starts, splits, labels):
            content.update(values.tobytes())
        write_json(self.directory / "facts.json", {
            "fingerprint": content.hexdigest(), "shape": shape, "spelling": self.data.spelling,
            "overlong": self.data.overlong, "skipped": self.skipped.facts(),
            "cut": {name: int(cut[splits == split].sum()) for split, name in enumerate(SPLITS)},
            "sources": [{"name": self.reader.label, "kind": "preferences"}],
            "duplicates": {"searched": {"exact": True}, "exact": self.duplicates},
            "split": {"rule": "prompts", "sentence":
                      "Split by a hash of the prompt: the same prompt is always on the same side."}})


def plain_ids(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], *, first: bool = False) -> list[int]:
    """The messages' contents one behind the other, without turns (`spelling: text`); `first`, behind the token that a
    text begins with."""
    begin = tokenizer.begin_id if first else None
    return ([] if begin is None else [begin]) + [
        int(id) for message in messages for id in tokenizer.encode(message["content"])]


def _to_other_prompts(prompts: np.ndarray) -> np.ndarray:
    """For each of some replies the place of one to another prompt, of which there are at least two.

    In the order of the prompts, the first reply to one gets the first behind all replies to it, the second the second:
    where each prompt has as many replies, each reply is taken once.
    """
    order = np.argsort(prompts, kind="stable")
    begin, end = (np.searchsorted(prompts[order], prompts[order], side) for side in ("left", "right"))
    count, others = len(order), np.empty_like(order)
    others[order] = order[(end + (np.arange(count) - begin) % (count - (end - begin))) % count]
    return others
