"""A Parquet file of encoded images, as the Hugging Face hub stores them; only the rows asked for are read."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frostglass.core.errors import BadInput
from frostglass.vision.datasets import DATASETS, Catalogue, shown
from frostglass.vision.decoding import Picture, decode

MOST_CLASSES = 100_000
"""Outputs that a model for the labels needs, at the most."""


@DATASETS.register()
def parquet(path: str) -> Catalogue:
    """Rows of a Parquet file with the columns `img` or `image` ({bytes, path}, or bytes) and `label` (integers).

    Raises:
        BadInput: pyarrow not installed, a file that is missing, unreadable or no Parquet, columns missing or of
            another type, no rows, labels missing, negative or of too many classes.
    """
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError:
        raise BadInput(
            f"dataset: 'parquet:{path}' needs pyarrow, which is not installed; run pip install 'frostglass[parquet]'."
        ) from None
    table = _Table(Path(path).expanduser(), pyarrow, pq)
    with table.open() as file:
        table.check_columns(file.schema_arrow)
        labels = table.labels(file)
        names = table.names(file)
        classes = max(_declared_classes(file.schema_arrow), int(labels.max()) + 1)
    return Catalogue(names, labels.tolist(), classes, table.read)


def _declared_classes(schema: Any) -> int:
    """How many label names the hub's metadata lists; 0 if there is none."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return len(info["info"]["features"]["label"]["names"])
    except (ValueError, KeyError, TypeError):
        return 0


@dataclass
class _Table:
    """One file, with the pyarrow modules that were imported for it."""

    path: Path
    pyarrow: Any
    pq: Any
    column: str = ""
    nested: bool = False

    def open(self) -> Any:
        where = shown(self.path)
        try:
            return self.pq.ParquetFile(self.path)
        except FileNotFoundError:
            raise BadInput(f"dataset: file {where} does not exist; give the path of a Parquet file.") from None
        except (OSError, self.pyarrow.ArrowException) as problem:
            if self.path.is_dir():
                raise BadInput(f"dataset: {where} is a folder, not a Parquet file; name the file in it.") from None
            raise self._broken(problem) from None

    def _broken(self, problem: Exception) -> BadInput:
        line = str(problem).strip().split("\n")[0]
        return BadInput(f"dataset: {shown(self.path)} cannot be read as Parquet ({line}); replace the file.")

    def check_columns(self, schema: Any) -> None:
        types, where = self.pyarrow.types, shown(self.path)
        found = next((c for c in ("img", "image") if c in schema.names), None)
        if found is None or "label" not in schema.names:
            raise BadInput(
                f"dataset: {where} has the columns {', '.join(schema.names) or 'none'}; "
                "it needs img or image, and label."
            )
        kind = schema.field(found).type
        self.column, self.nested = found, types.is_struct(kind)
        inner = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if self.nested else {}
        stored = inner.get("bytes") if self.nested else kind
        if stored is None or not (types.is_binary(stored) or types.is_large_binary(stored)):
            raise BadInput(
                f"dataset: column {found} of {where} has the type {kind}; "
                "it must hold encoded images: binary, or a struct with bytes and path."
            )
        if not types.is_integer(schema.field("label").type):
            raise BadInput(
                f"dataset: column label of {where} has the type {schema.field('label').type}; it must hold integers."
            )

    def _columns(self, reader: Any, *columns: str) -> Any:
        try:
            return reader(columns=list(columns))
        except (OSError, self.pyarrow.ArrowException) as problem:
            raise self._broken(problem) from None

    def labels(self, file: Any) -> np.ndarray:
        column = self._columns(file.read, "label").column("label")
        where = shown(self.path)
        if not len(column):
            raise BadInput(f"dataset: {where} has no rows; give a file with images.")
        if column.null_count:
            raise BadInput(f"dataset: {column.null_count} labels of {where} are missing; remove those rows.")
        values: np.ndarray = column.to_numpy()
        if values.min() < 0:
            raise BadInput(f"dataset: {where} has the label {values.min()}; labels must count from 0.")
        if values.max() >= MOST_CLASSES:  # numbers of objects, say: labels are kept as rows with a column a class
            raise BadInput(
                f"dataset: the label {values.max()} of {where} would take as many classes, and {MOST_CLASSES} are the "
                "most; number them without gaps from 0."
            )
        return values

    def names(self, file: Any) -> list[str]:
        """The stored paths where every row has one of its own, else row numbers."""
        total = file.metadata.num_rows
        plain = [f"row-{row}" for row in range(total)]
        if not self.nested or "path" not in {f.name for f in file.schema_arrow.field(self.column).type}:
            return plain
        cells = self._columns(file.read, f"{self.column}.path").column(self.column).to_pylist()
        paths = [cell and cell["path"] for cell in cells]
        good = all(isinstance(p, str) and p for p in paths) and len(set(paths)) == total
        return [str(p) for p in paths] if good else plain

    def read(self, rows: Sequence[int]) -> Iterable[Picture]:
        wanted = f"{self.column}.bytes" if self.nested else self.column
        encoded: dict[int, bytes | None] = {}
        with self.open() as file:
            for group, first, members in _by_group(file.metadata, rows):
                cells = self._columns(lambda columns, g=group: file.read_row_group(g, columns=columns), wanted)
                for row in members:
                    cell = cells.column(self.column)[row - first].as_py()
                    encoded[row] = cell["bytes"] if self.nested and cell else cell
        for row in rows:
            content, name = encoded[row], f"row {row} of {shown(self.path)}"
            if not content:
                raise BadInput(f"dataset: {name} holds no image bytes; leave it out with rows, or replace the file.")
            yield decode(content, name)


def _by_group(metadata: Any, rows: Sequence[int]) -> Iterable[tuple[int, int, list[int]]]:
    """(row group, its first row, the wanted rows in it) for the groups that hold any."""
    ends = np.cumsum([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)])
    members = defaultdict(list)
    for row in sorted(set(rows)):
        members[int(np.searchsorted(ends, row, side="right"))].append(row)
    return [(g, int(ends[g]) - metadata.row_group(g).num_rows, wanted) for g, wanted in sorted(members.items())]
