# SPDX-License-Identifier: BSD-3-Clause
"""Predictions as CSV or JSON lines, to stdout or to a file that appears once it is complete."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any, TextIO

COLUMNS = ("filename", "index", "label", "prob", "rank", "error")
FORMATS = (".csv", ".jsonl")
METADATA = "resnet_fused"  # key in the metadata of Parquet files, where jobs describe themselves


@dataclass(frozen=True)
class Prediction:
    """The best classes of one image, best first, or why there are none.

    A label is None where the classes have no names.
    """

    filename: str
    index: list[int]
    label: list[str | None]
    prob: list[float]
    error: str | None = None


def spelled(filename: str) -> str:
    """A file name as text that any file can hold: a byte that is not UTF-8 becomes \\xff."""
    return os.fsencode(filename).decode("utf-8", "backslashreplace")


def rounded(prob: float) -> float:
    """A probability to six digits, as text files hold it."""
    return float(f"{prob:.6g}")


def csv_rows(prediction: Prediction) -> list[list[Any]]:
    """One row of COLUMNS per rank; a failed image has one row with only ``filename, error``."""
    if prediction.error is not None:
        return [[prediction.filename, None, None, None, None, prediction.error]]
    ranked = zip(prediction.index, prediction.label, prediction.prob, strict=True)
    return [
        [prediction.filename, index, label, f"{prob:.6g}", rank, None]
        for rank, (index, label, prob) in enumerate(ranked, 1)
    ]


def json_line(prediction: Prediction) -> str:
    """One object with the fields of Prediction."""
    return json.dumps({**asdict(prediction), "prob": [rounded(p) for p in prediction.prob]})


def check(output: str | None, overwrite: bool) -> None:
    """Refuse an output that cannot be written or must not be.

    Raises:
        ValueError: the ending is unknown, the folder is missing, or the file exists.
    """
    if output is None:
        return
    if os.path.splitext(output)[1].lower() not in FORMATS:
        raise ValueError(f"--output must end in {' or '.join(FORMATS)}, got {output!r}")
    folder = os.path.dirname(output) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"--output must be in a folder that exists, but there is no {folder!r}")
    if os.path.isdir(output) or (os.path.lexists(output) and not overwrite):
        raise ValueError(f"--output {output!r} exists; give another name, or --overwrite")


class Writer:
    """Writes predictions one by one.

    A file is written as ``OUTPUT.<process id>.part`` and renamed by ``finish``: whatever happens
    before, OUTPUT is either absent (or the older file) or complete.

    Args:
        output: path that ``check`` accepts; None for CSV on stdout.
    """

    def __init__(self, output: str | None) -> None:
        self.output = output
        self.part = None if output is None else f"{output}.{os.getpid()}.part"
        self._file = _stdout() if self.part is None else _create(self.part)
        self._json = output is not None and output.lower().endswith(".jsonl")
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._quoting = csv.writer(self._file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        if not self._json:
            self._csv.writerow(COLUMNS)

    def write(self, prediction: Prediction) -> None:
        """Append one prediction."""
        if self._json:
            self._file.write(json_line(prediction) + "\n")
        else:
            for row in csv_rows(prediction):
                # csv takes an unquoted \r for the end of a row, and does not quote it itself.
                special = any("\r" in cell for cell in row if isinstance(cell, str))
                (self._quoting if special else self._csv).writerow(row)

    def flush(self) -> None:
        """Hand over what was written, so that a reader of the pipe or of the part file sees it."""
        self._file.flush()

    def finish(self) -> None:
        """Make the output appear under its name."""
        self._file.flush()
        if self.output is not None and self.part is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.part, self.output)

    def abandon(self) -> str | None:
        """Stop early: close the part file and return its name; None for stdout."""
        if self.part is not None:
            with contextlib.suppress(OSError):  # a full disk may be why we stop
                self._file.close()
        return self.part


def _create(path: str) -> TextIO:
    # surrogateescape: a file name that is not UTF-8 comes out as the bytes it has on disk.
    return open(path, "w", encoding="utf-8", errors="surrogateescape", newline="")


def _stdout() -> TextIO:
    if sys.stdout is None:
        raise ValueError("stdout is closed; give --output")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")
    return sys.stdout
