"""Continuous batching: requests join and leave at any step, and each writes what it would write alone.

A step reads one chunk of prompts that wait to be read, and one new token of everyone who writes. Rows lie in lanes by
length (`lanes`); a budget of blocks counts the lanes' columns and the kept prefixes. When it is used up, kept prefixes
go first, oldest first; then the newest request goes back to waiting, and is read again when there is room.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.generate.cache import KVCache
from dougong.generate.choosing import choose_each, log_probabilities_of
from dougong.generate.draft_model import Drafted, DraftModel
from dougong.generate.drafts import Ahead, Guess, NGrams
from dougong.generate.engine import Engine, Finish, Token, sample_seed
from dougong.generate.lanes import BLOCK, Lane, Reading, width_for
from dougong.generate.prefixes import Prefixes
from dougong.generate.request import Request, Row
from dougong.generate.sampling import Draws

_SHARE = 0.4    # of free memory for a default cache: for a moment it may take twice its tokens, and steps need some too


class Scheduler:
    """Runs requests on an engine; used from one thread.

    `max_rows` write at a time. `cache_tokens` bounds the keys and values held, unused columns included (while rows move
    or prompts are being read, up to twice as much may be allocated). `chunk` tokens of prompts are read per step at
    most, so a long prompt delays the others' next token by one chunk's time. `vocab_size`: ids from it on are never
    chosen. Requests that `speculate` are guessed by `draft`, a smaller model of the same tokenizer, else by what
    repeats in their text; at most `guessing` of them at a time, as each advances at its own pace, which many pay for.
    """

    def __init__(self, engine: Engine, *, max_rows: int = 16, cache_tokens: int = 16384, chunk: int = 256,
                 vocab_size: int | None = None, draft: Engine | None = None, guessing: int = 4) -> None:
        if max_rows < 1 or chunk < 1 or cache_tokens < 2 * BLOCK:
            raise ConfigError(f"max_rows={max_rows}, chunk={chunk}, cache_tokens={cache_tokens}: at least one row and "
                              f"one token at a time, and a cache of at least {2 * BLOCK} tokens.")
        self.engine, self.max_rows, self.chunk, self.vocab_size = engine, max_rows, chunk, vocab_size
        self.draft = None if draft is None else DraftModel(draft, engine, vocab_size)
        self.guessing = guessing
        self.blocks = cache_tokens // BLOCK
        self.prefixes = Prefixes()
        self._used = 0
        self._next_id = 0
        self._rows: dict[int, Row] = {}             # all that have not ended, oldest first
        self._waiting: deque[Row] = deque()
        self._reading: deque[Row] = deque()         # prompts; each in a lane of its own
        self._lanes: dict[int, Lane] = {}           # those who write, by width
        self._alone: list[Lane] = []                # those who write and guess: each advances at its own pace

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._rows) - len(self._waiting)

    @property
    def free_blocks(self) -> int:
        """Blocks that no running request holds; kept prefixes give way, so theirs count as free."""
        return self.blocks - self._used

    @property
    def cached_tokens(self) -> int:
        """Tokens of kept prefixes."""
        return len(self.prefixes) * BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        reading = [row.lane for row in self._reading if row.lane is not None]
        drafts = [row.drafts.lane for row in self._rows.values()
                  if isinstance(row.drafts, Drafted) and row.drafts.lane is not None]
        lanes = [*self._lanes.values(), *self._alone, *reading, *drafts]
        return self.prefixes.nbytes + sum(lane.nbytes for lane in lanes)

    def add(self, request: Request) -> int:
        """Queues a request; returns its id, the `row` of its tokens. Raises ConfigError for what can never run."""
        sampling = request.sampling
        tokens = self.engine.fit(request.prompt, sampling, self.vocab_size)
        if request.speculate < 0:
            raise ConfigError(f"speculate={request.speculate}: how many tokens are guessed ahead, 0 for none.")
        most = len(tokens) + sampling.max_tokens
        most = most if self.engine.context is None else min(most, self.engine.context)
        if most > self.blocks * BLOCK:
            raise ConfigError(f"a prompt of {len(tokens)} tokens with max_tokens={sampling.max_tokens} may fill {most} "
                              f"places of the cache, which has {self.blocks * BLOCK}. Ask for fewer tokens, or start "
                              "with a larger cache (cache_tokens).")
        row = Row(self._next_id, request, tokens, len(tokens), Draws(sample_seed(sampling.seed, request.sample)))
        row.drafts = self._drafts(request)
        self._next_id += 1
        self._rows[row.id] = row
        self._waiting.append(row)
        return row.id

    @torch.inference_mode()
    def cancel(self, id: int) -> None:
        """Ends a request without another token; harmless where it has ended."""
        row = self._rows.get(id)
        if row is not None:
            self._end(row)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One step of everyone: the new tokens, none while prompts are only being read (`running` says so)."""
        self._make_room()
        self._admit()
        tokens: list[Token] = []
        lanes = [lane for lane in self._lanes.values() if lane.members]
        guesses = self._guesses()
        together = lanes if guesses else lanes + self._alone
        rows = [row for lane in together for row in lane.members]
        logits = []
        if rows:
            newest_B1 = torch.tensor([[row.tokens[-1]] for row in rows])
            logits.append(self.engine.read(newest_B1, Reading(together, self.engine.runtime.device)))
        written = self._write_guessed(guesses) if guesses else []
        begun = self._read_prompts()
        rows += [row for row, _ in begun]
        logits += [logits_1V for _, logits_1V in begun]
        if rows:
            tokens = self._choose_and_write(rows, torch.cat(logits))
        for row, _ in begun:
            self._keep_prefix(row)      # only now is it known that its numbers are finite
        return tokens + written

    # Places in the cache.

    def _admit(self) -> None:
        """Takes requests from the queue, in order, while there are rows and blocks for them."""
        while self._waiting and self.running < self.max_rows:
            row = self._waiting[0]
            lane = Lane(self._width(len(row.text) + 1))
            if not self._take(lane.width // BLOCK):
                break
            self._waiting.popleft()
            row.lane, row.blocks = lane, lane.width // BLOCK
            self._reading.append(row)

    def _make_room(self) -> None:
        """Moves rows that are about to outgrow their lane; may send the newest back to waiting."""
        for lane in self._alone[:]:
            if not lane.members:    # sent back meanwhile
                continue
            row = lane.members[0]
            need = min(1 + row.request.speculate, self._places(row))
            if lane.crowded(need):
                self._move(row, need)
        for lane in list(self._lanes.values()):
            crowded = lane.crowded(1)
            while crowded:
                row = crowded.pop()     # the last first: no other takes its place
                if row.lane is lane:    # else sent back meanwhile
                    self._move(row, 1, expected=len(crowded))
            lane.shift(1)

    def _move(self, row: Row, need: int, expected: int = 0) -> None:
        assert row.lane is not None
        old, length = row.lane, row.lane.lengths[row.lane.members.index(row)]
        width = max(self._width(length + need), min(old.width + BLOCK, self.blocks * BLOCK))
        if not self._claim(row, max(width // BLOCK - row.blocks, 0)):
            return
        if old.width >= width:          # nothing wider exists: the budget, or the context, ends here
            old.shift(need)
            return
        row.blocks = width // BLOCK
        target = Lane(width) if row.drafts is not None else self._lanes.setdefault(width, Lane(width))
        target.join(old, old.members.index(row), expected=expected)
        self._leave(row)
        row.lane = target
        if row.drafts is not None:
            self._alone.append(target)

    def _width(self, length: int) -> int:
        most = self.blocks * BLOCK
        if self.engine.context is not None:
            most = min(most, -(-self.engine.context // BLOCK) * BLOCK)
        return width_for(min(length, most), most)

    def _take(self, blocks: int) -> bool:
        """Books blocks, from kept prefixes where none is free."""
        if self._used + blocks > self.blocks:
            return False
        self._used += blocks
        while self._used + len(self.prefixes) > self.blocks:
            self.prefixes.drop_oldest()
        return True

    def _claim(self, row: Row, blocks: int) -> bool:
        """Books blocks for a row that writes, from the newest requests where none is free; False: it was itself one."""
        while not self._take(blocks):
            newest = next(held for held in reversed(self._rows.values()) if held.lane is not None)
            self._send_back(newest)
            if newest is row:
                return False
        return True

    def _send_back(self, row: Row) -> None:
        """To the head of the queue: all who run are older than all who wait."""
        self._release(row)
        self._waiting.appendleft(row)

    def _release(self, row: Row) -> None:
        """Gives back the row's place and blocks."""
        if row.lane is None:
            return
        if row in self._reading:
            self._reading.remove(row)
        else:
            self._leave(row)
        row.lane = None
        if row.drafts is not None:
            row.drafts.forget()
        self._used -= row.blocks
        row.blocks = 0

    def _leave(self, row: Row) -> None:
        """Takes the row out of its lane."""
        assert row.lane is not None
        row.lane.remove(row)
        if not row.lane.members:
            if row.lane in self._alone:
                self._alone.remove(row.lane)
            elif self._lanes.get(row.lane.width) is row.lane:
                del self._lanes[row.lane.width]

    def _end(self, row: Row, *, keep: bool = True) -> None:
        if row.lane is None:
            self._waiting.remove(row)
        else:
            if keep:
                self._keep_prefix(row)
            self._release(row)
        del self._rows[row.id]

    def _keep_prefix(self, row: Row) -> None:
        """Keeps the whole blocks that the row has read, for requests that begin alike; only where nobody needs room."""
        lane = row.lane
        if lane is None or row not in lane.members:
            return
        at = lane.members.index(row)
        self.prefixes.keep(row.text[:lane.lengths[at]], lambda number: lane.block(at, number), self._room_for_prefix)

    def _room_for_prefix(self) -> bool:
        if self._used >= self.blocks:
            return False
        while self._used + len(self.prefixes) >= self.blocks:
            self.prefixes.drop_oldest()
        return True

    # Reading.

    def _read_prompts(self) -> list[tuple[Row, Tensor]]:
        """Reads up to `chunk` tokens of prompts; returns the rows read to their end, with logits (1 V).

        A prompt is cut at multiples of `chunk` whatever else is being read.
        """
        finished, left = [], self.chunk
        while self._reading and (pieces := self._side_by_side(left)):
            rows, texts = [row for row, _ in pieces], [row.text[begin:end] for row, (begin, end) in pieces]
            lanes, longest = [row.lane for row in rows if row.lane is not None], max(map(len, texts))
            left -= longest * len(rows)
            for row, lane in zip(rows, lanes):
                if not lane.members:
                    lane.begin(row, self.prefixes.find(row.text[:-1]))
            tokens_BT = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
            logits_BV = self.engine.read(tokens_BT, Reading(lanes, self.engine.runtime.device), list(map(len, texts)))
            for n, (row, (_, end)) in enumerate(pieces):
                lanes[n].advance(len(texts[n]) - longest)
                if end == len(row.text):
                    self._reading.remove(row)
                    self._begin_writing(row, lanes[n])
                    finished.append((row, logits_BV[n:n + 1]))
        return finished

    def _side_by_side(self, left: int) -> list[tuple[Row, tuple[int, int]]]:
        """The first prompt's next piece, and those of others that go well with it, as pieces are read padded to the
        longest: at most `left` tokens with the padding, which is at most a quarter; none where the first does not fit.
        """
        pieces: list[tuple[Row, tuple[int, int]]] = []
        tokens, longest, room = 0, 0, self.chunk
        for row in self._reading:
            text, lane = row.text, row.lane
            assert lane is not None
            begin = lane.lengths[0] if lane.members else BLOCK * len(self.prefixes.find(text[:-1]))
            end = min(len(text), (begin // self.chunk + 1) * self.chunk)
            most = min(room, min(lane.width, self.engine.context or lane.width) - begin)
            width, own = max(longest, end - begin), tokens + end - begin
            padded = width * (len(pieces) + 1)
            if width <= most and padded <= left and 3 * padded <= 4 * own:
                pieces.append((row, (begin, end)))
                tokens, longest, room = own, width, most
            elif not pieces:
                break
        return pieces

    def _begin_writing(self, row: Row, lane: Lane) -> None:
        if row.drafts is not None and len(self._alone) < self.guessing:
            self._alone.append(lane)
            return
        row.drafts = None
        if lane.width in self._lanes:
            row.lane = self._lanes[lane.width]
            row.lane.join(lane, expected=sum(other.lane is not None and other.lane.width == lane.width
                                             for other in self._reading))
        else:
            self._lanes[lane.width] = lane

    def _places(self, row: Row) -> int:
        """Positions that the model may still read of this row."""
        context = self.engine.context
        return self.blocks * BLOCK if context is None else context - len(row.text) + 1

    def _drafts(self, request: Request) -> Ahead | None:
        if not request.speculate:
            return None
        return NGrams(request.speculate) if self.draft is None else Drafted(request)

    def _guesses(self) -> list[Guess]:
        """What each row of `_alone` guesses; empty where nobody guesses anything."""
        rows: list[Row] = [lane.members[0] for lane in self._alone]
        shared = min((min(self._places(row), lane.width - lane.end) for row, lane in zip(rows, self._alone)), default=1)
        rooms = [min(row.request.sampling.max_tokens - (len(row.tokens) - row.prompt_length), shared) - 1
                 for row in rows]
        if self.draft is not None:
            guesses = self.draft.guess(rows, rooms)
        else:
            guesses = [Guess(row.drafts.guess(row.tokens, room)) if room > 0 and isinstance(row.drafts, NGrams)
                       else Guess() for row, room in zip(rows, rooms)]
        return guesses if any(guess.tokens for guess in guesses) else []

    def _write_guessed(self, guesses: list[Guess]) -> list[Token]:
        """One forward over the newest token and the guess of each row of `_alone`; keeps the guess as far as it is what
        is chosen, and the choice after it.
        """
        lanes, width = self._alone[:], max(len(guess.tokens) for guess in guesses)
        tokens_BT = torch.tensor([[lane.members[0].tokens[-1], *guess.tokens, *[0] * (width - len(guess.tokens))]
                                  for lane, guess in zip(lanes, guesses)])
        logits_BTV = self.engine.read_each(tokens_BT, Reading(lanes, self.engine.runtime.device))
        written: list[Token] = []
        for lane, guess, logits_TV in zip(lanes, guesses, logits_BTV):
            row, right, size = lane.members[0], 0, len(guess.tokens)
            for t in range(size + 1):
                lane.advance(t + 1 - (width + 1) if t == 0 else 1)    # holds what is known to be the text
                drawn = (guess.tokens[t], guess.laws[t]) if t < len(guess.laws) else None
                written += self._choose_and_write([row], logits_TV[t:t + 1], drawn)
                if row.id not in self._rows or row.lane is not lane:
                    break
                if t == size or row.tokens[-1] != guess.tokens[t]:
                    break
                right += 1
            if size and row.drafts is not None:
                row.drafts.learn(size, right)
        return written

    # Choosing.

    def _choose_and_write(self, rows: Sequence[Row], logits_NV: Tensor, drawn: tuple[int, Tensor] | None = None,
                          ) -> list[Token]:
        """The next token of each row, and what becomes of the row. `drawn`: what a draft drew for the one row, and
        from which law."""
        logits_NV = logits_NV[:, :self.vocab_size].float()
        choices = choose_each(rows, logits_NV, drawn)
        told = log_probabilities_of(rows, choices, logits_NV)
        tokens = []
        for n, (row, choice) in enumerate(zip(rows, choices)):
            if isinstance(choice, int):
                token = self._write(row, choice, told.get(n, (None, None)))
            else:
                token = Token(row.id, -1, "error", error=choice)
            tokens.append(token)
            if token.finish is not None:
                self._end(row, keep=token.finish != "error")
        return tokens

    def _write(self, row: Row, id: int, told: tuple[float | None, list[tuple[int, float]] | None]) -> Token:
        try:
            row.write(id)
        except Exception as error:
            return Token(row.id, -1, "error", error=f"{type(error).__name__}: {error}")
        finish = self._finish(row)
        if finish is None and self._places(row) < 1:       # the context slides
            row.window = len(row.tokens) - ((self.engine.context or 0) + 1) // 2
            self._send_back(row)
        return Token(row.id, id, finish, *told)

    def _finish(self, row: Row) -> Finish | None:
        sampling = row.request.sampling
        if row.tokens[-1] in row.request.stop_ids:
            return "stop"
        if len(row.tokens) - row.prompt_length >= sampling.max_tokens:
            return "length"
        return "context" if self._places(row) < 1 and sampling.at_context_end == "stop" else None


def default_cache_tokens(free_bytes: float, token_bytes: int, *, least: int, most: int) -> int:
    """`most`, or what a share of the free memory holds where that is less, and `least` in any case."""
    return max(least, int(min(most, _SHARE * free_bytes / token_bytes)) // BLOCK * BLOCK)


def token_bytes(engine: Engine) -> int:
    """Bytes of one token's keys and values, seen by reading one."""
    cache = KVCache()
    engine.read(torch.zeros(1, 1, dtype=torch.long), cache)
    return cache.nbytes
