"""The preference objectives against TRL's trainers: the same batch, the same random Qwen3, losses and gradients."""

import pytest
import torch

pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

from datasets import Dataset  # noqa: E402

from dougong.data.batch import Batch  # noqa: E402
from dougong.interop.import_hf import read_hf  # noqa: E402
from dougong.objectives.kto import KTOConfig  # noqa: E402
from dougong.objectives.preference import DPOConfig, IPOConfig, ORPOConfig  # noqa: E402
from dougong.train.shadow import tracked  # noqa: E402

PAIRS = {"prompt": ["abc", "The quick", "jumps over the lazy", "x"], "chosen": [" fox", " dog!", "fox jumps", " + 1"],
         "rejected": [" lazy dog", " brown", " return", " the fox"]}
SINGLES = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False, True, False]}
BETA = 0.25


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))
    import tiny_hf

    directory = tiny_hf.write(tmp_path_factory.mktemp("trl") / "model", "qwen3")
    return directory, tiny_hf


def load(tiny):
    directory, _ = tiny
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def reference_model(tiny):
    made = load(tiny)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    return made


def settings(kind, tmp_path, **more):
    return kind(output_dir=str(tmp_path), beta=BETA, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                bf16=False, fp16=False, remove_unused_columns=False, gradient_checkpointing=False, **more)


def text_tokenizer(tiny):
    made = transformers.PreTrainedTokenizerFast.from_pretrained(tiny[0])
    made.pad_token = made.eos_token
    return made


def theirs(trainer):
    """Loss, gradients by their names, and the batch that they were computed on."""
    batch = next(iter(trainer.get_train_dataloader()))
    kept = {key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()}
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return float(loss.detach()), trainer.model, kept


def our_gradients(tiny, section, batch, tmp_path):
    directory, _ = tiny
    read = read_hf(directory)
    made = read.config.build()
    made.initialise(0)
    own = tracked(made)
    with torch.no_grad():
        for name, tensor in read.tensors.items():
            own[name].copy_(tensor)
    objective = section.build()
    loss = objective.losses(made, batch).sums["model"] / objective.weight(batch)
    loss.backward()
    return float(loss.detach()), {name: tensor.grad for name, tensor in own.items()}


def compare(tiny, trainer, section, batch_of, tmp_path, *, rtol=2e-4):
    their_loss, their_model, batch = theirs(trainer)
    our_loss, ours = our_gradients(tiny, section, batch_of(batch), tmp_path)
    assert our_loss == pytest.approx(their_loss, rel=1e-5)
    with torch.no_grad():       # their gradients by our names: saved as weights, read as weights
        for parameter in their_model.parameters():
            parameter.copy_(parameter.grad)
    their_model.save_pretrained(tmp_path / "gradients")
    tiny[1].tokenizer().save(tmp_path / "gradients")
    found = read_hf(tmp_path / "gradients").tensors
    assert found.keys() == ours.keys()
    for name, gradient in ours.items():
        error = (gradient - found[name]).norm() / found[name].norm().clamp(min=1e-6)
        assert error < rtol, (name, float(error))


def sides(ids, mask, reference):
    """Rows chosen … rejected … as (B 2 T)."""
    def apart(tensor):
        return torch.stack(tensor.chunk(2, 0), 1)

    return Batch(tokens=apart(ids[:, :-1]), targets=apart(ids[:, 1:]), weight=apart(mask[:, 1:]).float(),
                 **({} if reference is None else {"reference": reference}))


def log_probs(made, ids, mask):
    with torch.no_grad():
        logp = made(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logp * mask[:, 1:]).sum(-1)


@pytest.mark.parametrize("kind,section", [("sigmoid", DPOConfig(beta=BETA)),
                                          ("ipo", IPOConfig(beta=BETA, per_token=True))])
def test_dpo_and_ipo(tiny, tmp_path, kind, section):
    import trl

    reference = reference_model(tiny)
    trainer = trl.DPOTrainer(model=load(tiny), ref_model=reference, train_dataset=Dataset.from_dict(PAIRS),
                             args=settings(trl.DPOConfig, tmp_path, loss_type=[kind]),
                             processing_class=text_tokenizer(tiny))

    def batch_of(inputs):
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        found = log_probs(reference_model(tiny), ids, mask)
        return sides(ids, mask, torch.stack(found.chunk(2), 1))

    compare(tiny, trainer, section, batch_of, tmp_path)


def test_kto(tiny, tmp_path):
    import trl

    section = KTOConfig(beta=BETA, desirable=1.5, undesirable=0.5)
    trainer = trl.KTOTrainer(model=load(tiny), ref_model=reference_model(tiny),
                             train_dataset=Dataset.from_dict(SINGLES), processing_class=text_tokenizer(tiny),
                             args=settings(trl.KTOConfig, tmp_path, desirable_weight=1.5, undesirable_weight=0.5,
                                           train_sampling_strategy="sequential"))

    def batch_of(inputs):
        width = max(inputs["input_ids"].shape[1], inputs["KL_input_ids"].shape[1])
        ids, mask = (torch.cat([_wide(inputs[name], width), _wide(inputs["KL_" + name], width)])
                     for name in ("input_ids", "completion_mask"))
        found = log_probs(reference_model(tiny), ids, mask)
        batch = sides(ids, mask, torch.stack(found.chunk(2), 1))
        return Batch(**batch, label=torch.as_tensor(inputs["label"]).float())

    compare(tiny, trainer, section, batch_of, tmp_path)


def _wide(tensor, width):
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))


def test_the_odds_of_orpo():
    """TRL's ORPO adds a likelihood over all tokens of the batch; what is compared is the paper's other half."""
    from types import SimpleNamespace

    from trl.experimental.orpo import ORPOTrainer

    mean = -torch.rand(6, 2) - 0.01
    ours, theirs = mean.clone().requires_grad_(), mean.clone().requires_grad_()
    length = torch.tensor(7.0)
    found, _ = ORPOConfig(beta=BETA).build().judge(ours * length, length.expand(6, 2), Batch())
    odds = (found + ours[:, 0]).sum()
    stand_in = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    expected = -ORPOTrainer.odds_ratio_loss(stand_in, theirs[:, 0], theirs[:, 1])[0].sum()
    torch.testing.assert_close(odds, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, at)[0] for value, at in ((odds, ours), (expected, theirs))))
