"""Reading a table of file names and labels: CSV in any separator and encoding, JSON lines, parquet."""

import csv
import io
import json
import posixpath

import pyarrow as pa
import pyarrow.parquet as pq

from .files import read_bytes

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_SEPARATORS = ",;\t|"


def read_table(path: str) -> dict[str, list]:
    """The columns of a table by their names, with None where a field is blank.

    Text whose fields all are whole numbers becomes int, also where blank fields made somebody write `3.0`.

    Args:
        path: as `files.read_bytes` takes it.

    Raises:
        ValueError: where it is no table, naming it.
        OSError: where it cannot be read.
    """
    suffix = posixpath.splitext(path.partition("::")[0])[1].lower()
    data = read_bytes(path)
    try:
        if suffix == ".parquet":
            return pq.read_table(io.BytesIO(data)).to_pydict()
        text = _decode(data)
        return _json_columns(text) if suffix in (".jsonl", ".json") else _csv_columns(text)
    except (pa.ArrowInvalid, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table: {str(error).splitlines()[0]}") from None


def _decode(data: bytes) -> str:
    """Text in UTF-8, in UTF-16 as spreadsheets write it, or else in Latin-1."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    if data[1:2] == b"\0":
        return data.decode("utf-16-le")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _csv_columns(text: str) -> dict[str, list]:
    header = text.lstrip().partition("\n")[0]
    separator = max(_SEPARATORS, key=header.count)
    rows = [row for row in csv.reader(io.StringIO(text.lstrip(), newline=""), delimiter=separator) if any(row)]
    if not rows:
        raise ValueError("it is empty")
    names = [name.strip() for name in rows[0]]
    for number, row in enumerate(rows[1:], 2):
        if len(row) > len(names):
            raise ValueError(f"row {number} has {len(row)} fields, and the header {len(names)}")
    columns = {}
    for place, name in enumerate(names):
        columns[name] = _typed([row[place].strip() if place < len(row) else "" for row in rows[1:]])
    return columns


def _typed(fields: list[str]) -> list[str | int | None]:
    numbers = []
    for field in fields:
        whole = field.removesuffix(".0").removeprefix("-")
        if field and (not whole.isdecimal() or whole != str(int(whole))):  # 007 is a name
            return [field or None for field in fields]
        numbers.append(int(field.removesuffix(".0")) if field else None)
    return numbers if any(number is not None for number in numbers) else [None] * len(fields)


def _json_columns(text: str) -> dict[str, list]:
    """JSON lines, or one list of objects."""
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("its rows are no objects")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [None if row.get(name) == "" else row.get(name) for row in rows] for name in names}
