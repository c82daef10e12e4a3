"""The rows of a data file: one reader for trainer, teacher, evaluator and study, and one error for what is wrong in it.

    for row in read_rows(Path("train.jsonl")):
        print(row.where, row.values["prompt"])

A `.jsonl` file holds an object a line, `.json` a list of objects, `.parquet` a table. Text is UTF-8, with or without a
byte-order mark; blank lines are passed over. `encode_rows` makes such a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.data.hub import local_file
from tutelage.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    values: dict[str, Any]
    where: str
    """Its file and line (of a table or a list: its number), for messages."""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, in its order.

    Args:
        path: the file; or one on the hub, as `tutelage.data.hub.local_file`.

    Raises:
        DataError: the file is missing, of another kind or not readable; or a row is no JSON object, or holds what is
            no text; named by file, line and field.

    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is none of {', '.join(SUFFIXES)}; convert it to one of them")
    file = local_file(path)
    if not file.is_file():
        raise DataError(f"{path} is not a file; give the path of a data set")
    parts = _table_rows(file, path) if path.suffix == ".parquet" else _json_rows(file, path)
    for where, values in parts:
        if not isinstance(values, dict):
            raise DataError(f"{where}: holds {type(values).__name__}, expected an object with named fields")
        yield Row(values, where)


def _table_rows(file: Path, path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not readable as Parquet: {error}") from error
    for number, values in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number}", values


def _json_rows(file: Path, path: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as stream:
        if path.suffix == ".json":
            listed = _parsed(stream.read(), str(path))
            if not isinstance(listed, list):
                raise DataError(f"{path} holds {type(listed).__name__}, expected a list of rows")
            for number, values in enumerate(listed, start=1):
                yield f"{path}, row {number}", values
            return
        # Lines of bytes end at "\n" alone. Text's splitlines ends them at U+2028 and others too, which JSON allows
        # within a string as they are.
        for number, line in enumerate(stream, start=1):
            if line.removeprefix(_BYTE_ORDER_MARK).strip():
                yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")


def _parsed(content: bytes, where: str) -> Any:
    """What a JSON text says.

    Raises:
        DataError: it is not UTF-8, not JSON, or names half of a surrogate pair.

    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: is not UTF-8 (byte 0x{content[error.start]:02x}, number {error.start + 1}); "
            "convert the file, for example with iconv -f latin1 -t utf-8"
        ) from error
    try:
        values = json.loads(text)
    except ValueError as error:
        hint = "; a file of JSON lines is called .jsonl" if str(error).startswith("Extra data") else ""
        raise DataError(f"{where}: is not JSON ({error}){hint}") from error
    if "\\ud" in text or "\\uD" in text:  # JSON can name what UTF-8 cannot hold, and no tokenizer takes
        _refuse_surrogates(values, where, "")
    return values


def _refuse_surrogates(value: Any, where: str, field: str) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: holds half of a surrogate pair (U+{ord(value[error.start]):04X}), which is no character; "
                "write the whole pair, or the character itself",
                field,
            ) from error
    elif isinstance(value, dict):
        for key, inner in value.items():
            _refuse_surrogates(inner, where, f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_surrogates(inner, where, f"{field}[{index}]")


def encode_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> bytes:
    """The content of a file of these rows, in the form that its name says and `read_rows` reads.

    Raises:
        DataError: the name is of no such form, or that form has no place for a value.

    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is none of {', '.join(SUFFIXES)}; call it by the form that it is to have")
    if path.suffix == ".parquet":
        return _table_bytes(rows, path)
    try:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} cannot hold these rows: {error}; leave the column out, or write .parquet") from error
    text = "".join(f"{line}\n" for line in lines) if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]\n"
    return text.encode()


def _table_bytes(rows: Sequence[Mapping[str, Any]], path: Path) -> bytes:
    import pyarrow
    from pyarrow import parquet

    names = dict.fromkeys(name for row in rows for name in row)  # `from_pylist` would take the first row's only
    columns = {}
    for name in names:
        try:
            columns[name] = pyarrow.array([row.get(name) for row in rows])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise DataError(f"{path} cannot hold these rows: {error}; write .jsonl", name) from error
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue())
