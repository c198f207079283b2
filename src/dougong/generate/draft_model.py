"""Guesses of a smaller model of the same tokenizer (speculative sampling; Leviathan et al. 2023, arXiv:2211.17192).

The draft reads what was written and goes on alone for some tokens; the model then reads all of them in one forward and
keeps them as far as `sampling.accept` allows, so the text has the model's own distribution, and at temperature 0 is the
model's own text. The draft's keys and values lie beside the scheduler's budget; a server leaves them as much room
again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.generate.drafts import Ahead, Guess
from dougong.generate.engine import Engine, sample_seed
from dougong.generate.lanes import Lane, Reading, width_for
from dougong.generate.request import Request, Row
from dougong.generate.sampling import Draws, adjust, probabilities
from dougong.runtime.seeds import derive

_CHUNK = 256   # tokens of a text read at once


class Drafted(Ahead):
    """What the draft knows of one row: its keys and values, and its own draws."""

    def __init__(self, request: Request) -> None:
        super().__init__(request.speculate)
        self.lane: Lane | None = None
        self.draws = Draws(derive(sample_seed(request.sampling.seed, request.sample), "draft"))
        self.begun = 0    # tokens of the text when it guessed last

    def learn(self, guessed: int, right: int) -> None:
        super().learn(guessed, right)
        if self.lane is not None:     # forgets what was not the text
            self.lane.advance(min(self.begun + right - self.lane.lengths[0], 0))

    def forget(self) -> None:
        self.lane = None


class DraftModel:
    """Guesses for several rows at a time; each advances at its own pace."""

    def __init__(self, engine: Engine, model: Engine, vocab_size: int | None) -> None:
        """`model` is the one that is guessed for. Raises ConfigError where the draft knows other tokens."""
        least = vocab_size or model.vocab_size
        if least is not None and engine.vocab_size is not None and engine.vocab_size < least:
            raise ConfigError(f"the draft knows {engine.vocab_size} tokens, the model {least}. A draft needs the same "
                              "tokenizer: train one with the same tokenizer, or leave the draft out.")
        self.engine, self.vocab_size = engine, least

    def guess(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Guess]:
        """At most `rooms[i]` tokens that may follow row i; none where the draft's context is full, or its logits are
        not finite."""
        context = self.engine.context
        sizes = [min(room, _of(row).ahead, room if context is None else context - len(row.text))
                 for row, room in zip(rows, rooms)]
        guesses = [Guess() for _ in rows]
        live = [n for n, size in enumerate(sizes) if size > 0]
        logits = self._catch_up([rows[n] for n in live])
        for step in range(max(sizes, default=0)):
            for n, logits_V in zip(live, logits):
                self._draw(rows[n], logits_V, guesses[n])
            live = [n for n in live if step < len(guesses[n].tokens) < sizes[n]]
            if not live:
                break
            newest_N1 = torch.tensor([[guesses[n].tokens[-1]] for n in live])
            logits = list(self.engine.read(newest_N1, self._reading([rows[n] for n in live])))
        return guesses

    def _draw(self, row: Row, logits_V: Tensor, guess: Guess) -> None:
        sampling = row.request.sampling
        logits_1V = adjust(logits_V[None, :self.vocab_size].float(), sampling)
        if not logits_1V.max().isfinite():
            return
        if not sampling.temperature:
            guess.tokens.append(int(logits_1V.argmax()))
            return
        law_V = probabilities(logits_1V, sampling)[0]
        cdf_V = law_V.cumsum(0)
        at = torch.searchsorted(cdf_V, cdf_V[-1] * _of(row).draws.next(), right=True)
        guess.tokens.append(min(int(at), len(law_V) - 1))
        guess.laws.append(law_V)

    def _catch_up(self, rows: Sequence[Row]) -> list[Tensor]:
        """Reads of each row what the draft has not read; returns the logits (V) after its newest token."""
        for row in rows:
            self._make_room(row)
        missing = [len(row.text) - _lane(row).lengths[0] for row in rows]
        if 2 in missing:              # read again one token that is known, so that all are read in one forward
            for n, row in enumerate(rows):
                if missing[n] == 1 and _lane(row).lengths[0]:
                    _lane(row).advance(-1)
                    missing[n] = 2
        logits: dict[int, Tensor] = {}
        for T in set(missing):
            members = [n for n, count in enumerate(missing) if count == T]
            tokens_NT = torch.tensor([rows[n].text[-T:] for n in members])
            logits.update(zip(members, self.engine.read(tokens_NT, self._reading([rows[n] for n in members]))))
        return [logits[n] for n in range(len(rows))]

    def _make_room(self, row: Row) -> None:
        """A lane with room for the text and the guesses, and all of the text in it but its last one or two tokens."""
        drafted, text = _of(row), row.text
        drafted.begun = len(text)
        need = len(text) + drafted.most
        if drafted.lane is None:
            drafted.lane = Lane(width_for(need))
            drafted.lane.begin(row)
        elif need > drafted.lane.width:
            wider = Lane(width_for(need))
            wider.join(drafted.lane)
            drafted.lane = wider
        while len(text) - drafted.lane.lengths[0] > 2:
            begin = drafted.lane.lengths[0]
            part = text[begin:min(begin + _CHUNK, len(text) - 1)]
            self.engine.read(torch.tensor([part]), self._reading([row]))

    def _reading(self, rows: Sequence[Row]) -> Reading:
        return Reading([_lane(row) for row in rows], self.engine.runtime.device)


def _of(row: Row) -> Drafted:
    assert isinstance(row.drafts, Drafted)
    return row.drafts


def _lane(row: Row) -> Lane:
    lane = _of(row).lane
    assert lane is not None
    return lane
