# SPDX-License-Identifier: BSD-3-Clause
"""Two files of predictions, image by image: who got another class, and how far probabilities moved.

Files in the same order are compared without being held in memory; of others, what waits for its
counterpart is.
"""

from __future__ import annotations

import csv
import importlib
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_fused.predict.writer import COLUMNS, METADATA, Prediction, rounded, spelled

SHOWN = 5
READ_ERRORS = (ValueError, KeyError, TypeError, AttributeError, csv.Error)


def is_prediction_header(columns: Iterable[str]) -> bool:
    """Whether a CSV file with these columns is one of predictions."""
    return {"filename", "index", "prob"} <= set(columns)


def read(path: Path) -> Iterator[Prediction]:
    """Read the predictions of one file.

    Args:
        path: .jsonl, .parquet, a folder with part-*.parquet, or CSV, as `predict` writes them.

    Raises:
        ValueError: a line is no prediction; the message names it.
        OSError: the file cannot be read.
    """
    if path.is_dir():
        yield from itertools.chain.from_iterable(map(_read_parquet, parts(path)))
    elif path.suffix.lower() == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix.lower() == ".jsonl":
        with path.open(encoding="utf-8", errors="surrogateescape") as lines:
            yield from _checked(path, (json.loads(line) for line in lines))
    else:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield from _checked(path, _ranked(csv.DictReader(file)))


def parts(folder: Path) -> list[Path]:
    """List the parts of a job in order.

    Raises:
        ValueError: there are none.
    """
    found = sorted(folder.glob("part-*.parquet"))
    if not found:
        raise ValueError(f"{folder} must hold part-*.parquet, as predict --output DIR writes them")
    return found


def settings(path: Path) -> dict[str, str]:
    """Give what the predictions of a job depend on: the fingerprint in its parts' metadata.

    Empty for a file that carries none.
    """
    if not path.is_dir() and path.suffix.lower() != ".parquet":
        return {}
    parquet, wrong = _parquet(path)
    try:
        file = parts(path)[0] if path.is_dir() else path
        metadata = parquet.read_metadata(file).metadata or {}
        about = json.loads(metadata.get(METADATA.encode(), b"{}"))
        return {str(name): str(value) for name, value in about.get("fingerprint", {}).items()}
    except (wrong, *READ_ERRORS) as error:
        raise ValueError(f"{path} is damaged or no Parquet file: {error}") from error


def _parquet(path: Path) -> tuple[Any, type[Exception]]:
    """Give pyarrow's module for Parquet, and what it raises.

    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        pyarrow = importlib.import_module("pyarrow")
        return importlib.import_module("pyarrow.parquet"), pyarrow.ArrowException
    except ImportError:
        raise ValueError(
            f"{path} needs pyarrow to be read: pip install 'resnet_fused[parquet]'"
        ) from None


def _read_parquet(path: Path) -> Iterator[Prediction]:
    """Read one Parquet file batch by batch."""
    parquet, wrong = _parquet(path)
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from _checked(path, batch.to_pylist())
    except wrong as error:
        raise ValueError(f"{path} is damaged or no Parquet file: {error}") from error


def _ranked(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Collect the rows of each image; rank 1 or an error begins the next."""
    image: dict[str, Any] = {}
    for row in rows:
        if None in row.values() or not (row["rank"] or row["error"]):
            raise ValueError("a row has neither rank nor error, or too few columns: a cut file?")
        if row["rank"] in ("1", ""):
            if image:
                yield image
            image = {"filename": row["filename"], "error": row["error"] or None}
            image |= {"index": [], "label": [], "prob": []}
        if row["rank"]:
            image["index"].append(int(row["index"]))
            image["label"].append(row["label"] or None)
            image["prob"].append(float(row["prob"]))
    if image:
        yield image


def _checked(path: Path, rows: Iterable[dict[str, Any]]) -> Iterator[Prediction]:
    """Turn rows into predictions; what is none names its file and place."""
    number, rows = 0, iter(rows)
    while True:
        number += 1
        try:
            row = next(rows, None)
            if row is None:
                return
            index = [int(i) for i in row["index"] or ()]
            prob = [float(p) for p in row["prob"] or ()]
            labels = list(row.get("label") or [None] * len(index))
            if len(index) != len(prob) or len(index) != len(labels):
                raise ValueError("index, label and prob must be equally long")
            prediction = Prediction(
                spelled(str(row["filename"])), index, labels, prob, row.get("error") or None
            )
        except READ_ERRORS as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path} must hold predictions with {', '.join(COLUMNS)}, but image {number} "
                f"does not: {what}"
            ) from error
        yield prediction


