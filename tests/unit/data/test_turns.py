"""What is learned of a conversation is what the assistant says, in the ids that it has when it is generated."""

import numpy as np
import pytest

from dougong.core.errors import ConfigError
from dougong.data.chat_template import ChatTemplate
from dougong.data.conversations import Conversation
from dougong.data.documents import Document
from dougong.data.tokenizer import BpeConfig, BytesConfig, Tokenizer
from dougong.data.turns import CHATML, encode_turns, template_for_training, with_turns

TALK = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": " 2+2? "},
        {"role": "assistant", "content": "<think>Easy.</think>\n\nIt is 4."}, {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "  Yes.\n"})
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "<|im_end|>"]}}}
TOOLS = ({"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}},)
CALLING = ({"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
           {"role": "tool", "content": "3"}, {"role": "tool", "content": "三"}, {"role": "assistant", "content": "3."})
TRIMMING = """{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FORGETTING = """{%- for m in messages %}{% set text = m.content %}
{%- if m.role == "assistant" and not loop.last %}{% set text = text.split("</think>")[-1].lstrip("\\n") %}{% endif -%}
<|im_start|>{{ m.role }}
{{ text }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THINKING_INVITATION = TRIMMING.replace('assistant\n{% endif %}', 'assistant\n<think>\n{% endif %}')
WITHOUT_TOKENS = """{%- for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


class Texts(list):
    bytes = 1000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = Texts(Document(str(i), "t", "It is brief. Yes. assistant user system 2+2=4 Sure? " * 9) for i in range(3))
    return with_turns(BpeConfig(vocab_size=290).build(texts))


def learned(tokenizer, ids, weight) -> list[str]:
    """The stretches of text that are learned, special tokens by their names."""
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    borders = np.flatnonzero(np.diff(np.concatenate([[0], weight > 0, [0]])))
    return ["".join(names.get(int(id)) or tokenizer.decode([id]) for id in ids[begin:end])
            for begin, end in borders.reshape(-1, 2)]


def encode(tokenizer, messages, source=None, tools=(), **options):
    conversation = Conversation("c", "t", tuple(messages), tools=tuple(tools))
    template = ChatTemplate(tokenizer, source) if source else template_for_training(tokenizer)
    return encode_turns(conversation, template, **options)


def test_reserved_tokens_become_turns_and_the_vocabulary_keeps_its_size(tokenizer):
    assert tokenizer.vocab_size == 290
    assert {"<|im_start|>", "<|im_end|>", "<|reserved_2|>"} <= set(tokenizer.special_tokens)
    assert "<|reserved_1|>" not in tokenizer.special_tokens
    assert with_turns(tokenizer) is tokenizer


def test_a_model_with_a_first_token_of_its_own_reads_it_before_a_conversation_too(tokenizer):
    plain, first = Tokenizer(tokenizer.backend, document_id=tokenizer.document_id), list(tokenizer.special_tokens)[-1]
    llamas = with_turns(Tokenizer(plain.backend, document_id=plain.document_id, settings={"bos_token": first}))
    assert llamas.begin_id == tokenizer.special_tokens[first] != plain.document_id
    ids, weight = encode(llamas, TALK)
    rest, same = encode(with_turns(plain), TALK)
    assert ids[0] == llamas.begin_id and ids[1:].tolist() == rest.tolist() and weight[1:].tolist() == same.tolist()
    assert ChatTemplate(llamas).encode(TALK[:2])[0] == llamas.begin_id


def test_a_tokenizer_without_reserved_tokens_grows(tmp_path):
    plain = BytesConfig().build()
    grown = with_turns(plain)
    assert grown.vocab_size == plain.vocab_size + 2 and grown.document_id == plain.document_id
    grown.save(tmp_path)
    again = with_turns(Tokenizer.load(tmp_path))
    assert again.fingerprint == grown.fingerprint and again.chat_template == CHATML


@pytest.mark.parametrize("source", [None, TRIMMING, FORGETTING, THINKING_INVITATION])
def test_replies_are_learned_with_the_token_that_ends_them(tokenizer, source):
    first, second = "<think>Easy.</think>\n\nIt is 4.<|im_end|>", "  Yes.\n<|im_end|>"
    if source in (TRIMMING, THINKING_INVITATION):
        second = "Yes.<|im_end|>"
    if source == FORGETTING:
        first = "It is 4.<|im_end|>"
    ids, weight = encode(tokenizer, TALK, source)
    assert learned(tokenizer, ids, weight) == [first, second]
    assert weight[-1] == 1 and ids.dtype == np.int32 and weight.dtype == np.float32


def test_a_template_without_turn_tokens(tokenizer):
    assert learned(tokenizer, *encode(tokenizer, TALK, WITHOUT_TOKENS))[0] == "<think>Easy.</think>\n\nIt is 4.\n"


def test_the_ids_before_a_reply_are_those_that_serving_gives_the_model(tokenizer):
    ids, weight = encode(tokenizer, TALK)
    prompt = ChatTemplate(tokenizer).encode(TALK[:2])
    first = int(np.flatnonzero(weight)[0])
    assert ids[:first].tolist() == prompt
    reply = tokenizer.encode(TALK[2]["content"]).tolist()
    assert ids[first:first + len(reply)].tolist() == reply


def test_what_to_train_on(tokenizer):
    assert learned(tokenizer, *encode(tokenizer, TALK, train_on="last")) == ["  Yes.\n<|im_end|>"]
    ids, weight = encode(tokenizer, TALK, train_on="all")
    assert (weight == 1).all() and ids.tolist() == ChatTemplate(tokenizer).encode(TALK, reply=False)
    silent = [TALK[0], TALK[1], {**TALK[2], "train": False}, *TALK[3:]]
    assert learned(tokenizer, *encode(tokenizer, silent)) == ["  Yes.\n<|im_end|>"]


def test_calls_of_tools_are_learned_and_their_results_are_not(tokenizer):
    call, reply = learned(tokenizer, *encode(tokenizer, CALLING, tools=TOOLS))
    assert call == '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "<|im_end|>"]}}\n</tool_call><|im_end|>'
    assert reply == "3.<|im_end|>"


def test_a_special_token_in_what_people_write_stays_text(tokenizer):
    end = tokenizer.special_tokens["<|im_end|>"]
    ids, _ = encode(tokenizer, [{"role": role, "content": "<|im_end|>"} for role in ("user", "assistant")])
    assert (ids == end).sum() == 2
    ids, weight = encode(tokenizer, CALLING, tools=TOOLS)
    assert (ids == end).sum() == 5 and weight[ids == end].tolist() == [0, 0, 1, 0, 1]


def test_a_template_that_refuses_or_hides_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match="refuses"):
        encode(tokenizer, TALK, "{{ raise_exception('no system') }}")
    with pytest.raises(ConfigError, match="where the reply in message 3 begins"):
        encode(tokenizer, TALK, "{{ messages | length }}")


@pytest.mark.parametrize("messages, tools", [(TALK, ()), (CALLING, TOOLS), ((TALK[0], *CALLING), TOOLS)])
def test_transformers_renders_our_template_identically(tokenizer, tmp_path, messages, tools):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = ChatTemplate(tokenizer)
    for reply in (True, False):
        text, mark = ours.spell(messages, reply=reply, tools=tools)
        assert text.replace(mark, "") == theirs.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=reply)
    if messages is TALK:
        assert ours.encode(messages, reply=False) == list(theirs.apply_chat_template(list(messages))["input_ids"])
