"""A smaller model's guesses: greedy texts are the model's own, drawn ones have its distribution, with fewer steps."""

import random

import pytest
import torch
from scipy.stats import chisquare
from test_scheduler import alone, check_nothing_is_left, long_requests, run, short_requests
from tiny_models import build

from dougong.core.errors import ConfigError
from dougong.data.tokenizer import BytesConfig
from dougong.generate import Engine, Request, SamplingConfig, Scheduler, generate
from dougong.generate.draft_model import DraftModel
from dougong.generate.sampling import Draws, accept


def noisy(model, amount, seed=3):
    """A draft that is often right: the model itself, disturbed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * parameter.std().nan_to_num() * torch.randn_like(parameter))
    return model


def test_a_draft_of_a_draw_becomes_a_draw_of_the_model():
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]).double(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    draws, count, rng = Draws(5), torch.zeros(4), torch.Generator().manual_seed(1)
    for guess in torch.multinomial(q, 4000, replacement=True, generator=rng).tolist():
        count[accept(p, q, guess, (draws.next(), draws.next()))] += 1
    assert count[3] == 0
    assert chisquare(count[:3].numpy(), (p[:3] * 4000).numpy()).pvalue > 1e-3
    assert all(accept(q, q, 2, (draws.next(), 0.5)) == 2 for _ in range(50))


def test_a_law_that_is_not_finite_refuses_the_guess_for_a_draw_of_the_model():
    p, draws, count = torch.tensor([0.5, 0.3, 0.2, 0.0]).double(), Draws(5), torch.zeros(4)
    for _ in range(4000):
        count[accept(p, torch.full((4,), torch.nan).double(), 3, (draws.next(), draws.next()))] += 1
    assert count[3] == 0 and chisquare(count[:3].numpy(), (p[:3] * 4000).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_with_nan_guesses_nothing_and_no_text_suffers(temperature):
    model, draft = build("qwen3", tied=False), build("qwen3", tied=False)
    with torch.no_grad():
        draft.stem.tokens.weight[5] = torch.nan
    engine = Engine(model)
    settings = {"max_tokens": 20, "temperature": temperature}
    ill = Request([1, 2, 5], SamplingConfig(**settings), speculate=4)
    later = Request([1, 2], SamplingConfig(**settings, logit_bias=((5, 100.0),)), speculate=4)
    well = Request([3, 4], SamplingConfig(**settings), speculate=4)
    scheduler = Scheduler(engine, draft=Engine(draft))
    texts = run(scheduler, [(0, request) for request in (ill, later, well)])
    assert texts[0] == alone(engine, ill) and texts[1] == ([5] * 20, "length")
    assert len(texts[2][0]) == 20 and scheduler.free_blocks == scheduler.blocks


def test_the_draft_goes_on_drawing_where_the_context_slides():
    """All tokens are equally likely, and the draft is the model: each token is one of its draws."""
    model = build("qwen3", context=32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(parameter.ndim < 2)
    engine = Engine(model)
    request = Request([1, 2, 3], SamplingConfig(max_tokens=90, seed=3, at_context_end="slide"), speculate=4)
    [(text, _)] = run(Scheduler(engine, draft=engine), [(0, request)])
    assert len({tuple(text[t:t + 4]) for t in range(len(text) - 3)}) == len(text) - 3, "draws began again"


@pytest.mark.parametrize("temperature, amount", [(4.0, 0.3), (2.0, 3.0)])
def test_drawn_texts_have_the_models_distribution(temperature, amount):
    shape = {"vocab_size": 4, "num_layers": 1}
    model, draft = build("qwen3", **shape), noisy(build("qwen3", **shape), amount)
    prompt, count = [1, 2, 3, 0, 1], 700
    sampling = SamplingConfig(max_tokens=3, seed=11, temperature=temperature)

    def law(*more):
        return (model(torch.tensor([[*prompt, *more]]))[0, -1].double() / temperature).softmax(-1)

    with torch.no_grad():
        expected = torch.stack([law()[a] * law(a)[b] * law(a, b) for a in range(4) for b in range(4)]).flatten()
    scheduler, observed = Scheduler(Engine(model), max_rows=40, draft=Engine(draft), guessing=40), torch.zeros(64)
    for text, _ in run(scheduler, [(0, Request(prompt, sampling, sample=i, speculate=2)) for i in range(count)]):
        observed[16 * text[0] + 4 * text[1] + text[2]] += 1
    rare = expected * count < 5      # chi-square wants at least five
    expected, observed = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (expected * count, observed)]
    assert len(expected) > 12 and chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3
    check_nothing_is_left(scheduler)


@pytest.mark.parametrize("name, other, context", [("qwen3", "gpt2", 48), ("nano", "qwen3", 48), ("qwen3", "qwen3", 24)])
def test_greedy_texts_are_the_models_own_whatever_else_runs(name, other, context):
    engine, draft, chance = Engine(build(name)), Engine(noisy(build(other, context=context), 0.1)), random.Random(1)
    requests = [request for request in short_requests(24, seed=4) if request.sampling.temperature == 0]
    requests = [Request(r.prompt, r.sampling, r.stop_ids, speculate=chance.choice([0, 1, 3, 5])) for r in requests]
    scheduler = Scheduler(engine, max_rows=5, chunk=8, draft=draft)
    steps = sorted(chance.randrange(20) for _ in requests)
    assert run(scheduler, zip(steps, requests)) == [alone(engine, request) for request in requests]
    check_nothing_is_left(scheduler)


def test_texts_survive_preemption_and_the_draft_reads_the_text_and_nothing_else(monkeypatch):
    """Every guess is compared with the draft's own reading of the whole text from nothing."""
    model, small = build("qwen3", context=512), noisy(build("qwen3", context=512), 0.1)
    draw, checked = DraftModel._draw, []

    def compared(self, row, logits_V, guess):
        whole = small(torch.tensor([[*row.text, *guess.tokens]]))[0, -1]
        torch.testing.assert_close(logits_V, whole, rtol=1e-3, atol=1e-3)
        checked.append(len(guess.tokens))
        draw(self, row, logits_V, guess)

    monkeypatch.setattr(DraftModel, "_draw", compared)
    requests = [Request(r.prompt, SamplingConfig(max_tokens=20, temperature=0), speculate=4)
                for r in long_requests(7, seed=5)]
    scheduler, sent_back = Scheduler(Engine(model), max_rows=4, chunk=64, draft=Engine(small)), []

    def preempt(step):
        if step in (9, 14):
            sent_back.append(row := next(row for row in reversed(scheduler._rows.values()) if row.lane is not None))
            with torch.inference_mode():
                scheduler._send_back(row)

    with torch.no_grad():
        texts = run(scheduler, [(0, request) for request in requests], preempt)
    assert texts == [alone(scheduler.engine, request) for request in requests]
    assert sent_back and len(checked) > 30 and max(checked) == 3
    check_nothing_is_left(scheduler)


