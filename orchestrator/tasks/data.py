"""Reading the user's data: tables from files or a hub data set, tokens padded to one length.

What is wrong with one file is raised as `BadInput`; over several files problems are collected, so
that a person sees all of them at once.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from orchestrator import hub
from orchestrator.problems import nearest
from orchestrator.tasks import Encoded, Split
from orchestrator.trial import BadInput

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
MAX_LISTED = 12  # files
MAX_ALIKE = 5  # problems of one kind
MAX_SHOWN = 40  # characters of a column's name
MIN_ROWS = 10  # with fewer, all labels may well differ

K = TypeVar("K")
S = TypeVar("S")
T = TypeVar("T")


class TabSeparated(csv.excel):
    """Quotation marks mean nothing, as in the TSV files of GLUE."""

    delimiter = "\t"
    quoting = csv.QUOTE_NONE


@dataclass(frozen=True, kw_only=True)
class Table:
    """One file or hub split. `columns[name][i]` is a cell of row i; `name` is what problems call it."""

    name: str
    columns: dict[str, list[Any]]

    def texts(self, column: str) -> list[str]:
        """A column as text without white space around it; an empty string where there is no value."""
        return [cell_text(value) for value in self.columns[column]]


def cell_text(value: Any) -> str:
    """A cell as text. Whole numbers lose the point that other programs gave them: 1.0 is "1"."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def read_splits(
    data: str,
    problems: list[str],
    *,
    names: Mapping[Split, str | None],
    data_config: str | None = None,
    data_revision: str | None = None,
    columns: Sequence[str] | None = None,
) -> dict[Split, Table]:
    """The named splits of a file, a folder or a hub data set; what cannot be read joins `problems`.

    A split named None is left out, but for train: it is then `data` itself, or the hub's "train".
    `columns` names the columns of files without a header.
    """
    names = {split: name for split, name in names.items() if name or split == "train"}
    if not is_local(data):
        wanted = {split: name or "train" for split, name in names.items()}
        problems += shared_sources(wanted)
        return collect(wanted, partial(_read_hub, data, data_config, data_revision), problems)
    if (root := local_path(data, problems)) is None:
        return {}
    pairs = {split: (split, name) for split, name in names.items()}
    paths = collect(pairs, lambda pair: split_path(root, *pair), problems)
    problems += shared_sources(paths)
    return collect(paths, partial(read_table, columns=columns), problems)


def collect(sources: Mapping[K, S], read: Callable[[S], T], problems: list[str]) -> dict[K, T]:
    """`read` applied to each source; the problems of those that fail join `problems`."""
    found: dict[K, T] = {}
    for name, source in sources.items():
        try:
            found[name] = read(source)
        except BadInput as error:
            problems += error.problems
    return found


def is_local(data: str) -> bool:
    """Whether `data` is, or can only be meant as, a file or folder."""
    looks_like_path = data.endswith((*TABLE_SUFFIXES, ".txt")) or not hub.ID.fullmatch(data)
    return looks_like_path or Path(data).exists()


def local_path(data: str, problems: list[str]) -> Path | None:
    """`data` as a path, None if it does not exist."""
    path = Path(data).expanduser()
    if path.exists():
        return path
    problems.append(f"task.data: there is no file or folder {data}.")
    return None


def split_path(root: Path, split: Split, name: str | None) -> Path:
    """The file of a split: `name` beside or below `root`; `root` itself where it is a file."""
    folder = root if root.is_dir() else root.parent
    if name is None and root.is_dir():
        raise BadInput([f"task.{split} must name a file of {root}; it has {_listing(root)}."])
    path = root if name is None else folder / name
    if not path.is_file():
        raise BadInput([f"task.{split}: there is no file {path}; {folder} has {_listing(folder)}."])
    return path


def read_table(path: Path, *, columns: Sequence[str] | None = None) -> Table:
    """A CSV, TSV (no quoting), JSON-lines or Parquet file. CSV and TSV cells are always text."""
    try:
        if path.suffix in (".csv", ".tsv"):
            return _read_delimited(path, columns)
        if columns is not None:
            raise BadInput([f"task.columns is for CSV and TSV files without a header, not {path}."])
        if path.suffix == ".jsonl":
            return _read_json_lines(path)
        if path.suffix == ".parquet":
            return _read_parquet(path)
    except UnicodeDecodeError as error:
        raise BadInput([f"{path} is not UTF-8 text: {error}."]) from error
    raise BadInput([f"{path} is of no known kind; known are {', '.join(TABLE_SUFFIXES)}."])


def missing_columns(table: Table, needed: Mapping[str, str]) -> list[str]:
    """No rows at all, or a column that is not there; `needed` maps an option to the column it names."""
    if not any(table.columns.values()):
        return [f"{table.name} has no rows."]
    known = [name[:MAX_SHOWN] for name in table.columns]
    headerless = table.name.endswith((".csv", ".tsv"))
    hint = " If the file has no header, name its columns in task.columns." if headerless else ""
    return [
        f"task.{option}: `{column}` is not a column of {table.name}{nearest(column, known)}{hint}"
        for option, column in needed.items()
        if column not in table.columns
    ]


