"""Shows a corpus as the model will see it: documents cut into tokens, rows with what counts in the loss, and
facts.

`look` returns plain JSON values; `render` prints them with a colour per token.
"""

from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dougong.core.errors import ConfigError
from dougong.data.split import SPLITS
from dougong.data.tokenizer import Tokenizer

_COLOURS = ("black on bright_cyan", "black on bright_yellow", "black on bright_green")
_SPECIAL = "bold white on red"
_NAMED = 5          # duplicates and skipped files named of each kind


def look(corpus: Any, *, split: str = "train", documents: int = 3, rows: int = 1, tokens: int = 300,
         first: int = 0) -> dict[str, Any]:
    """Documents from `first` on, the first rows, both cut after `tokens` tokens, and the corpus's facts."""
    if split not in SPLITS:
        raise ConfigError(f"no split {split!r}. Known: {', '.join(SPLITS)}.")
    if hasattr(corpus, "look"):     # data of another kind know best what there is to see
        return corpus.look(split=split, documents=documents, tokens=tokens, first=first)
    if not hasattr(corpus, "documents"):
        raise ConfigError("these data are arrays, and there are no documents to show. Their facts: "
                          "dougong data prepare RECIPE")
    view, store = corpus.documents(split), corpus.tokens(split)
    chosen = range(first, min(first + documents, len(view)))
    shown = []
    for index in chosen:
        document = view[index]
        ids = store.read(int(store.starts[index]), int(store.starts[index + 1]))
        shown.append({"id": document.id, "source": document.source, "bytes": int(store.bytes_of[index]),
                      "tokens": len(ids), "bytes_per_token": int(store.bytes_of[index]) / max(1, len(ids)),
                      "pieces": pieces_of(corpus.tokenizer, ids[:tokens])})
    return {
        "split": split,
        "documents": shown,
        "rows": _rows(corpus, split, rows, tokens) if len(store) else [],
        "facts": corpus.facts,
    }


def pieces_of(tokenizer: Tokenizer, ids: np.ndarray) -> list[dict[str, Any]]:
    """Id and text of each token; bytes that are no whole character are written as \\xNN."""
    special = {index: name for name, index in tokenizer.special_tokens.items()}
    return [
        {
            "id": int(token),
            "special": int(token) in special,
            "text": special.get(int(token))
            or tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace"),
        }
        for token in ids
    ]


def _rows(corpus: Any, split: str, count: int, tokens: int) -> list[dict[str, Any]]:
    """The first rows in order: tokens, the loss weight of each one's target, and the document it is of."""
    found = []
    for batch in corpus.batches(split, rows=1):
        if len(found) == count:
            break
        fields = {name: tensor[0].numpy() for name, tensor in batch.items()}
        segment = fields.get("segment", np.zeros_like(fields["tokens"]))
        pieces = pieces_of(corpus.tokenizer, fields["tokens"][:tokens])
        for piece, weight, number in zip(pieces, fields["weight"], segment):
            piece |= {"weight": float(weight), "segment": int(number)}
        found.append({"documents": len(set(segment[fields["weight"] > 0].tolist())),
                      "weight": float(fields["weight"].sum()), "pieces": pieces})
    return found


def render(seen: dict[str, Any], console: Console) -> None:
    """Prints what `look` returned."""
    for document in seen["documents"]:
        console.rule(f"{escape(document['id'])} · {escape(document['source'])}", align="left")
        console.print(f"{document['bytes']:,} bytes · {document['tokens']:,} tokens · "
                      f"{document['bytes_per_token']:.2f} bytes per token", highlight=False)
        if "weight" in document:
            skill = f" · skill {document['skill']}" if document.get("skill") else ""
            console.print(f"{document['weight']:g} tokens are learned (in colour){skill}", highlight=False)
        console.print(_coloured(document["pieces"], document["tokens"]))
    for number, row in enumerate(seen["rows"]):
        console.rule(f"row {number} of {seen['split']}", align="left")
        console.print(
            f"{row['documents']} document(s) · {row['weight']:g} tokens count in the loss (others are dim)",
            highlight=False,
        )
        console.print(_coloured(row["pieces"], len(row["pieces"])))
    _render_facts(seen["facts"], console)


def _coloured(pieces: list[dict[str, Any]], total: int) -> Text:
    """Tokens in alternating colours, special ones in red, those without loss weight dim."""
    text = Text()
    for number, piece in enumerate(pieces):
        style = _SPECIAL if piece["special"] else _COLOURS[number % len(_COLOURS)]
        if piece.get("weight", 1.0) == 0:
            style = f"dim {style}" if "segment" in piece else "red" if piece["special"] else "dim"
        text.append(piece["text"].replace("\r", "␍").replace("\n", "⏎\n").replace("\t", "→   "), style)
    if total > len(pieces):
        text.append(f" … {total - len(pieces):,} more tokens", "dim")
    return text


def _render_facts(facts: dict[str, Any], console: Console) -> None:
    table = Table("split", "source", title="What there is", title_justify="left")
    learned = "trained_tokens" in facts
    for column in ("documents", "bytes", "tokens", "bytes/token", *(["learned"] if learned else []), "rows", "cut",
                   "padding"):
        table.add_column(column, justify="right")
    for split, part in facts["splits"].items():
        packing = part["packing"]
        table.add_row(split, "all", *_counts(part), *([f"{part['trained_tokens']:,}"] if learned else []),
                      f"{packing['rows']:,}",
                      f"{packing['documents_cut']:,}", f"{packing['padding_share']:.2%}")
        if len(part["sources"]) > 1:
            for name, source in part["sources"].items():
                table.add_row("", escape(name), *_counts(source),
                              *([f"{source['trained_tokens']:,}"] if learned else []), "", "", "")
    console.print(table)
    console.print(f"packing: {facts['packing']['method']}, as {facts['packing']['reason']}", highlight=False)
    console.print(f"split: {facts['split']['sentence']}", highlight=False, markup=False)
    tokenizer = facts["tokenizer"]
    console.print(
        f"tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} entries, "
        f"cut by {tokenizer['pre_tokenizer'] or 'no rule'}, encoded by {tokenizer['encoder']}",
        highlight=False,
    )
    for file, shapes in (facts.get("shapes") or {}).items():
        read = ", ".join(f"{count:,} as {shape}" for shape, count in shapes.items()) or "no conversation"
        console.print(f"{file}: {read}", highlight=False, markup=False)
    for kind in (kind for kind in ("exact", "near") if kind in facts["duplicates"]):
        found = facts["duplicates"][kind]
        console.print(
            f"{kind} duplicates removed: {found['documents']:,} documents, {found['bytes']:,} bytes",
            highlight=False,
        )
        for pair in found["examples"][:_NAMED]:
            console.print(
                f"  {pair['removed']} repeats {pair['kept']}", highlight=False, markup=False, style="dim"
            )
    for reason, entry in facts["skipped"].items():
        console.print(f"skipped, {reason}: {entry['count']:,}", highlight=False, markup=False)
        for example in entry["examples"][:_NAMED]:
            console.print(f"  {example}", highlight=False, markup=False, style="dim")


def _counts(facts: dict[str, Any]) -> list[str]:
    return [
        f"{facts['documents']:,}",
        f"{facts['bytes']:,}",
        f"{facts['tokens']:,}",
        f"{facts['bytes_per_token']:.2f}",
    ]
