"""Text on which tokenizers are known to differ: what a fast encoder must agree on before it is used."""

import random

_UNICODE = 0x110000


def difficult_texts() -> list[str]:
    """Some 80 kB on which tokenizers are known to differ: blanks, apostrophes, digits, scripts, marks, controls.

    Always the same: a seeded walk over all of Unicode, common and uncommon, in contexts that the rules look at.
    """
    rng = random.Random(20240229)
    blanks = ["", " ", "  ", "\n", "\r\n", "\t", "\n\n \n", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\v\f", "\u200b"]
    words = ["'s", "'S", "'ll", "'LL", "'ſ", "’s", "don't", "I'VE", "naïve", "ß", "İı", "中文", "日本語", "한국어", "العربية",
             "हिन्दी", "ไทย", "e\u0301", "ﬁ", "Ⅻ", "½", "²", "١٢٣", "１２３", "12345", "3.14", "0x1F", "👩‍👩‍👧‍👦", "🇨🇳", "❤️", "𝔘", "_",
             "__init__", "->", "!!!", "…", "<|endoftext|>", "<|reserved_0|>", "<0x41>", "\x00", "\x1b[0m", "\x7f", "\ufeff",
             "\ufffd", "\ue000", "\U0010ffff", "\u0378", "Ġ", "▁", "##", "</s>"]
    common = [lambda: rng.randrange(0x20, 0x7F), lambda: rng.randrange(0x80, 0x3000), lambda: rng.randrange(0x3000, 0xD800),
              lambda: rng.randrange(0xE000, 0x20000), lambda: rng.randrange(0x20000, _UNICODE)]
    texts = ["", " " * 5000, "a" * 5000, "\n" * 3000, "!" * 3000, " \n" * 2000, "中" * 2000]
    for _ in range(400):
        pieces = [rng.choice(blanks) + (rng.choice(words) if rng.random() < 0.6 else chr(rng.choice(common)())) * rng.choice((1, 1, 2, 3))
                  for _ in range(24)]
        texts.append("".join(pieces))
    return texts
