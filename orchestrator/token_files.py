"""A split's tokens on disk, mapped into memory, so that the workers of a host hold them once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from orchestrator.tasks import Encoded

ABOUT, LABELS = "about.json", "row-labels.npy"  # a feature may be called labels
Features = dict[str, np.ndarray]


class MappedFeatures(Sequence[Features]):
    """The features of rows, cut out of one array a name when they are asked for.

    `columns` maps a name to the values of all rows, one after the other, and to where each ends.
    """

    def __init__(self, columns: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()))[1])

    @overload
    def __getitem__(self, index: int) -> Features: ...
    @overload
    def __getitem__(self, index: slice) -> list[Features]: ...
    def __getitem__(self, index: int | slice) -> Features | list[Features]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # raises IndexError, and counts from the end
        return {
            name: values[ends[row - 1] if row else 0 : ends[row]].astype(np.int64)
            for name, (values, ends) in self._columns.items()
        }


def save(encoded: Encoded, folder: Path) -> None:
    """One file a feature, as narrow as its values allow."""
    names = list(encoded.features[0])
    for name in names:
        vectors = [row[name] for row in encoded.features]
        values = np.concatenate(vectors)
        narrow = np.abs(values).max(initial=0) < 2**31
        np.save(folder / f"{name}.npy", values.astype(np.int32) if narrow else values)
        np.save(folder / f"{name}.ends.npy", np.cumsum([len(vector) for vector in vectors]))
    if encoded.labels is not None:
        np.save(folder / LABELS, encoded.labels)
    about = {"names": names, "ids": list(encoded.ids), "padding": dict(encoded.padding)}
    (folder / ABOUT).write_text(json.dumps(about))


def load(folder: Path) -> Encoded:
    """What was saved; a page is read when it is needed."""
    about = json.loads((folder / ABOUT).read_text())
    columns = {
        name: (_mapped(folder / f"{name}.npy"), np.array(_mapped(folder / f"{name}.ends.npy")))
        for name in about["names"]
    }
    labels = folder / LABELS
    return Encoded(
        ids=about["ids"],
        features=MappedFeatures(columns),
        labels=np.load(labels, allow_pickle=False) if labels.exists() else None,
        padding=about["padding"],
    )


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
