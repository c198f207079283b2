import random

import pytest
import torch
from scipy.stats import chisquare
from tiny_models import CONTEXT, VOCABULARY, build

from dougong.core.errors import ConfigError
from dougong.generate import Engine, Request, SamplingConfig, Scheduler
from dougong.generate.lanes import BLOCK, Lane

GREEDY = SamplingConfig(temperature=0, max_tokens=20)
CONFIGS = [GREEDY, SamplingConfig(max_tokens=12, seed=3),
           SamplingConfig(max_tokens=20, seed=5, repetition_penalty=1.4, top_p=0.95),
           SamplingConfig(max_tokens=9, seed=1, temperature=0.7, top_k=20, min_p=0.01),
           SamplingConfig(max_tokens=20, temperature=0, frequency_penalty=1.5, presence_penalty=0.5),
           SamplingConfig(max_tokens=70, temperature=0, at_context_end="slide"),
           SamplingConfig(max_tokens=14, seed=2, logit_bias=((3, -100.0), (7, 4.0)))]


def alone(engine, request):
    """The text that the static batch writes for this request."""
    decoding = engine.start([request.prompt], request.sampling, stop_ids=request.stop_ids, samples=[request.sample])
    tokens = [token for [token] in decoding]
    return [token.id for token in tokens], tokens[-1].finish


def run(scheduler, arrivals, after_step=lambda step: None):
    """Steps until nobody is left; `arrivals` are (step, request). Returns [(tokens, finish)] in order of arrival."""
    arrivals, texts, finish = list(arrivals), {}, {}
    for step in range(5000):
        while arrivals and arrivals[0][0] <= step:
            texts[scheduler.add(arrivals.pop(0)[1])] = []
        for token in scheduler.step():
            assert token.row not in finish, "a token after the end"
            if token.id >= 0:
                texts[token.row].append(token.id)
            if token.finish:
                finish[token.row] = token.finish
        check_books(scheduler)
        after_step(step)
        if not arrivals and not scheduler.waiting and not scheduler.running:
            return [(text, finish.get(id)) for id, text in texts.items()]
    raise AssertionError("requests did not end")


def check_books(scheduler):
    """Every block is accounted for: by a row with a lane of that width, or by a kept prefix."""
    lanes = [*scheduler._lanes.values(), *scheduler._alone]
    lanes += [row.lane for row in scheduler._reading if row.lane.members]
    unread = [row for row in scheduler._reading if not row.lane.members]
    held = sum(len(lane.members) * lane.width for lane in lanes) + sum(row.lane.width for row in unread)
    assert held == scheduler._used * BLOCK and scheduler._used + len(scheduler.prefixes) <= scheduler.blocks
    assert all(lane.members and max(lane.lengths) <= lane.end <= lane.width for lane in lanes)
    assert scheduler.running == sum(len(lane.members) for lane in lanes) + len(unread)


def check_nothing_is_left(scheduler):
    assert scheduler.free_blocks == scheduler.blocks and not scheduler._rows
    assert not scheduler._lanes and not scheduler._alone and not scheduler._reading and not scheduler._waiting
    assert scheduler.nbytes == scheduler.prefixes.nbytes


def short_requests(count, seed):
    chance = random.Random(seed)
    return [Request([chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 30))], chance.choice(CONFIGS),
                    stop_ids=frozenset({chance.randrange(VOCABULARY)}), sample=chance.randrange(3),
                    speculate=chance.choice([0, 0, 3])) for _ in range(count)]


def long_requests(count, seed):
    """Prompts of up to 300 tokens, many with the same beginning or repetitions."""
    chance = random.Random(seed)
    stems = [[chance.randrange(VOCABULARY) for _ in range(200)] for _ in range(2)]
    requests = []
    for _ in range(count):
        prompt = chance.choice([*stems, []])[:chance.randint(0, 200)]
        prompt = prompt + [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 100))]
        prompt = prompt + prompt[:chance.choice([0, 40])]
        sampling = SamplingConfig(max_tokens=chance.randint(1, 120), temperature=chance.choice([0.0, 1.0]),
                                  seed=chance.randrange(9))
        requests.append(Request(prompt, sampling, speculate=chance.choice([0, 4])))
    return requests


