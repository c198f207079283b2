"""Distillation against torch.nn.functional.kl_div and autograd in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.models.families.qwen3 import Qwen3Config
from dougong.objectives.distil import Distil, DistilConfig, projection_name
from dougong.objectives.divergence import DIVERGENCES, NextByte, Top, Whole, byte_probabilities, top_of

V, N, B, T = 11, 7, 3, 5


def reference(name, log_p, log_q):
    """Nats of each row by torch's own kl_div, whose arguments are (input, target) = (log q, p) for KL(p ‖ q)."""
    def kl(a, b):
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    if name == "js":
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        return (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    return kl(log_p, log_q) if name == "forward" else kl(log_q, log_p)


def logits(*shape, scale=2.0):
    return torch.randn(*shape, dtype=torch.float64) * scale


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_divergence_and_its_gradient_are_torchs(name, temperature):
    ours, theirs = logits(N, V).requires_grad_(), logits(N, V)
    expected = reference(name, (theirs / temperature).log_softmax(-1), (ours / temperature).log_softmax(-1))
    (expected_grad,) = torch.autograd.grad(expected.sum() * temperature, ours)
    found = Whole(lambda chunk: theirs[chunk], temperature).compare(ours.detach() / temperature, slice(0, N),
                                                                   DIVERGENCES[name])
    torch.testing.assert_close(found.nats_N, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.grad_NV, expected_grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_top_k_of_the_whole_vocabulary_are_the_whole(name):
    ours, theirs = logits(N, V), logits(N, V)
    whole = Whole(lambda chunk: theirs[chunk], 1.5).compare(ours, slice(0, N), DIVERGENCES[name])
    ids, log_p = top_of(theirs, V + 3, 1.5)
    assert log_p.shape == (N, V)
    top = Top(ids, log_p).compare(ours, slice(0, N), DIVERGENCES[name])
    for field in ("nats_N", "agrees_N", "grad_NV"):
        torch.testing.assert_close(getattr(top, field), getattr(whole, field), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_with_a_bucket_for_the_rest_has_the_gradient_of_its_definition(name):
    ours, theirs, k = logits(N, V).requires_grad_(), logits(N, V), 4
    ids, log_p = top_of(theirs, k, 1.0)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(N, dtype=torch.float64))
    q = ours.softmax(-1)
    kept = q.gather(-1, ids)
    log_q = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log()
    expected = reference(name, log_p, log_q)
    (expected_grad,) = torch.autograd.grad(expected.sum(), ours)
    found = Top(ids, log_p).compare(ours.detach(), slice(0, N), DIVERGENCES[name])
    torch.testing.assert_close(found.nats_N, expected.detach(), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found.grad_NV, expected_grad, rtol=1e-9, atol=1e-11)
    whole = Whole(lambda chunk: theirs[chunk], 1.0).compare(ours.detach(), slice(0, N), DIVERGENCES[name])
    assert (found.nats_N <= whole.nats_N + 1e-12).all()     # grouping never makes a divergence larger


@pytest.mark.parametrize("name", DIVERGENCES)
def test_next_bytes_are_the_exact_marginal_and_places_without_a_border_say_nothing(name):
    byte_of_V = torch.tensor([97, 97, 98, 99, 256, 0, 98, 97, 1, 2, 256])
    ours, log_p = logits(N, V).requires_grad_(), logits(N, 257).log_softmax(-1)
    q = ours.softmax(-1)
    by_hand = torch.stack([q[:, byte_of_V == byte].sum(-1) for byte in range(257)], -1)
    torch.testing.assert_close(byte_probabilities(q.detach(), byte_of_V), by_hand.detach().clamp_min(1e-30))
    log_q = by_hand.clamp_min(1e-30).log()
    expected = reference(name, log_p, log_q)
    expected[2] = 0
    (expected_grad,) = torch.autograd.grad(expected.sum(), ours)
    there = log_p.clone()
    there[2] = torch.nan
    found = NextByte(byte_of_V, there).compare(ours.detach(), slice(0, N), DIVERGENCES[name])
    torch.testing.assert_close(found.nats_N, expected.detach(), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found.grad_NV, expected_grad, rtol=1e-9, atol=1e-11)
    assert found.agrees_N[2] == 0


def test_models_padded_to_different_vocabularies_are_read_over_the_rows_they_share():
    ours, theirs = logits(N, V), logits(N, V + 4)
    found = Whole(lambda chunk: theirs[chunk], 1.0).compare(ours, slice(0, N), DIVERGENCES["forward"])
    expected = reference("forward", theirs[:, :V].log_softmax(-1), ours.log_softmax(-1))
    torch.testing.assert_close(found.nats_N, expected)
    more = Whole(lambda chunk: ours[chunk], 1.0).compare(theirs, slice(0, N), DIVERGENCES["forward"])
    assert (more.grad_NV[:, V:] == 0).all() and more.grad_NV.shape == (N, V + 4)


def model(dim=16, layers=2, heads=2, seed=0, vocab=V):
    section = Qwen3Config(vocab_size=vocab, context=8, dim=dim, num_layers=layers, num_heads=heads, num_kv_heads=1,
                          head_dim=8, ffn_dim=32)
    built = section.build()
    built.initialise(seed)
    built = built.double()
    built.compute_dtype = torch.float64
    return built


def batch(**more):
    return Batch(tokens=torch.randint(V, (B, T)), targets=torch.randint(V, (B, T)),
                 weight=torch.rand(B, T, dtype=torch.float64), **more)


def gradients(loss, of):
    return torch.autograd.grad(loss, list(of.parameters()))


def test_the_objective_is_the_mixture_it_says_with_any_number_of_chunks():
    student, teacher, data = model(), model(dim=24, seed=1), batch()
    section = DistilConfig(temperature=2.0, hard=0.3, divergence="js")
    found = Distil(section, teacher=teacher).losses(student, data)
    ours, weight = student(data["tokens"]).flatten(0, 1), data["weight"].flatten()
    with torch.no_grad():
        theirs = teacher(data["tokens"]).flatten(0, 1)
    nll = F.cross_entropy(ours, data["targets"].flatten(), reduction="none")
    apart = reference("js", (theirs / 2).log_softmax(-1), (ours / 2).log_softmax(-1))
    expected = ((0.3 * nll + 0.7 * 4 * apart) * weight).sum()
    torch.testing.assert_close(found.sums["model"], expected, rtol=1e-11, atol=1e-11)
    for a, b in zip(gradients(found.sums["model"], student), gradients(expected, student)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.metrics["loss"], (nll * weight).sum().detach())
    torch.testing.assert_close(found.metrics["divergence"], (apart * weight).sum().detach())
    agreement = ((ours.argmax(-1) == theirs.argmax(-1)) * weight).sum()
    torch.testing.assert_close(found.metrics["agreement"], agreement)
    assert all(p.grad is None for p in teacher.parameters())


def test_chunks_change_nothing(monkeypatch):
    import dougong.objectives.cross_entropy as cross_entropy

    student, teacher, data = model(), model(seed=1), batch()
    whole = Distil(DistilConfig(), teacher=teacher).losses(student, data)
    monkeypatch.setattr(cross_entropy, "_LEAST_ROWS", 4)
    parts = Distil(DistilConfig(chunk_logits=1), teacher=teacher).losses(student, data)
    torch.testing.assert_close(parts.sums, whole.sums, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(parts.sums["model"], student), gradients(whole.sums["model"], student)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_matched_parts_have_the_gradient_of_an_independent_computation():
    """Hidden states through a projection and attention weights, beside a student written out by hand."""
    student, teacher, data = model(dim=16, heads=2), model(dim=24, heads=4, layers=3, seed=1), batch()
    projection = nn.Linear(16, 24, bias=False).double()
    student.companion = nn.ModuleDict({projection_name("stack.0"): projection})
    section = DistilConfig(match={"stack.0": "stack.1"}, match_attention={"stack.1.attention": "stack.2.attention"},
                           match_weight=0.5)
    found = Distil(section, teacher=teacher).losses(student, data)

    def states(of, layer, looking):
        """The stream after `layer`, and the mean attention weights of layer `looking`, step by step."""
        x = F.embedding(data["tokens"], of.stem.tokens.weight)
        position = torch.arange(T, dtype=torch.float64)
        angle = position[:, None] * (of.config.rope_theta ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8))
        kept = weights = None
        for name, block in of.stack.items():
            attention, h = block.attention, block.attention_norm(x)
            q, k, v = (part(h).unflatten(-1, (-1, 8)) for part in (attention.query, attention.key, attention.value))
            q, k = attention.query_norm(q), attention.key_norm(k)

            def turn(y):
                a, b = y.chunk(2, -1)
                cos, sin = angle.cos()[:, None], angle.sin()[:, None]
                return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

            q, k = turn(q).transpose(1, 2), turn(k).transpose(1, 2)
            scores = q @ k.expand_as(q).transpose(-1, -2) / math.sqrt(8)
            w = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
            if name == str(looking):
                weights = w.mean(1)
            x = x + attention.output((w @ v.transpose(1, 2).expand_as(q)).transpose(1, 2).flatten(2))
            x = x + block.feed_forward(block.feed_forward_norm(x))
            if name == str(layer):
                kept = x
        return kept, weights

    ours, looks = states(student, 0, 1)
    with torch.no_grad():
        theirs, their_looks = states(teacher, 1, 2)
    apart = (projection(ours) - theirs).square().sum(-1) / theirs.square().sum(-1)
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    look_apart = torch.where(visible, their_looks * (their_looks.clamp_min(1e-99) / looks.clamp_min(1e-99)).log(), 0)
    matched = ((apart + look_apart.sum(-1)) * data["weight"]).sum()
    torch.testing.assert_close(found.metrics["match"], matched.detach(), rtol=1e-6, atol=1e-8)   # RoPE's own precision
    plain = Distil(DistilConfig(), teacher=teacher).losses(student, data)
    expected = gradients(plain.sums["model"] + 0.5 * matched, student)
    for a, b in zip(gradients(found.sums["model"], student), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(block.attention.kernel is None for block in student.stack.values())   # left as it was


def test_a_part_that_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"stack\.0\.attention"):
        Distil(DistilConfig(match_attention={"stack.0.atention": "stack.0.attention"}), teacher=model()).losses(
            model(), batch())
    with pytest.raises(ConfigError, match="not attention"):
        Distil(DistilConfig(match_attention={"stack.0.feed_forward": "stack.0.attention"}), teacher=model()).losses(
            model(), batch())


@pytest.mark.parametrize("settings", [
    {"hard": 1.0}, {"top_k": 4, "match": {"stack.0": "stack.0"}}, {"align": "bytes", "top_k": 4},
    {"on_policy": {"share": 1.0}}, {"on_policy": {}, "hard": 0.0, "top_k": 4}])
def test_settings_that_contradict_each_other_are_refused(settings):
    from dougong.core.config import from_dict

    with pytest.raises(ConfigError, match=r"objective\.|match"):
        from_dict(DistilConfig, settings)


def test_answers_in_the_batch_stand_for_the_teacher():
    student, teacher, data = model(), model(seed=1), batch()
    with torch.no_grad():
        ids, log_p = top_of(teacher(data["tokens"]), V, 1.0)
    live = Distil(DistilConfig(), teacher=teacher).losses(student, data)
    kept = Distil(DistilConfig(top_k=V)).losses(student, Batch(**data, teacher_ids=ids, teacher_log_p=log_p))
    torch.testing.assert_close(kept.sums, live.sums, rtol=1e-11, atol=1e-12)
    assert SimpleNamespace(**kept.metrics).agreement == live.metrics["agreement"]
