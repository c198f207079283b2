import pytest
import torch
from tiny_models import CONTEXT, VOCABULARY, build

from dougong.core.errors import ConfigError
from dougong.generate import Engine, KVCache, SamplingConfig
from dougong.runtime.device import Runtime

PROMPTS = [[5, 9, 1], [2] * 11, [7], [30, 31, 32, 33, 34, 35], [40, 41, 42, 2, 5]]
GREEDY = SamplingConfig(temperature=0, max_tokens=20)


def written(model, prompts, config, **options):
    """Tokens and finish of each row."""
    tokens, finish = [[] for _ in prompts], [None] * len(prompts)
    for step in Engine(model).start(prompts, config, **options):
        for token in step:
            tokens[token.row].append(token.id)
            finish[token.row] = token.finish
    return tokens, finish


def close(a, b):
    """Equal within 1e-5 of the largest logit; a NaN is never close."""
    return bool(((a - b).abs() <= 1e-5 * b.abs().max()).all())


@torch.no_grad()
def test_cached_logits_equal_uncached_ones(model):
    tokens = torch.randint(0, VOCABULARY, (3, 40))
    expected, cache = model(tokens), KVCache()
    pieces = [model(tokens[:, a:b], cache=cache) for a, b in [(0, 7), (7, 8), (8, 9), (9, 30), (30, 40)]]
    assert cache.length == 40 and close(torch.cat(pieces, 1), expected)


@torch.no_grad()
def test_padded_rows_equal_rows_read_alone(model):
    width = max(map(len, PROMPTS))
    tokens = torch.full((len(PROMPTS), width), 60)
    for row, prompt in zip(tokens, PROMPTS):
        row[width - len(prompt):] = torch.tensor(prompt)
    cache = KVCache(start_B=torch.tensor([width - len(prompt) for prompt in PROMPTS]))
    steps = [model(tokens, cache=cache)[:, -1]]
    steps += [model(torch.full((len(PROMPTS), 1), t), cache=cache)[:, -1] for t in (3, 50, 8)]
    for b, prompt in enumerate(PROMPTS):
        alone = model(torch.tensor([[*prompt, 3, 50, 8]]))[0, len(prompt) - 1:]
        assert close(torch.stack([step[b] for step in steps]), alone)


@torch.no_grad()
def test_greedy_tokens_are_the_most_likely_ones_of_the_whole_text(model):
    tokens, finish = written(model, PROMPTS, GREEDY)
    assert finish == ["length"] * len(PROMPTS)
    for prompt, row in zip(PROMPTS, tokens):
        text = list(prompt)
        for token in row:
            top = model(torch.tensor([text]))[0, -1].topk(2)
            assert token == top.indices[0] or top.values[0] - top.values[1] <= 1e-5 * top.values.abs().max()
            text.append(token)


@pytest.mark.parametrize("config", [GREEDY, SamplingConfig(max_tokens=20, seed=3),
                                    SamplingConfig(max_tokens=20, repetition_penalty=1.4, top_p=0.95)])
def test_a_row_does_not_depend_on_its_neighbours(model, config):
    together, _ = written(model, PROMPTS, config)
    assert together == [written(model, [prompt], config)[0][0] for prompt in PROMPTS]
    assert together[::-1] == written(model, PROMPTS[::-1], config)[0]
    assert len({tuple(row) for row in together}) > 1


def test_rows_that_finish_early_leave_the_others_as_they_were(qwen3):
    free, _ = written(qwen3, PROMPTS, GREEDY)
    stop_ids = {free[0][4], free[3][9]}
    tokens, finish = written(qwen3, PROMPTS, GREEDY, stop_ids=stop_ids)
    for row, whole, reason in zip(tokens, free, finish):
        ends = [i for i, token in enumerate(whole) if token in stop_ids]
        assert row == (whole[:ends[0] + 1] if ends else whole)
        assert reason == ("stop" if ends else "length")
    assert len({len(row) for row in tokens}) > 1


def test_the_batch_shrinks_when_rows_are_stopped(qwen3):
    decoding = Engine(qwen3).start(PROMPTS, GREEDY)
    sizes = []
    for step in decoding:
        sizes.append(len(step))
        decoding.stop(len(sizes) - 1)   # row i leaves after step i
    assert sizes == [5, 4, 3, 2, 1]


def test_seeds_and_samples_differ_and_repeat(qwen3):
    def rows(seed, samples):
        config = SamplingConfig(seed=seed, max_tokens=12)
        return written(qwen3, [[5, 9]] * len(samples), config, samples=samples)[0]

    several = rows(1, [0, 1, 2])
    assert len({tuple(row) for row in several}) == 3 and rows(1, [2, 1, 0]) == several[::-1]
    assert rows(2, [0]) != rows(1, [0])


def test_equal_prompts_are_read_once(qwen3):
    engine = Engine(qwen3)
    rows_read = []
    engine.model.stem.register_forward_hook(lambda module, inputs, output: rows_read.append(len(output)))
    list(engine.start([[5, 9], [7], [5, 9]], SamplingConfig(temperature=0, max_tokens=2)))
    assert rows_read == [2, 3]


def test_a_full_context_ends_the_row_and_says_so(model):
    prompt = [3] * (CONTEXT - 4)
    tokens, finish = written(model, [prompt, [3]], SamplingConfig(temperature=0, max_tokens=100))
    assert finish == ["context", "context"]
    assert [len(row) for row in tokens] == [5, CONTEXT]   # the last token needs no place: nothing reads it