def test_a_good_draft_saves_steps():
    model = build("qwen3", context=512)
    engine = Engine(model)
    request = Request([1, 2, 3], SamplingConfig(max_tokens=60, seed=2, temperature=0.8), speculate=4)
    calls, read_each = [], engine.read_each
    engine.read_each = lambda *a: calls.append(1) or read_each(*a)
    [(text, _)] = run(Scheduler(engine, draft=Engine(model)), [(0, request)])
    assert len(text) == 60 and len(calls) <= 13        # the model guesses for itself: always right, five a step


def test_a_draft_of_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="the draft knows 31 tokens, the model 67"):
        Scheduler(Engine(build("qwen3")), draft=Engine(build("qwen3", vocab_size=31)))


def test_generate_with_a_draft():
    model = build("qwen3", vocab_size=257, context=128)
    draft = Engine(noisy(build("qwen3", vocab_size=257, context=128), 0.1))
    tokenizer, sampling = BytesConfig().build(), SamplingConfig(max_tokens=20, temperature=0, stop=("zq",), logprobs=1)
    prompts, pieces = ["one", "another text"], {0: "", 1: ""}
    plain = generate(model, tokenizer, prompts, sampling)
    drafted = generate(model, tokenizer, prompts, sampling, draft=draft, speculate=3,
                       stream=lambda i, piece: pieces.update({i: pieces[i] + piece}))
    for a, b in zip(plain, drafted):
        assert (a.text, a.tokens, a.finish_reason) == (b.text, b.tokens, b.finish_reason) and b.seconds > 0
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert list(pieces.values()) == [result.text for result in drafted]
    with pytest.raises(ConfigError, match="speculate"):
        generate(model, tokenizer, prompts, sampling, draft=draft, speculate=0)