def test_a_text_is_the_same_whatever_else_runs(model):
    engine, chance = Engine(model), random.Random(1)
    requests = short_requests(20, seed=1)
    steps = sorted(chance.randrange(40) for _ in requests)
    scheduler = Scheduler(engine, max_rows=7, chunk=8)
    assert run(scheduler, zip(steps, requests)) == [alone(engine, request) for request in requests]
    check_nothing_is_left(scheduler)


@pytest.mark.parametrize("name", ["qwen3", "nano", "alibi"])
def test_texts_survive_lanes_shared_beginnings_preemption_and_neighbours_who_leave(name):
    engine, chance = Engine(build(name, context=512)), random.Random(2)
    requests = long_requests(16, seed=2)
    steps = sorted(chance.randrange(40) for _ in requests)
    scheduler = Scheduler(engine, max_rows=8, chunk=64, cache_tokens=704)
    seen, cancelled, sent_back, send_back = set(), set(), [], scheduler._send_back
    scheduler._send_back = lambda row: (sent_back.append(row.id), send_back(row))

    def leave(step):
        seen.add(len(scheduler._lanes))
        if step % 40 == 39 and scheduler._rows:
            cancelled.add(id := chance.choice(list(scheduler._rows)))
            scheduler.cancel(id)

    for id, (text, finish) in enumerate(run(scheduler, zip(steps, requests), leave)):
        expected = alone(engine, requests[id])
        assert text == expected[0][:len(text)] if id in cancelled else (text, finish) == expected
    check_nothing_is_left(scheduler)
    assert sent_back and cancelled and max(seen) > 1 and scheduler.cached_tokens


@pytest.mark.parametrize("seed", range(6))
def test_nothing_leaks_whatever_is_added_and_cancelled(seed):
    engine, chance = Engine(build("qwen3", context=512)), random.Random(seed)
    scheduler = Scheduler(engine, max_rows=chance.randint(1, 8), chunk=chance.choice([32, 100]),
                          cache_tokens=chance.choice([512, 700, 2048]))
    requests = long_requests(12, seed)
    for _ in range(120):
        if requests and chance.random() < 0.3:
            scheduler.add(requests.pop())
        if scheduler._rows and chance.random() < 0.1:
            scheduler.cancel(chance.choice(list(scheduler._rows)))
        scheduler.step()
        check_books(scheduler)
    for id in list(scheduler._rows):
        scheduler.cancel(id)
    check_nothing_is_left(scheduler)


def test_the_newest_gives_way_and_is_written_all_the_same():
    engine = Engine(build("qwen3", context=512))
    requests = [Request([i + 1] * 70, SamplingConfig(max_tokens=100, seed=i)) for i in range(3)]
    scheduler, waited = Scheduler(engine, cache_tokens=7 * BLOCK), []
    texts = run(scheduler, [(0, request) for request in requests],
                lambda step: waited.append([row.id for row in scheduler._waiting]))
    assert texts == [alone(engine, request) for request in requests]
    assert [2] in waited and not any(0 in row for row in waited)


def test_a_row_that_moves_to_a_lane_as_wide_as_that_of_one_it_sent_back_is_written_to_its_end():
    engine = Engine(build("qwen3", context=512))
    requests = [Request([*range(1, 31)], SamplingConfig(temperature=0, max_tokens=200)),
                Request([1 + i % 60 for i in range(100)], SamplingConfig(temperature=0, max_tokens=60))]
    scheduler = Scheduler(engine, cache_tokens=5 * BLOCK)
    assert run(scheduler, zip((0, 90), requests)) == [alone(engine, request) for request in requests]
    check_nothing_is_left(scheduler)


