"""What a card says of where a model comes from, and of the tokens that a text stands between."""

import pytest
import yaml

from dougong.interop.model_card import CardFacts, model_card


def card(**facts):
    text = model_card(CardFacts("n", "LlamaForCausalLM", 1000, 48, "f32", 7, "mit", "0", tokens=192_000, **facts))
    return yaml.safe_load(text.split("---")[1]), text


@pytest.mark.parametrize(("origin", "base", "says"), [
    ({"begun_from": "hf:meta-llama/Llama-3.2-1B@main"}, "meta-llama/Llama-3.2-1B", "begun from `hf:meta-llama"),
    ({"imported_from": "ms:Qwen/Qwen3-0.6B"}, "Qwen/Qwen3-0.6B", "imported from `ms:Qwen"),
    ({"begun_from": "first"}, None, "begun from `first` and trained to step 7 on 192,000 tokens"),
    ({}, None, "), trained")])
def test_the_model_that_it_began_from_is_named(origin, base, says):
    front, text = card(**origin)
    assert front.get("base_model") == base and says in text


def test_the_token_that_ends_a_text_is_the_one_that_does():
    assert "It is also what the model ends a text with" in card(begins_with="<|e|>", ends_with="<|e|>")[1]
    other = card(begins_with="<s>", ends_with="</s>")[1]
    assert "It ends a text with `</s>`" in other and "also what the model ends" not in other
