"""Sources: what is read, in which order, what is left out and what the user is told."""

import gzip
import json
import lzma
import os
import sys
import sysconfig

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dougong.core.config import from_dict, json_schema, to_dict
from dougong.core.errors import ConfigError, DataError, MissingExtraError
from dougong.data import SOURCES, decode
from dougong.data.sources import FilesSource, HuggingFaceSource, JsonlSource, ParquetSource, PythonSource
from dougong.data.walk import Skipped, looks_secret


def read(source):
    skipped = Skipped()
    return {d.id: d.text for d in source.documents(skipped)}, skipped.facts()


def files(folder, **named):
    for name, content in named.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


CHINESE = "斗拱是中国古代建筑的木构件。\n"


@pytest.mark.parametrize(("name", "content", "encoding"), [
    ("plain.txt", CHINESE.encode(), None),
    ("mark8.txt", b"\xef\xbb\xbf" + CHINESE.encode(), None),
    ("mark16le.txt", b"\xff\xfe" + CHINESE.encode("utf-16-le"), None),
    ("mark16be.txt", b"\xfe\xff" + CHINESE.encode("utf-16-be"), None),
    ("mark32.txt", CHINESE.encode("utf-32"), None),
    ("gb.txt", CHINESE.encode("gb18030"), "gb18030"),
    ("mark_wins.txt", CHINESE.encode("utf-8-sig"), "gb18030"),
    ("zip.txt.gz", gzip.compress(CHINESE.encode(), mtime=0), None),
    ("zip.txt.xz", lzma.compress(CHINESE.encode()), None),
])
def test_a_file_is_read_in_the_encoding_it_has(tmp_path, name, content, encoding):
    files(tmp_path, **{name: content})
    assert read(FilesSource(path=str(tmp_path), encoding=encoding)) == ({name: CHINESE}, {})


def test_coding_lines_of_python_files_are_honoured(tmp_path):
    source = "#!/usr/bin/python\n# -*- coding: latin-1 -*-\nname = 'é'\n"
    files(tmp_path, **{"a.py": source.encode("latin-1"), "b.py": b"# coding: no-such\n",
                       "c.py": b"# coding: rot13\n", "d.py": b"x = 1\n# coding: latin-1\ny = '\xe9'\n"})
    # d.py: after code the second line does not count
    found, skipped = read(FilesSource(path=str(tmp_path)))
    assert found == {"a.py": source}
    assert skipped["unknown encoding in its coding line"]["count"] == 2
    assert skipped["not utf-8"]["examples"] == ["d.py (byte 29)"]


def test_what_is_not_text_is_named_with_its_byte(tmp_path):
    files(tmp_path, **{"image.png": b"\x89PNG"[1:] + b"abcd\0", "bad.txt": "é".encode() * 5 + b"\xffrest",
                       "cut.txt": "斗".encode()[:2], "ok.txt": "fine", "empty.txt": b"", "blank.txt": " \n",
                       "torn.txt.gz": gzip.compress(b"text" * 1000, mtime=0)[:-9], "wrong.gz": b"no gzip at all"})
    found, skipped = read(FilesSource(path=str(tmp_path)))
    assert found == {"ok.txt": "fine"}
    assert skipped["binary"]["examples"] == ["image.png (NUL at byte 7)"]
    assert skipped["not utf-8"]["examples"] == ["bad.txt (byte 10)", "cut.txt (byte 0)"]
    assert skipped["empty"]["count"] == 2
    assert skipped["damaged compressed file"]["count"] == 2


@given(st.integers(0, 200), st.integers(1, 40))
def test_the_byte_of_an_error_is_right_wherever_pieces_end(before, piece):
    import io
    old, decode.PIECE_BYTES = decode.PIECE_BYTES, piece
    try:
        data = ("é斗x\n" * 60).encode()
        at = len(data.decode()[:before].encode())
        stream = io.BytesIO(data[:at] + b"\xff" + data[at:])
        with pytest.raises(decode.NotText) as problem:
            list(decode._decoded(stream, python=False, encoding=None))
        assert problem.value.where == f"byte {at}"
    finally:
        decode.PIECE_BYTES = old


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=300),
       st.integers(1, 50), st.sampled_from(["utf-8", "gb18030"]))
def test_a_large_file_comes_in_pieces_that_join_to_the_whole(text, piece, encoding):
    import io
    old, decode.PIECE_BYTES = decode.PIECE_BYTES, piece
    try:
        pieces = list(decode._decoded(io.BytesIO(text.encode(encoding)), python=False, encoding=encoding))
    finally:
        decode.PIECE_BYTES = old
    assert "".join(pieces) == text
    assert all(len(part.encode(encoding)) <= 3 * piece + 4 or "\n" not in part[:-1] for part in pieces)