def test_a_long_prompt_does_not_stall_the_others():
    engine = Engine(build("qwen3", context=512))
    scheduler, read = Scheduler(engine, chunk=32), []
    engine.model.stem.register_forward_hook(lambda module, inputs, output: read.append(output.shape[1]))
    first = scheduler.add(Request([5], SamplingConfig(max_tokens=40)))
    scheduler.step()
    second = scheduler.add(Request(list(range(60)) * 5, GREEDY))
    steps = []
    while not steps or second not in steps[-1]:
        steps.append([token.row for token in scheduler.step()])
    assert len(steps) == 10 and all(first in step for step in steps) and max(read) == 32


def test_short_prompts_are_read_side_by_side(model):
    """In one forward where little of it is padding; never more than a chunk, nor past a row's context or lane."""
    engine, read = Engine(model), []
    engine.model.stem.register_forward_hook(lambda module, inputs, output: read.append(tuple(output.shape[:2])))
    lengths = [20, 22, 3, 18, CONTEXT, 22, CONTEXT - 1, 22]
    requests = [Request([(7 * i + j * j) % VOCABULARY for j in range(length)], CONFIGS[i % len(CONFIGS)], sample=i % 2)
                for i, length in enumerate(lengths)]
    scheduler = Scheduler(engine, chunk=100)
    texts = run(scheduler, [(0, request) for request in requests])
    prompts = [shape for shape in read if shape[1] > 1]
    assert prompts[:4] == [(4, 22), (1, 3), (2, CONTEXT), (1, 22)], prompts
    assert texts == [alone(engine, request) for request in requests]
    check_nothing_is_left(scheduler)


@pytest.mark.parametrize("length", [20, 90])
def test_rows_that_come_or_grow_together_are_given_place_once(monkeypatch, length):
    """From the prompts' own lanes into one, and later together into a wider one."""
    engine, grown = Engine(build("qwen3", context=512)), []
    resize = Lane._resize
    monkeypatch.setattr(Lane, "_resize", lambda lane, store, layer, like, rows: (
        grown.append(rows) if rows > len(store.get(layer, ())) else None, resize(lane, store, layer, like, rows)))
    requests = [Request([i + 1] * length, SamplingConfig(max_tokens=60, seed=i)) for i in range(8)]
    texts = run(Scheduler(engine, chunk=1024), [(0, request) for request in requests])
    assert grown == [8] * (2 * 3 * (1 if length == 20 else 2)), "keys and values of three layers"
    assert texts == [alone(engine, request) for request in requests]


def test_padding_reaches_no_place_beyond_the_context():
    engine = Engine(build("gpt2", context=512))        # learned positions: there is none for one too many
    scheduler, read = Scheduler(engine, chunk=73), []
    engine.model.stem.register_forward_hook(lambda module, inputs, output: read.append(tuple(output.shape[:2])))
    requests = [Request([i + 1] * length, SamplingConfig(max_tokens=3, seed=i))
                for i, length in enumerate([512, 2, 2, 2, 1])]
    texts = run(scheduler, [(0, request) for request in requests])
    assert read[:9] == [(1, 73)] * 7 + [(2, 1), (3, 2)], read
    assert texts == [alone(engine, request) for request in requests]


def test_a_row_with_nan_harms_no_prompt_beside_it(qwen3):
    engine = Engine(qwen3)
    bad, good = [5] * 20, [9] * 21
    expected = alone(engine, Request(good, GREEDY))
    engine.model.stem.register_forward_hook(
        lambda module, inputs, output: output.masked_fill((inputs[0] == 5)[..., None], torch.nan))
    scheduler = Scheduler(engine)
    first, second = scheduler.add(Request(bad, GREEDY)), scheduler.add(Request(good, GREEDY))
    told = []
    while scheduler.running + scheduler.waiting:
        told += scheduler.step()
    assert [token.finish for token in told if token.row == first] == ["error"]
    assert [token.id for token in told if token.row == second] == expected[0]


def test_a_beginning_that_was_read_is_not_read_again():
    engine = Engine(build("qwen3", context=512))
    scheduler, read = Scheduler(engine), []
    engine.model.stem.register_forward_hook(lambda module, inputs, output: read.append(output.shape[1]))
    beginning = [random.Random(3).randrange(VOCABULARY) for _ in range(150)]
    for ending, expected in [([1, 2], 152), ([3], 23), ([1, 2], 24), (None, 64)]:
        read.clear()
        request = Request(beginning + ending if ending else beginning[:128], GREEDY)
        assert run(scheduler, [(0, request)]) == [alone(engine, request)]
        assert read[0] == expected     # two blocks of 64 are known; the last token is always read


