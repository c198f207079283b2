"""What is shown is what is there."""

import io
import json

import pytest
import torch
from rich.console import Console

from dougong.core.errors import ConfigError
from dougong.data.arrays import DigitsData
from dougong.data.dedup import DedupConfig
from dougong.data.inspect import look, render
from dougong.data.prepare import TextData, prepare
from dougong.data.tokenizer import BytesConfig


@pytest.fixture
def corpus(tmp_path):
    for number in range(80):
        (tmp_path / f"{number:02d}.txt").write_text(f"{number} 斗拱 [bold]\n" * (1 + number % 3), "utf-8")
    (tmp_path / "copy.txt").write_text("7 斗拱 [bold]\n7 斗拱 [bold]\n", "utf-8")
    (tmp_path / "broken.txt").write_bytes(b"ok \xff\xfe\xfa")
    return prepare(TextData(path=str(tmp_path), dedup=DedupConfig(near=False)), BytesConfig(), context=64,
                   cache=tmp_path / ".cache")


def test_pieces_of_a_document_spell_it(corpus):
    seen = json.loads(json.dumps(look(corpus, documents=2)))
    for shown, document in zip(seen["documents"], corpus.documents("train")):
        assert shown["pieces"][0] == {"id": 256, "special": True, "text": "<|endoftext|>"}
        spelled = "".join(piece["text"] for piece in shown["pieces"][1:])
        assert spelled == document.text.encode().decode("ascii", "backslashreplace")
        assert shown["bytes_per_token"] == len(document.text.encode()) / shown["tokens"]
        assert shown["id"] == document.id


def test_rows_show_what_counts_in_the_loss_and_which_document_it_is(corpus):
    rows = look(corpus, rows=1000)["rows"]
    batches = list(corpus.batches("train", rows=1))
    for row, batch in zip(rows, batches, strict=True):
        segment = batch.get("segment", torch.zeros_like(batch["tokens"]))[0]
        assert [piece["id"] for piece in row["pieces"]] == batch["tokens"][0].tolist()
        assert [piece["weight"] for piece in row["pieces"]] == batch["weight"][0].tolist()
        assert [piece["segment"] for piece in row["pieces"]] == segment.tolist()
        assert row["weight"] == batch["weight"].sum()
    assert any(row["documents"] > 1 for row in rows) and any(row["weight"] < 64 for row in rows)


def test_the_page_names_duplicates_skipped_files_and_colours_tokens(corpus):
    console = Console(
        width=120, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO()
    )
    render(look(corpus, tokens=10, rows=1000), console)
    page = console.export_text(styles=True, clear=False)
    text = console.export_text()
    assert "exact duplicates removed: 1 documents" in text and "repeats" in text
    assert "broken.txt" in text and "skipped" in text and "best_fit" in text and "more tokens" in text
    assert "\x1b[30;106m" in page and "\x1b[30;103m" in page          # alternating colours


def test_an_unknown_split_is_refused(corpus):
    with pytest.raises(ConfigError, match="Known: train, validation, test"):
        look(corpus, split="dev")


def test_arrays_have_no_documents_to_show():
    with pytest.raises(ConfigError, match="arrays, and there are no documents"):
        look(DigitsData().prepare())
