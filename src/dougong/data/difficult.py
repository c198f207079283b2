"""Text on which tokenizers are known to differ: what a fast encoder must agree on before it is used."""

import random

_UNICODE = 0x110000
_BLANKS = ["", " ", "  ", "\n", "\r\n", "\t", "\n\n \n", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85",
           "\v\f", "\u200b"]
_WORDS = [
    "'s", "'S", "'ll", "'LL", "'ſ", "’s", "don't", "I'VE", "naïve", "ß", "İı", "e\u0301", "ﬁ", "𝔘",
    "中文", "日本語", "한국어", "العربية", "हिन्दी", "ไทย", "👩‍👩‍👧‍👦", "🇨🇳", "❤️",
    "Ⅻ", "½", "²", "١٢٣", "１２３", "12345", "3.14", "0x1F", "_", "__init__", "->", "!!!", "…", "##",
    "<|endoftext|>", "<|reserved_0|>", "<0x41>", "</s>", "Ġ", "▁",
    "\x00", "\x1b[0m", "\x7f", "\ufeff", "\ufffd", "\ue000", "\U0010ffff", "\u0378",
]
_RANGES = [(0x20, 0x7F), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000), (0x20000, _UNICODE)]


def difficult_texts() -> list[str]:
    """Blanks, apostrophes, digits, scripts, marks and controls, in the contexts that splitting rules look at.

    Always the same: a seeded walk over all of Unicode, what is common more often.
    """
    rng = random.Random(20240229)
    texts = ["", " " * 5000, "a" * 5000, "\n" * 3000, "!" * 3000, " \n" * 2000, "中" * 2000]
    for _ in range(400):
        pieces = []
        for _ in range(24):
            word = rng.choice(_WORDS) if rng.random() < 0.6 else chr(rng.randrange(*rng.choice(_RANGES)))
            pieces.append(rng.choice(_BLANKS) + word * rng.choice((1, 1, 2, 3)))
        texts.append("".join(pieces))
    return texts
