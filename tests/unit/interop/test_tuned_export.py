"""A model of others is taught to reply, looked at before and after, talked to and exported: all by commands."""

import json

import pytest
import tiny_hf
import torch
from tiny_recipe import dougong

from dougong.core.events import read_events
from dougong.core.run import RunDirectory
from dougong.generate.replies import replies
from dougong.recipes.open_run import open_run

FAST = ["runtime.threads=1", "runtime.precision=fp32", "runtime.device=cpu", "train.trackers=[]", "optim.lr=0.01",
        "train.rows=4", "train.epochs=4"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    root = tmp_path_factory.mktemp("sft")
    start = tiny_hf.write(root / "start", "qwen3")
    with open(root / "chats.jsonl", "w") as file:
        for i in range(80):
            word = ("fox", "dog")[i % 2]
            file.write(json.dumps({"skill": word, "answer": word, "messages": [
                {"role": "user", "content": f"{i} {word}?"}, {"role": "assistant", "content": word}]}) + "\n")
    done = dougong("train", "sft", f"data.path={root / 'chats.jsonl'}", "--model", start, "--run", root / "run",
                   "--json", *FAST)
    assert done.code == 0, done.err
    return root / "run"


def test_the_run_tells_what_changed(tuned):
    events = {event["event"]: event for event in read_events(RunDirectory(tuned).events)}
    told, loss = events["before_after"], events["before_after"]["loss"]
    assert loss["after"] < loss["before"] - 1 and loss["difference"] == pytest.approx(loss["after"] - loss["before"])
    assert loss["interval"][0] < loss["difference"] < loss["interval"][1] < 0 and loss["conversations"] >= 2
    assert loss["after"] == pytest.approx(events["result"]["loss"], rel=1e-2)
    shown = told["replies"][0]
    assert shown["reference"] in ("fox", "dog") and shown["asked"][-1]["content"].endswith("?")
    assert {"before", "after", "skill"} <= set(shown)
    assert told["exact_match"]["after"]["exact_match"] == events["result"]["exact_match"]
    page = (tuned / "report.html").read_text()
    assert 'id="before_after"' in page and "训练前" in page


def test_rows_rate_and_steps_are_derived_for_a_start(tuned):
    derived = {item["key"]: item for event in read_events(RunDirectory(tuned).events) if event["event"] == "derived"
               for item in event["values"]}
    assert derived["data.row_tokens"]["value"] == 64 and "4 passes" in derived["train.steps"]["reason"]


def test_it_answers_as_a_loop_over_the_whole_text_does(tuned):
    opened = open_run(tuned)
    talk = [{"role": "user", "content": "81 dog?"}]
    end = opened.tokenizer.special_tokens["<|im_end|>"]
    from dougong.data.chat_template import ChatTemplate

    ids, written = ChatTemplate(opened.tokenizer).encode(talk), []
    for _ in range(10):
        logits = opened.model.head(opened.model.hidden(torch.tensor([ids + written])))[0, -1]
        written.append(int(logits[:opened.tokenizer.vocab_size].argmax()))
        if written[-1] in (end, opened.tokenizer.document_id):
            written.pop()
            break
    said = replies(opened.model, opened.tokenizer, [[{"role": "user", "content": "a much longer one, 7 fox?"}], talk])
    assert said[1] == opened.tokenizer.decode(written)
    assert dougong("generate", tuned, "The", "--tokens", "3").code == 0


def test_scoring_again_gives_the_same_figures(tuned):
    result = next(e for e in read_events(RunDirectory(tuned).events) if e["event"] == "result")
    again = dougong("eval", tuned, "--json")
    assert again.code == 0, again.err
    assert again.json["loss"] == pytest.approx(result["loss"], rel=1e-4)
    assert again.json["skills"]["scores"] == result["skills"]["scores"]


def test_it_is_exported_with_its_turns(tuned, tmp_path):
    transformers = pytest.importorskip("transformers")
    done = dougong("export", tuned, "--to", "hf", "--out", tmp_path / "hf")
    assert done.code == 0, done.err
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ends = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [theirs.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")]
    text = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    pytest.importorskip("gguf")
    done = dougong("export", tuned, "--to", "gguf", "--out", tmp_path / "gguf")
    assert done.code == 0, done.err
    modelfile = (tmp_path / "gguf" / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"' in modelfile and "<|im_start|>assistant" in modelfile


def test_conversations_are_inspected_with_their_mask(tuned):
    chats = tuned.parent / "chats.jsonl"
    seen = dougong("data", "inspect", "sft", f"data.path={chats}", "--model", tuned.parent / "start", "-n", 2, "--json")
    assert seen.code == 0, seen.err
    pieces = seen.json["documents"][0]["pieces"]
    learned = "".join(piece["text"] for piece in pieces if piece["weight"])
    assert learned in ("fox<|im_end|>", "dog<|im_end|>") and pieces[0]["text"] == "<|im_start|>"
    shown = dougong("data", "inspect", "sft", f"data.path={chats}", "--model", tuned.parent / "start")
    assert "tokens are learned" in shown.out and "80 as messages" in shown.out


def test_a_row_longer_than_the_model_reads_is_refused(tuned):
    refused = dougong("show", "sft", f"start.path={tuned.parent / 'start'}", "data.row_tokens=65")
    assert refused.code == 2 and "context of 64" in refused.err