def test_sliding_reads_the_latest_half_again_and_goes_on(model):
    config = SamplingConfig(temperature=0, max_tokens=70, at_context_end="slide")
    prompts = [[3] * (CONTEXT - 4), [8, 9]]
    together, finish = written(model, prompts, config)
    assert finish == ["length"] * 2
    assert together == [written(model, [prompt], config)[0][0] for prompt in prompts]
    text, window = list(prompts[0]), 0
    with torch.no_grad():
        for token in together[0]:
            if len(text) - window > CONTEXT:
                window = len(text) - CONTEXT // 2
            top = model(torch.tensor([text[window:]]))[0, -1].topk(2)
            assert token == top.indices[0] or top.values[0] - top.values[1] <= 1e-5 * top.values.abs().max()
            text.append(token)


def test_a_long_prompt_is_refused_or_keeps_its_end(qwen3):
    prompt = [4, *range(CONTEXT)]
    with pytest.raises(ConfigError, match=f"{CONTEXT + 1} tokens"):
        Engine(qwen3).start([prompt], GREEDY)
    cut = SamplingConfig(temperature=0, max_tokens=5, long_prompt="truncate")
    assert written(qwen3, [prompt], cut)[0] == written(qwen3, [prompt[1:]], cut)[0]


def test_an_empty_prompt_is_refused(qwen3):
    with pytest.raises(ConfigError, match="no tokens"):
        Engine(qwen3).start([[]], GREEDY)


def test_a_token_the_model_does_not_know_is_refused(qwen3):
    for prompt, vocab_size, known in (([5, VOCABULARY], None, VOCABULARY), ([5, -1], None, VOCABULARY), ([60], 60, 60)):
        with pytest.raises(ConfigError, match=f"the token {prompt[-1]}; the model knows 0 to {known - 1}"):
            Engine(qwen3).start([[1], prompt], GREEDY, vocab_size=vocab_size)


def test_logprobs_are_the_models_own_whatever_the_sampling(qwen3):
    config = SamplingConfig(max_tokens=6, temperature=0.5, top_k=3, repetition_penalty=1.5, logprobs=2)
    text = [5, 9]
    for [token] in Engine(qwen3).start([text], config):
        with torch.no_grad():
            expected = qwen3(torch.tensor([text]))[0, -1].log_softmax(-1)
        assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-4)
        assert [id for id, _ in token.alternatives] == expected.topk(2).indices.tolist()
        text.append(token.id)


def test_ids_beyond_the_vocabulary_are_never_chosen(qwen3):
    with torch.no_grad():
        qwen3.stem.tokens.weight[60:] *= 50
    assert max(written(qwen3, PROMPTS, GREEDY)[0][0]) >= 60
    assert max(map(max, written(qwen3, PROMPTS, GREEDY, vocab_size=60)[0])) < 60


def test_the_engine_leaves_the_model_as_it_was(model):
    model.train()
    before = {name: (p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    engine = Engine(model, Runtime(dtype=torch.bfloat16))
    list(engine.start(PROMPTS, GREEDY))
    assert {name: (p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()} == before
    assert all(module.training for module in model.modules()) and model.compute_dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in engine.model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()   # tables made while decoding do not hinder training


@torch.no_grad()
def test_fused_parts_equal_the_models(model):
    engine, tokens = Engine(model), torch.randint(0, VOCABULARY, (3, 20))
    assert close(engine.model(tokens), model(tokens))
    for rows in (1, 3):
        cache, plain = KVCache(), KVCache()
        for a, b in [(0, 9), (9, 10), (10, 11), (11, 20)]:
            ours = engine.model(tokens[:rows, a:b], cache=cache)
            assert close(ours, model(tokens[:rows, a:b], cache=plain))


def test_bf16_decoding_equals_bf16_forwards():
    model = build("qwen3")
    engine = Engine(model, Runtime(dtype=torch.bfloat16))
    model.compute_dtype = torch.bfloat16
    cache, tokens = KVCache(), torch.randint(0, VOCABULARY, (2, 30))
    with torch.no_grad():
        exact = build("qwen3").double()
        exact.compute_dtype = torch.float64
        exact = exact(tokens)
        pieces = torch.cat([engine.model(tokens[:, a:a + 1], cache=cache) for a in range(30)], 1)
        error, allowed = (pieces - exact).square().mean(), (model(tokens) - exact).square().mean()
    assert error <= 2 * allowed   # cached bf16 is no further from float64 than a plain bf16 forward


@pytest.mark.parametrize("heads, width, begin", [(1, 9, 0), (1, 12, 2), (3, 10, 1), (2, 80, 40)])
def test_one_bf16_query_attends_as_pytorch_s_kernel_does(heads, width, begin):
    import torch.nn.functional as F

    from dougong.generate.fused import _one_query

    q = torch.randn(3, 2, heads, 16).bfloat16()
    k, v = (torch.randn(4, 2, width, 16).bfloat16()[:3, :, begin:begin + 9] for _ in range(2))   # of a cache's store
    hidden = torch.arange(9) < torch.tensor([0, 2, 5])[:, None, None, None]
    bias = torch.zeros(3, 1, 1, 9).masked_fill(hidden, -torch.inf)
    for mask in (None, bias.bfloat16()):
        wide = None if mask is None else mask.double()
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=wide)
        theirs = (F.scaled_dot_product_attention(q, k, v, attn_mask=mask).double() - exact).norm()
        mine = (_one_query(q, k, v, attn_mask=mask).double() - exact).norm()
        # Rounds the scores and the weights where the kernel keeps them in float32: a few roundings of bf16 (2^-8).
        assert torch.isfinite(mine) and mine <= max(4 * theirs, 4 * 2**-8 * exact.norm())