def test_a_row_with_nan_ends_alone(qwen3):
    engine, others = Engine(qwen3), [Request([5, 9, i], SamplingConfig(max_tokens=20, seed=i)) for i in range(3)]
    expected = [alone(engine, request) for request in others]
    with torch.no_grad():
        engine.model.stem.tokens.weight[66] = torch.nan    # the head has its own copy
    scheduler = Scheduler(engine)
    sick = Request([5, 66, 4], SamplingConfig(max_tokens=5))
    ill_later = Request([8, 8], SamplingConfig(temperature=0, max_tokens=5, logit_bias=((66, 100.0),)))
    texts = run(scheduler, [(0, sick), (0, others[0]), (1, ill_later), (2, others[1]), (3, sick), (4, others[2])])
    assert [texts[i] for i in (1, 3, 5)] == expected
    assert texts[0] == texts[4] == ([], "error") and texts[2] == ([66], "error")
    check_nothing_is_left(scheduler)


def test_numbers_of_a_row_with_nan_are_not_kept_for_others():
    engine = Engine(build("qwen3", context=512))
    with torch.no_grad():
        engine.model.stem.tokens.weight[66] = torch.nan
    scheduler = Scheduler(engine)
    assert run(scheduler, [(0, Request([1] * 100 + [66] * 30, GREEDY))]) == [([], "error")]
    assert scheduler.cached_tokens == 0


def test_an_error_says_why(qwen3):
    class Broken:
        def allowed(self):
            raise RuntimeError("no such rule")

        def accept(self, token):
            pass

    scheduler = Scheduler(Engine(qwen3))
    scheduler.add(Request([5], GREEDY, constraint=Broken()))
    other = scheduler.add(Request([5], GREEDY))
    tokens = {token.row: token for token in scheduler.step()}
    assert tokens[0].finish == "error" and "no such rule" in tokens[0].error
    assert tokens[other].error is None and scheduler.running == 1


def test_requests_can_leave_at_any_time(qwen3):
    scheduler = Scheduler(Engine(qwen3), max_rows=2, chunk=4)
    ids = [scheduler.add(Request([3] * 10, GREEDY)) for _ in range(4)]
    scheduler.cancel(ids[3])                                    # waiting
    assert scheduler.step() == [] and scheduler.running == 2
    scheduler.cancel(ids[0])                                    # being read
    while not (tokens := scheduler.step()):
        pass
    assert [token.row for token in tokens] == [ids[1]]
    scheduler.cancel(ids[1])                                    # writing
    scheduler.cancel(ids[1])
    scheduler.cancel(12345)
    assert {token.row for _ in range(30) for token in scheduler.step()} == {ids[2]}
    check_nothing_is_left(scheduler)


@pytest.mark.parametrize("prompt, sampling, match", [
    ([], GREEDY, "no tokens"), ([1] * (CONTEXT + 1), GREEDY, f"{CONTEXT + 1} tokens"),
    ([1, VOCABULARY], GREEDY, f"0 to {VOCABULARY - 1}"), ([1, -1], GREEDY, "the token -1")])
def test_what_can_never_run_is_refused(qwen3, prompt, sampling, match):
    scheduler = Scheduler(Engine(qwen3))
    with pytest.raises(ConfigError, match=match):
        scheduler.add(Request(prompt, sampling))
    assert not scheduler.waiting


def test_what_the_cache_cannot_hold_is_refused_and_what_just_fits_is_written():
    engine = Engine(build("qwen3", context=512))
    scheduler = Scheduler(engine, cache_tokens=3 * BLOCK)
    with pytest.raises(ConfigError, match="193 places of the cache, which has 192"):
        scheduler.add(Request([1] * 100, SamplingConfig(max_tokens=93)))
    request = Request([1] * 100, SamplingConfig(max_tokens=92, temperature=0))
    assert run(scheduler, [(0, request)] * 2) == [alone(engine, request)] * 2