def pairs(
    a: Iterable[Prediction], b: Iterable[Prediction]
) -> Iterator[tuple[Prediction | None, Prediction | None]]:
    """Match predictions by file name, those of a name that occurs again in order.

    Yields:
        Both, in the order in which the second of them came; at the end those without a counterpart.
    """
    waiting: tuple[dict[str, deque[Prediction]], dict[str, deque[Prediction]]] = ({}, {})
    for both in itertools.zip_longest(a, b):
        for side, item in enumerate(both):
            if item is None:
                continue
            matches = waiting[1 - side].get(item.filename)
            if matches is None:
                waiting[side].setdefault(item.filename, deque()).append(item)
                continue
            match = matches.popleft()
            if not matches:
                del waiting[1 - side][item.filename]
            yield (match, item) if side else (item, match)
    for queue in waiting[0].values():
        yield from ((item, None) for item in queue)
    for queue in waiting[1].values():
        yield from ((None, item) for item in queue)


@dataclass
class Tally:
    """What has been found so far.

    `moved` is the largest difference of a probability of a class that both name, and `moved_at` its
    image.
    """

    images: int = 0
    differ: int = 0
    flips: int = 0
    newly_failed: int = 0
    newly_fine: int = 0
    moved: float = 0.0
    moved_at: str = ""
    only: dict[str, list[str]] = field(default_factory=lambda: {"A": [], "B": []})
    only_count: dict[str, int] = field(default_factory=lambda: {"A": 0, "B": 0})

    def add(self, a: Prediction | None, b: Prediction | None) -> str:
        """Count one pair; returns what to say of it, empty if nothing."""
        if a is None or b is None:
            side, lone = ("A", a) if b is None else ("B", b)
            self.only_count[side] += 1
            if lone is not None and len(self.only[side]) < SHOWN:
                self.only[side].append(lone.filename)
            return ""
        self.images += 1
        same = len(a.prob) == len(b.prob) and all(map(_same, a.prob, b.prob))
        self.differ += not same or (a.index, a.error) != (b.index, b.error)
        if a.error is not None or b.error is not None:
            return self._add_failed(a, b)
        known = dict(zip(a.index, a.prob, strict=True))
        for index, prob in zip(b.index, b.prob, strict=True):
            before = known.get(index, prob)
            moved = 0.0 if _same(before, prob) else abs(prob - before)
            if moved > self.moved:
                self.moved, self.moved_at = moved, b.filename
        if a.index[:1] == b.index[:1]:
            return ""
        self.flips += 1
        return f"flip  {a.filename}: {_best(a)} -> {_best(b)}"

    def _add_failed(self, a: Prediction, b: Prediction) -> str:
        """Count a pair of which at least one failed."""
        if a.error is not None and b.error is not None:
            return "" if a.error == b.error else f"error {a.filename}: {a.error} -> {b.error}"
        self.newly_failed += a.error is None
        self.newly_fine += b.error is None
        return f"error {a.filename}: {a.error or 'fine'} -> {b.error or 'fine'}"

    def lines(self) -> Iterator[str]:
        """Give the summary."""
        for name, count in self.only_count.items():
            if count:
                more = f" and {count - SHOWN} more" if count > SHOWN else ""
                yield f"only in {name}, not compared: {', '.join(self.only[name])}{more}"
        yield (
            f"{self.images:,} images in both: {self.differ:,} differ, {self.flips:,} with another "
            f"best class; {self.newly_failed:,} fail only in B, {self.newly_fine:,} only in A"
        )
        where = f" ({self.moved_at})" if self.moved_at else ""
        yield f"largest difference of a class's probability: {self.moved:.2g}{where}"


def _same(a: float, b: float) -> bool:
    """Whether they are equal, or one is the other as CSV and JSON Lines have it."""
    return a == b or rounded(a) == b or a == rounded(b)


def _best(prediction: Prediction) -> str:
    """Print `282 tiger cat 0.412`."""
    if not prediction.index:
        return "no class"
    label = f" {prediction.label[0]}" if prediction.label[0] else ""
    return f"{prediction.index[0]}{label} {prediction.prob[0]:.3g}"
