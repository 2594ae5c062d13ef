# SPDX-License-Identifier: BSD-3-Clause
"""One part: the results of one unit as a Parquet file.

One row per image, in the order of the manifest, where index, label and prob are lists, best first:
so that rows are counted as images are, and failed ones look like the others. These are the fields
of a JSON line, unrounded. The file's metadata hold the job's fingerprint, the unit and how many
images failed; nothing in it depends on time, place or process.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from resnet_fused.jobs.manifest import Header
from resnet_fused.predict.writer import METADATA, Prediction, spelled

ROWS = 10_000  # per row group, so that a large unit is not in memory as a whole
SCHEMA = pa.schema(
    [
        ("filename", pa.string()),
        ("index", pa.list_(pa.int64())),
        ("label", pa.list_(pa.string())),
        ("prob", pa.list_(pa.float32())),
        ("error", pa.string()),
    ]
)


class Part(NamedTuple):
    """A complete part: its file, its unit, its images and how many of them failed."""

    path: Path
    unit: int
    images: int
    failed: int


class Damaged(Exception):
    """The file is no complete Parquet file, or has not as many rows as its unit has images."""


class PartWriter:
    """Takes the predictions of one unit, in order.

    Args:
        file: to write to.
        header: of the job.
        unit: number of the unit.
        names: of its images.
    """

    def __init__(self, file: BinaryIO, header: Header, unit: int, names: Sequence[str]) -> None:
        self.failed = 0
        self._header = header
        self._unit = unit
        self._names = iter(names)
        self._rows: list[dict[str, Any]] = []
        self._writer = pq.ParquetWriter(file, SCHEMA, compression="zstd")

    def write(self, prediction: Prediction) -> None:
        """Append one prediction; its file name is the manifest's."""
        self.failed += prediction.error is not None
        row = {"filename": spelled(next(self._names)), "error": prediction.error}
        self._rows.append({field: getattr(prediction, field) for field in SCHEMA.names} | row)
        if len(self._rows) == ROWS:
            self._write_rows()

    def flush(self) -> None:
        """Nothing: a part appears as a whole."""

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write what is left, and the metadata; after an exception only let go of the file."""
        if kind is not None:
            with contextlib.suppress(Exception):
                self._writer.close()
            return
        if self._rows:
            self._write_rows()
        about = {
            "job": self._header.sha256,
            "unit": self._unit,
            "failed": self.failed,
            "fingerprint": self._header.fingerprint,
        }
        self._writer.add_key_value_metadata({METADATA: json.dumps(about)})
        self._writer.close()

    def _write_rows(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA))
        self._rows.clear()


def name(unit: int, units: int) -> str:
    """The file name of a part; sorting by name is sorting by unit."""
    return f"part-{unit:0{max(5, len(str(units - 1)))}}.parquet"


def read(path: Path, header: Header, unit: int) -> Part:
    """Look at a part's metadata.

    Raises:
        Damaged: it is cut, no Parquet file, or has not one row per image of the unit.
        ValueError: it is of another job or unit.
    """
    with open(path, "rb") as file:
        try:
            metadata = pq.read_metadata(file)
            about = json.loads((metadata.metadata or {}).get(METADATA.encode(), b"null"))
        except (OSError, ValueError) as error:  # what pyarrow raises
            raise Damaged(str(error)) from error
    if about is None or (about.get("job"), about.get("unit")) != (header.sha256, unit):
        raise ValueError(f"{path} is not of this job; move it away, or give another folder")
    if metadata.num_rows != header.size(unit):
        raise Damaged(f"{metadata.num_rows} rows for {header.size(unit)} images")
    return Part(path, unit, metadata.num_rows, about["failed"])
