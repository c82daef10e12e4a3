"""The rows of a data set: one reader for trainer, teacher, evaluator and study, and one error for what is wrong in it.

    for row in read_rows(Path("train.jsonl")):
        print(row.where, row.values["prompt"])

A `.jsonl` file holds an object a line, `.json` a list of objects, `.parquet` a table. Text is UTF-8, with or without a
byte-order mark; blank lines are passed over. A folder, and a name on the hub, is read by Hugging Face's `datasets`.
`encode_rows` makes a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.data.hub import is_on_hub, local_file
from tutelage.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    values: dict[str, Any]
    where: str
    """Its file and line (of a table or a list: its number), for messages."""


@dataclass(frozen=True)
class Part:
    """Which part of a data set of several; the names are those of `datasets.load_dataset`."""

    configuration: str | None = None
    """Its second argument, `name`."""
    split: str = "train"
    revision: str | None = None
    """Branch, tag or, better, commit on the hub."""
    streaming: bool = False
    """Whether rows are fetched as they are asked for."""


WHOLE = Part()


def is_dataset(path: Path) -> bool:
    """Whether `datasets` reads it: a folder, or a name on the hub (`OWNER/NAME`)."""
    if path.exists() or path.is_absolute() or is_on_hub(path):
        return path.is_dir()
    # Names of data sets may have dots in them.
    return path.suffix not in SUFFIXES if len(path.parts) == 2 else len(path.parts) == 1 and not path.suffix


def read_rows(path: Path, part: Part = WHOLE) -> Iterator[Row]:
    """The rows of a data set, in its order.

    Args:
        path: a file, or one on the hub, as `tutelage.data.hub.local_file`; or a folder or a name on the hub, as
            `datasets.load_dataset` and `datasets.load_from_disk` take them.
        part: of a folder or a name on the hub.

    Raises:
        DataError: it is missing, of another kind or not readable; or a row is no JSON object, or holds what is no text;
            named by file, line and field.

    """
    if is_dataset(path):
        for number, values in enumerate(_loaded(path, part), start=1):
            yield Row(dict(values), f"{path} ({part.split}), row {number}")
        return
    if part != WHOLE:
        raise DataError(f"{path} is one file, which has no configuration, split or revision, and is not streamed")
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{path} is none of {', '.join(SUFFIXES)}, no folder and no name on the hub (OWNER/NAME); convert it"
        )
    file = local_file(path)
    if not file.is_file():
        raise DataError(f"{path} is not a file; give the path of a data set")
    parts = _table_rows(file, path) if path.suffix == ".parquet" else _json_rows(file, path)
    for where, values in parts:
        if not isinstance(values, dict):
            raise DataError(f"{where}: holds {type(values).__name__}, expected an object with named fields")
        yield Row(values, where)


def _loaded(path: Path, part: Part) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path} is read by `datasets`, which is not installed; pip install datasets") from error
    datasets.disable_progress_bars()
    try:
        if path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(str(path))
            loaded: Iterable[dict[str, Any]] = saved[part.split] if isinstance(saved, dict) else saved
            return loaded
        loaded = datasets.load_dataset(
            str(path), part.configuration, split=part.split, revision=part.revision, streaming=part.streaming
        )
        return loaded
    # What a hub, a builder or Arrow does not like comes as any of these.
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        here = f", split {part.split}" + f", configuration {part.configuration}" * (part.configuration is not None)
        raise DataError(f"`datasets` does not read {path}{here}: {error}") from error


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
            "convert the file with iconv -f ENCODING -t utf-8, of which ENCODING is latin1 or utf-16, say"
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


def require_form(path: Path, field: str = "") -> None:
    """Looks whether a file to write is called by a form that `encode_rows` has.

    Raises:
        DataError: it is not.

    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is none of {', '.join(SUFFIXES)}; call it by the form that it is to have", field)


def encode_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> bytes:
    """The content of a file of these rows, in the form that its name says and `read_rows` reads.

    Raises:
        DataError: the name is of no such form, or that form has no place for a value.

    """
    require_form(path)
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
