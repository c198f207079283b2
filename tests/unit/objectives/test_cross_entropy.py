"""Chunked = unchunked = torch's own, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dougong.objectives import cross_entropy
from dougong.objectives.cross_entropy import LossSettings, head_cross_entropy

V, D, N = 37, 6, 600


class SoftCapped(nn.Module):
    """A head with a bias and a soft-cap: chunking must not assume a plain matrix product."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, V)

    def forward(self, x):
        return 5 * torch.tanh(self.linear(x) / 5)


def problem(dtype=torch.float64):
    x = (3 * torch.randn(N, D, dtype=dtype)).requires_grad_()
    return SoftCapped().to(dtype), x, torch.randint(V, (N,)), torch.rand(N, dtype=dtype)


def reference(head, x, targets, weight, *, z=0.0, smoothing=0.0):
    logits = head(x)
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return ((loss + z * logits.logsumexp(-1).square()) * weight).sum()


def gradients(loss, head, x):
    return torch.autograd.grad(0.37 * loss, [x, *head.parameters()])


@pytest.mark.parametrize("chunk_logits", [1, 300 * V, 10**9], ids=["many", "two", "one"])
@pytest.mark.parametrize("z,smoothing", [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-2, 0.1)])
def test_any_number_of_chunks_equals_torch_in_float64(monkeypatch, chunk_logits, z, smoothing):
    monkeypatch.setattr(cross_entropy, "_LEAST_ROWS", 7)
    head, x, targets, weight = problem()
    settings = LossSettings(z_loss=z, label_smoothing=smoothing, chunk_logits=chunk_logits)
    ours = head_cross_entropy(head, x, targets, weight, head.parameters(), V, settings)
    theirs = reference(head, x, targets, weight, z=z, smoothing=smoothing)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.nll, reference(head, x, targets, weight), rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours.loss, head, x), gradients(theirs, head, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_LEAST_ROWS", 7)
    head, x, targets, weight = problem()
    seen = []
    head.register_forward_hook(lambda _m, _i, output: seen.append(len(output)))
    head_cross_entropy(head, x, targets, weight, head.parameters(), V, LossSettings(chunk_logits=50 * V))
    assert max(seen) == 50 and sum(seen) == N


def test_a_head_that_borrows_the_embedding_still_gives_it_a_gradient():
    table = nn.Parameter(torch.randn(V, D, dtype=torch.float64))

    class Borrowing(nn.Module):
        def forward(self, x):
            return x @ table.mT

    _, x, targets, weight = problem()
    unused = nn.Parameter(torch.ones(3))
    loss = head_cross_entropy(Borrowing(), x, targets, weight, [table, unused], V, LossSettings()).loss
    loss.backward()
    expected, = torch.autograd.grad((F.cross_entropy(x @ table.mT, targets, reduction="none") * weight).sum(),
                                    table)
    torch.testing.assert_close(table.grad, expected, rtol=1e-11, atol=1e-13)
    assert unused.grad is None


def test_accuracy_counts_the_first_of_equal_logits():
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    sums, _ = cross_entropy.token_losses(logits, torch.tensor([0, 1, 2]), torch.ones(3), LossSettings(),
                                         with_gradient=False)
    assert sums[2] == 2


def test_large_logits_stay_finite_and_exact():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-80.0, 0.0, 80.0]])
    sums, grad = cross_entropy.token_losses(logits, torch.tensor([1, 0]), torch.ones(2), LossSettings(),
                                            with_gradient=True)
    torch.testing.assert_close(sums[0].double(),
                               F.cross_entropy(logits.double(), torch.tensor([1, 0]), reduction="sum"))
    assert grad.isfinite().all()


def test_fp32_error_is_that_of_torch():
    head, x, targets, weight = problem()
    exact = gradients(reference(head, x, targets, weight), head, x)
    single = head.float(), x.detach().float().requires_grad_()
    ours = gradients(head_cross_entropy(single[0], single[1], targets, weight.float(), head.parameters(), V,
                                        LossSettings()).loss, *single)
    naive = gradients(reference(*single, targets, weight.float()), *single)
    for good, a, b in zip(exact, ours, naive, strict=True):
        assert (a - good).norm() <= 2 * (b - good).norm() + 1e-9


def test_without_gradients_none_are_computed():
    head, x, targets, weight = problem()
    with torch.no_grad():
        sums = head_cross_entropy(head, x, targets, weight, head.parameters(), V, LossSettings())
    torch.testing.assert_close(sums.loss, reference(head, x, targets, weight), rtol=1e-12, atol=1e-12)
    assert not sums.loss.requires_grad


def test_tokens_without_weight_get_no_logits_and_change_nothing():
    from dougong.data.batch import Batch
    from dougong.models.families.qwen3 import Qwen3Config
    from dougong.objectives.causal_lm import CausalLMConfig

    model = Qwen3Config(vocab_size=31, context=16, dim=16, num_layers=2, num_heads=2, ffn_dim=32).build().double()
    model.initialise(0)
    model.compute_dtype = torch.float64
    seen = []
    model.head.register_forward_pre_hook(lambda _head, inputs: seen.append(len(inputs[0])))
    tokens = torch.randint(31, (3, 17))
    found = []
    for prompt in (0.0, 1e-300):        # the second counts for nothing, and is not 0
        weight = torch.ones(3, 16, dtype=torch.float64)
        weight[:, :9] = prompt
        batch = Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], weight=weight)
        losses = CausalLMConfig().build().losses(model, batch)
        losses.sums["model"].backward()
        found.append((losses, {name: p.grad for name, p in model.named_parameters()}))
        model.zero_grad(set_to_none=True)
    (less, gradients), (all_of_them, expected) = found
    assert seen == [3 * 7, 3 * 16]
    for name, value in all_of_them.metrics.items():
        torch.testing.assert_close(less.metrics[name], value)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)
