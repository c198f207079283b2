"""Skills, and the answers without a model beside them."""

from dataclasses import dataclass

import numpy as np
import pytest

from dougong.evaluate.skills import answer_all, nearest_answers, same, scores


@dataclass(frozen=True)
class Item:
    skill: str
    prompt: str
    answer: str


def test_nearest_neighbour_is_that_of_scikit_learns_tfidf():
    sklearn = pytest.importorskip("sklearn.feature_extraction.text")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(60)]
    known = [Item("s", " ".join(rng.choice(words, 8)), str(number)) for number in range(80)]
    prompts = [" ".join(rng.choice(words, 8)) for _ in range(30)]
    vectors = sklearn.TfidfVectorizer(analyzer="char", ngram_range=(3, 5), norm="l2")
    there = vectors.fit_transform([f" {item.prompt} " for item in known])
    alike = (vectors.transform([f" {prompt} " for prompt in prompts]) @ there.T).toarray()
    ours = nearest_answers(prompts, known)
    assert ours == [str(place) for place in alike.argmax(1)]


def test_a_skill_is_claimed_only_where_the_model_beats_both_answers_without_a_model():
    training = [Item("parity", f"is {n} even?", "yes" if n % 2 == 0 else "no") for n in range(100)]
    training += [Item("constant", f"say it {n}", "it") for n in range(20)]
    held = [Item("parity", f"is {n} even?", "yes" if n % 2 == 0 else "no") for n in range(1000, 1100)]
    held += [Item("constant", f"say it {n}", "it") for n in range(30, 60)]
    right = {item.prompt: item.answer for item in held}
    found = {score.skill: score for score in scores(answer_all(held, training, lambda ps: [right[p] for p in ps]))}
    assert found["parity"].claimed and found["parity"].model == 1 and found["parity"].majority == 0.5
    assert not found["constant"].claimed and found["constant"].model == found["constant"].majority == 1
    wrong = scores(answer_all(held, training, lambda ps: ["?"] * len(ps)))
    assert all(score.model == 0 and not score.claimed for score in wrong)


def test_answers_are_compared_but_for_white_space():
    assert same(" a  b\n", "a b") and not same("ab", "a b") and not same("", "a")