@pytest.mark.parametrize("speculate", [0, 4])
@pytest.mark.parametrize("at_context_end", ["stop", "slide"])
def test_a_prompt_that_fills_the_context_and_the_cache_is_written(at_context_end, speculate):
    engine = Engine(build("qwen3", context=2 * BLOCK))
    request = Request([1 + i % 60 for i in range(2 * BLOCK)], speculate=speculate,
                      sampling=SamplingConfig(temperature=0, max_tokens=80, at_context_end=at_context_end))
    scheduler = Scheduler(engine, cache_tokens=2 * BLOCK)
    assert run(scheduler, [(0, request)]) == [alone(engine, request)]
    check_nothing_is_left(scheduler)


def test_guessing_beyond_the_cache_sends_nobody_back():
    engine = Engine(build("qwen3", context=512))
    request = Request([1, 2, 3, 4] * 15, SamplingConfig(temperature=0, max_tokens=68), speculate=20)
    scheduler, sent_back = Scheduler(engine, cache_tokens=2 * BLOCK), []
    scheduler._send_back = sent_back.append
    assert run(scheduler, [(0, request)]) == [alone(engine, request)] and not sent_back


def test_logprobs_are_the_models_own(qwen3):
    sampling = SamplingConfig(max_tokens=6, temperature=0.5, top_k=3, repetition_penalty=1.5, logprobs=2)
    scheduler, text = Scheduler(Engine(qwen3)), [5, 9]
    scheduler.add(Request(text, sampling))
    scheduler.add(Request([7], GREEDY))
    while scheduler.running + scheduler.waiting:
        for token in scheduler.step():
            if token.row == 0:
                with torch.no_grad():
                    expected = qwen3(torch.tensor([text]))[0, -1].log_softmax(-1)
                assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-4)
                assert [id for id, _ in token.alternatives] == expected.topk(2).indices.tolist()
                text = [*text, token.id]
            else:
                assert token.logprob is None


def test_guessing_ahead_takes_fewer_steps_and_changes_nothing():
    engine, calls = Engine(build("qwen3", context=512)), []
    prompt = [1, 2, 3, 4, 5] * 8
    bias = tuple((id, 8.0) for id in (1, 2, 3))     # a small world repeats itself
    for sampling in (SamplingConfig(temperature=0, max_tokens=120, logit_bias=bias),
                     SamplingConfig(temperature=0.3, max_tokens=120, seed=4, logit_bias=bias)):
        expected = alone(engine, Request(prompt, sampling))
        hook = engine.model.stem.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
        scheduler = Scheduler(engine)
        assert run(scheduler, [(0, Request(prompt, sampling, speculate=6))]) == [expected]
        hook.remove()
        assert len(calls) < 100 and max(calls[1:]) > 1
        calls.clear()


def test_sampled_guesses_have_the_models_distribution():
    model = build("qwen3", vocab_size=4, num_layers=1)
    prompt, count, sampling = [1, 2, 3, 0, 1, 2, 3, 0, 1, 2], 600, SamplingConfig(max_tokens=3, seed=11, temperature=4)
    with torch.no_grad():
        first = (model(torch.tensor([prompt]))[0, -1].double() / 4).softmax(-1)
        second = torch.stack([(model(torch.tensor([[*prompt, t]]))[0, -1].double() / 4).softmax(-1) for t in range(4)])
    expected = (first[:, None] * second).flatten()
    scheduler, guessed, observed = Scheduler(Engine(model), max_rows=50), [], torch.zeros(16)
    write_guessed = scheduler._write_guessed
    scheduler._write_guessed = lambda guesses: guessed.append(written := write_guessed(guesses)) or written
    for text, _ in run(scheduler, [(0, Request(prompt, sampling, sample=i, speculate=2)) for i in range(count)]):
        observed[4 * text[0] + text[1]] += 1
    assert guessed and all(e * count > 5 for e in expected.tolist())
    assert chisquare(observed.numpy(), (expected * count).numpy()).pvalue > 1e-3
