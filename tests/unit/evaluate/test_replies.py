"""Losses conversation by conversation, and their paired difference."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dougong.data.chats import ChatData
from dougong.data.tokenizer import BytesConfig
from dougong.evaluate.replies import ReplyLosses, paired_losses, reply_losses
from dougong.models.families.qwen3 import Qwen3Config
from dougong.runtime.device import Runtime


def test_each_conversation_is_scored_as_if_it_were_alone(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"{i}?"},
                                                        {"role": "assistant", "content": "!" * (1 + i % 5)}]})
                               for i in range(30)))
    corpus = ChatData(path=str(file), fractions=(1, 0, 0)).prepare(BytesConfig(), context=160, cache=tmp_path / "cache")
    model = Qwen3Config(vocab_size=260, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=32,
                        context=256).build()
    model.initialise(0)
    found = reply_losses(model, corpus.batches("train", rows=3), Runtime())
    order = [number for row in range(corpus.facts["splits"]["train"]["rows"])
             for number in corpus._packs["train"].documents(row)]
    assert len(found.nats) == 30 and found.weight.tolist() == [corpus.encoded(n)[1][1:].sum() for n in order]
    for nats, number in zip(found.nats, order):
        ids, weight = (torch.tensor(np.array(values)) for values in corpus.encoded(number))
        with torch.no_grad():
            logits = model.head(model.hidden(ids[None, :-1].long()))[0]
        alone = (F.cross_entropy(logits, ids[1:].long(), reduction="none") * weight[1:]).sum()
        assert nats == pytest.approx(float(alone), rel=1e-5)
    few = reply_losses(model, corpus.batches("train", rows=1), Runtime(), most=2)
    assert 2 <= len(few.nats) < 30 and few.nats[:2] == pytest.approx(found.nats[:2], rel=1e-5)


def test_the_paired_difference_is_that_of_the_means_and_its_interval_holds_it():
    weight = np.array([2.0, 3.0, 5.0, 4.0])
    before = ReplyLosses(np.array([4.0, 7.0, 9.0, 8.0]), weight)
    after = ReplyLosses(before.nats - 0.5 * weight, weight)
    difference, interval = paired_losses(after, before)
    assert difference == pytest.approx(-0.5) and interval == pytest.approx((-0.5, -0.5))
    with pytest.raises(AssertionError):
        paired_losses(after, ReplyLosses(before.nats, weight + 1))