def empty_cells(table: Table, columns: Iterable[str]) -> list[str]:
    """A problem for each column in which rows have nothing."""
    problems = []
    for column in columns:
        texts = table.texts(column)
        empty = [row for row, text in enumerate(texts, 1) if not text]
        if empty:
            problems.append(
                f"{table.name}: {len(empty)} of {len(texts)} rows have nothing in the column"
                f" `{column}`; the first is row {empty[0]}."
            )
    return problems


def few(problems: list[str]) -> list[str]:
    """The first problems of one kind, and how many more there are."""
    more = len(problems) - MAX_ALIKE
    return problems[:MAX_ALIKE] + ([f"… and {more} more like the last."] if more > 0 else [])


def not_labels(table: Table, column: str) -> list[str]:
    """A problem if most rows have a label of their own: it is then another column, or a number."""
    kinds, rows = len(set(table.texts(column))), len(table.columns[column])
    if rows < MIN_ROWS or 2 * kinds <= rows:
        return []
    return [
        f"task.label_column: `{column}` has {kinds:,} distinct values in the {rows:,} rows of"
        f" {table.name}, so it holds no classes; its columns are {', '.join(table.columns)}."
    ]


def pad(vectors: Sequence[np.ndarray], *, length: int, value: int) -> np.ndarray:
    """Integer vectors as one array [rows, length] of int64, filled up with `value`."""
    array = np.full((len(vectors), length), value, dtype=np.int64)
    for row, vector in zip(array, vectors, strict=True):
        row[: len(vector)] = vector
    return array


def collate(
    encoded: Encoded, indices: Sequence[int], *, length: int | None = None
) -> dict[str, np.ndarray]:
    """Every feature of the rows as int64 [batch, length], and their labels."""
    rows = [encoded.features[index] for index in indices]
    batch = {}
    for name in rows[0]:
        vectors = [row[name] for row in rows]
        fill = encoded.padding.get(name, -100 if name == "labels" else 0)
        longest = max(map(len, vectors))
        batch[name] = pad(vectors, length=longest if length is None else length, value=fill)
    if encoded.labels is not None:
        batch["labels"] = encoded.labels[np.asarray(indices)].astype(np.int64)
    return batch


def shared_sources(sources: Mapping[Split, Any]) -> list[str]:
    """A problem for each pair of splits with one source: nothing may be both trained and scored on."""
    return [
        f"task.{first} and task.{second} are the same data, {sources[first]}."
        for first, second in itertools.combinations(sources, 2)
        if sources[first] == sources[second]
    ]


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    more = [f"and {len(names) - MAX_LISTED} more"] if len(names) > MAX_LISTED else []
    return ", ".join(names[:MAX_LISTED] + more) or "no files"


def _read_delimited(path: Path, columns: Sequence[str] | None) -> Table:
    csv.field_size_limit(sys.maxsize)
    dialect = TabSeparated if path.suffix == ".tsv" else csv.excel
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            rows = [row for row in csv.reader(file, dialect) if row]
        except csv.Error as error:
            raise BadInput([f"{path} cannot be read: {error}."]) from error
    header = list(columns) if columns is not None else (rows.pop(0) if rows else [])
    if rows and rows[0] == header:
        raise BadInput(
            [f"task.columns: the first row of {path} names its columns; leave them out."]
        )
    odd = [number for number, row in enumerate(rows, 1) if len(row) != len(header)]
    if odd:
        raise BadInput(
            [
                f"{path}: {len(odd)} of {len(rows)} rows do not have its {len(header)} columns"
                f" ({', '.join(header)}); the first is row {odd[0]} with {len(rows[odd[0] - 1])}."
            ]
        )
    return Table(
        name=str(path),
        columns={name: [row[place] for row in rows] for place, name in enumerate(header)},
    )


def _read_json_lines(path: Path) -> Table:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise BadInput([f"{path}, line {number} is not JSON: {error}."]) from error
            if not isinstance(rows[-1], dict):
                raise BadInput([f"{path}, line {number} is not a JSON object."])
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(name=str(path), columns={n: [row.get(n) for row in rows] for n in names})


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise BadInput([f"{path} is not a Parquet file: {error}."]) from error
    return Table(name=str(path), columns=table.to_pydict())


def _read_hub(data: str, data_config: str | None, revision: str | None, split: str) -> Table:
    """A hub split; class labels come as their names, -1 (a hidden label) as no value."""
    import datasets

    reachable = hub.is_reachable()
    try:
        rows = datasets.load_dataset(data, data_config, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        why = f"the hub does not give it: {reason}" if reachable else "the hub cannot be reached"
        problem = f"task.data: {data} ({split}) is no file or folder here, and {why}."
        raise BadInput([problem]) from error
    columns: dict[str, list[Any]] = {name: list(rows[name]) for name in rows.column_names}
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel):
            columns[name] = [
                feature.names[v] if v is not None and v >= 0 else None for v in columns[name]
            ]
    return Table(name=f"{data} ({split})", columns=columns)