def test_pieces_of_one_large_file_are_documents_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "PIECE_BYTES", 100)
    files(tmp_path, **{"big.txt": "a line of text\n" * 30})
    found, _ = read(FilesSource(path=str(tmp_path / "big.txt")))
    assert list(found)[:3] == ["big.txt", "big.txt#2", "big.txt#3"]
    assert all(text.endswith("\n") for text in found.values())
    assert "".join(found.values()) == "a line of text\n" * 30


def test_hidden_secret_and_installed_files_stay_out(tmp_path):
    key = "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nabc\n"
    files(tmp_path, **{".hidden": "x", ".git/config": "x", ".env": "TOKEN=1", "id_rsa": "x",
                       "server.pem": "x",
                       "aws/credentials.json": "{}", "notes.txt": key, "node_modules/a.js": "x",
                       "env/pyvenv.cfg": "x", "env/lib/b.py": "x", "src/.cache/c": "x",
                       "credentials.py": "class Credentials: ..."})
    (tmp_path / "circle").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    found, skipped = read(FilesSource(path=str(tmp_path)))
    assert list(found) == ["credentials.py"]
    assert {reason: fact["count"] for reason, fact in skipped.items()} == {
        "looks like a secret": 5, "hidden folder": 2, "folder of installed or generated files": 2,
        "hidden file": 1, "link to a folder": 1, "not a regular file": 1}
    assert looks_secret("My.PEM") and not looks_secret("keyboard.txt") and not looks_secret("environment.md")


def test_a_link_to_itself_is_no_file(tmp_path):
    files(tmp_path, **{"a.txt": "words"})
    (tmp_path / "loop").symlink_to("loop")
    assert read(FilesSource(path=str(tmp_path))) == (
        {"a.txt": "words"}, {"not a regular file": {"count": 1, "examples": ["loop"]}})


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is closed to root")
def test_closed_folders_are_named(tmp_path):
    files(tmp_path, **{"a.txt": "words", "shut/b.txt": "words", "listed/in/c.txt": "words"})
    (tmp_path / "link").symlink_to(tmp_path / "shut" / "b.txt")
    (tmp_path / "shut").chmod(0)
    (tmp_path / "listed").chmod(0o400)
    try:
        found, skipped = read(FilesSource(path=str(tmp_path)))
    finally:
        (tmp_path / "shut").chmod(0o700)
        (tmp_path / "listed").chmod(0o700)
    assert found == {"a.txt": "words"}
    assert {reason: fact["count"] for reason, fact in skipped.items()} == {"unreadable file": 2, "unreadable folder": 1}


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    files(tmp_path, **{name: name for name in ("b.txt", "a/z.txt", "a/b/c.txt", "Z.txt", "10.txt", "9.txt")})
    expected = list(read(FilesSource(path=str(tmp_path)))[0])
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: reversed(list(real(path))))
    assert list(read(FilesSource(path=str(tmp_path)))[0]) == expected
    assert expected == ["10.txt", "9.txt", "Z.txt", "a/b/c.txt", "a/z.txt", "b.txt"]


def test_a_path_may_be_a_file_or_a_glob(tmp_path):
    files(tmp_path, **{"a/x.txt": "1", "a/y.md": "2", "b/x.txt": "3"})
    assert list(read(FilesSource(path=str(tmp_path / "a" / "y.md")))[0]) == ["y.md"]
    assert list(read(FilesSource(path=str(tmp_path / "**" / "*.txt")))[0]) == ["a/x.txt", "b/x.txt"]
    assert list(read(FilesSource(path=str(tmp_path / "*")))[0]) == ["a/x.txt", "a/y.md", "b/x.txt"]


