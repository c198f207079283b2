"""Records out of files: JSON lines, JSON lists and Parquet; for text, one record is one document."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dougong.core.errors import MissingExtraError
from dougong.data.decode import NotText, bare_suffix, damage, open_bytes
from dougong.data.walk import Skipped

JSON_LINES = (".jsonl", ".ndjson")
_ROWS_AT_ONCE = 64


def join_fields(record: Any, fields: Sequence[str]) -> str:
    """A record's fields in order, two newlines between. Raises NotText where one is no string."""
    if not isinstance(record, Mapping):
        raise NotText("record that is not an object", type(record).__name__)
    for field in fields:
        if not isinstance(record.get(field), str):
            held = ", ".join(str(key) for key in list(record)[:8]) or "nothing"
            raise NotText(f"record without a text in field {field!r}", f"it has {held}")
    return "\n\n".join(record[field] for field in fields)


def texts(records: Iterable[tuple[str, Any]], fields: Sequence[str],
          skipped: Skipped) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of each record that has the fields; the others are counted in `skipped`."""
    for name, record in records:
        try:
            yield name, join_fields(record, fields)
        except NotText as problem:
            skipped.add(problem.reason, name, problem.where)


def read_json_lines(path: Path, name: str, skipped: Skipped, *,
                    encoding: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yields (`name:line`, value); blank lines pass, broken ones are counted with the byte they begin at."""
    start = 0
    with open_bytes(path) as file:
        try:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        yield f"{name}:{number}", json.loads(line.decode(encoding or "utf-8-sig"))
                except (ValueError, RecursionError) as error:   # UnicodeDecodeError is a ValueError
                    skipped.add("broken JSON line", f"{name}:{number}", f"byte {start}: {error}")
                start += len(line)
        except damage() as error:
            raise NotText("damaged compressed file", str(error)) from None


def read_json(path: Path, name: str, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    """Yields (`name:number`, value) of a file that holds one list; one of JSON lines is read as such."""
    try:
        with open_bytes(path) as file:
            head = file.read(256)
            listed = head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
            values = json.loads((head + file.read()).decode("utf-8-sig")) if listed else []
    except damage() as error:
        raise NotText("damaged compressed file", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise NotText("broken JSON file", str(error)) from None
    if not listed:
        yield from read_json_lines(path, name, skipped)
    yield from ((f"{name}:{number}", value) for number, value in enumerate(values, 1))


def read_records(path: Path, name: str, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    """Yields (name, record) of a .jsonl, .json or .parquet file, compressed or not. Raises NotText for another."""
    suffix = bare_suffix(name)
    if suffix in JSON_LINES:
        return read_json_lines(path, name, skipped)
    if suffix == ".json":
        return read_json(path, name, skipped)
    if suffix == ".parquet":
        return read_parquet(path, name)
    raise NotText("not a .jsonl, .json or .parquet file")


def read_parquet(path: Path, name: str, fields: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Yields (`name:row`, {field: value}), a few rows in memory at a time; None: every column.

    Raises MissingExtraError without pyarrow, NotText where the file is no Parquet file or lacks a column.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data", f"reading {path.name}") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if lacking := [field for field in fields or () if field not in columns]:
                raise NotText(f"Parquet file without column {lacking[0]!r}",
                              f"it has {', '.join(columns[:8])}")
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=None if fields is None else list(fields)):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", record
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise NotText("damaged Parquet file", str(error).splitlines()[0]) from None