def test_a_wrong_path_gets_the_nearest_name(tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(DataError, match="Did you mean 'texts'"):
        read(FilesSource(path=str(tmp_path / "text" / "inner")))
    with pytest.raises(DataError, match="no file matches"):
        read(FilesSource(path=str(tmp_path / "*.txt")))
    with pytest.raises(ConfigError, match="gb18030"):
        from_dict(FilesSource, {"path": "x", "encoding": "hex"})
    with pytest.raises(ConfigError, match="greater than 0"):
        from_dict(FilesSource, {"path": "x", "weight": 0})


def _compressed(suffix, data):
    zstandard = pytest.importorskip("zstandard")
    return {"": lambda d: d, ".gz": gzip.compress, ".xz": lzma.compress,
            ".zst": lambda d: zstandard.ZstdCompressor().compress(d)}[suffix](data)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_files_that_break_off_are_named(tmp_path, suffix):
    whole = _compressed(suffix, " ".join(str(i * i) for i in range(100_000)).encode())
    files(tmp_path, **{f"half.txt{suffix}": whole[:len(whole) // 2], f"two.txt{suffix}": 2 * _compressed(suffix, b"ab"),
                       f"none.txt{suffix}": _compressed(suffix, b"")})
    found, skipped = read(FilesSource(path=str(tmp_path)))
    assert found[f"two.txt{suffix}"] == "abab" and set(found) <= {f"two.txt{suffix}", f"none.txt{suffix}"}
    assert skipped["damaged compressed file"]["examples"][0].startswith(f"half.txt{suffix}")


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_json_lines(tmp_path, suffix):
    lines = [json.dumps({"title": "t", "text": "斗拱"}), "{broken", "", json.dumps({"title": "only"}), "[1]",
             json.dumps({"title": "u", "text": "two"}, ensure_ascii=False)]
    files(tmp_path, **{f"a.jsonl{suffix}": _compressed(suffix, "\n".join(lines).encode())})
    found, skipped = read(JsonlSource(path=str(tmp_path), fields=("title", "text")))
    assert found == {f"a.jsonl{suffix}:1": "t\n\n斗拱", f"a.jsonl{suffix}:6": "u\n\ntwo"}
    (broken,) = skipped["broken JSON line"]["examples"]
    assert broken.startswith(f"a.jsonl{suffix}:2 (byte {len(lines[0]) + 1}")
    assert skipped["record without a text in field 'text'"]["count"] == 1
    assert skipped["record that is not an object"]["count"] == 1
    in_folder, _ = read(FilesSource(path=str(tmp_path)))
    assert list(in_folder.values()) == ["斗拱", "two"]


def test_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"document {i}" for i in range(150)]
    pq.write_table(pa.table({"text": [*texts, None], "n": list(range(151))}), tmp_path / "a.parquet")
    found, skipped = read(ParquetSource(path=str(tmp_path)))
    assert list(found.values()) == texts
    assert skipped["record without a text in field 'text'"]["count"] == 1
    assert read(FilesSource(path=str(tmp_path)))[0] == found
    assert read(ParquetSource(path=str(tmp_path), fields=("body",)))[1] == {
        "Parquet file without column 'body'": {"count": 1, "examples": ["a.parquet (it has text, n)"]}}
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    assert "damaged Parquet file" in read(ParquetSource(path=str(tmp_path)))[1]


def test_parquet_in_a_folder_asks_for_pyarrow(tmp_path, monkeypatch):
    files(tmp_path, **{"a.txt": "words", "b.parquet": "PAR1"})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"reading b\.parquet needs the package 'pyarrow'"):
        read(FilesSource(path=str(tmp_path)))


def test_a_local_dataset_streams(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["one", "two", "three"], "n": [1, 2, 3]}).save_to_disk(str(folder))
    assert list(read(HuggingFaceSource(dataset=str(folder), limit=2))[0].values()) == ["one", "two"]
    with pytest.raises(DataError, match="cannot be opened"):
        read(HuggingFaceSource(dataset=str(tmp_path / "not-there"), split="train"))


def test_the_python_installation_is_text(monkeypatch):
    found, skipped = read(PythonSource(tests=False))
    library = sum(len(text.encode()) for text in found.values())
    assert library > 8_000_000
    assert "os.py" in found and "pydoc_data/topics.py#assert" in found and "pydoc_data/topics.py" not in found
    assert not any("site-packages" in name or "__pycache__" in name for name in found)
    assert "encodings/cp1252.py" not in found
    assert not any(name.startswith("test/") for name in found)
    assert PythonSource().about()["python"] == sys.version.split()[0]
    assert skipped["generated table"]["count"] > 20


def test_a_zipped_standard_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(DataError, match="zipped or embedded"):
        read(PythonSource())


@pytest.mark.parametrize("kind", ["files", "jsonl", "parquet", "hf", "python"])
def test_source_configs_survive_json(kind):
    required = {"python": {}, "hf": {"dataset": "x"}}.get(kind, {"path": "x"})
    source = from_dict(SOURCES[kind], {"kind": kind, **required})
    assert from_dict(SOURCES[kind], json.loads(json.dumps(to_dict(source)))) == source
    assert all("description" in field or name == "kind" for name, field in
               json_schema(SOURCES[kind])["properties"].items())
