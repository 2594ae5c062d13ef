# SPDX-License-Identifier: BSD-3-Clause
"""Rows, their files, and class names."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from resnet_fused.predict.labels import read_labels
from resnet_fused.predict.writer import Prediction, Writer, check

GOOD = Prediction('a, "b"\n.jpg', [3, 0], ["tench, fish", "cat"], [0.75, 1e-9])
BAD = Prediction("c.jpg", [], [], [], "truncated, it seems")
NAMELESS = Prediction("\udcff.jpg", [1], [None], [1.0])


def write(output: Path, *predictions: Prediction) -> None:
    writer = Writer(str(output))
    for prediction in predictions:
        writer.write(prediction)
    writer.finish()


def test_csv_has_a_row_per_rank_and_one_per_failure(tmp_path: Path) -> None:
    """Breaks if a comma, quote or line end in a name splits a row, or a column moves."""
    output = tmp_path / "preds.csv"
    write(output, GOOD, BAD)
    with output.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    assert rows == [
        ["filename", "index", "label", "prob", "rank", "error"],
        [GOOD.filename, "3", "tench, fish", "0.75", "1", ""],
        [GOOD.filename, "0", "cat", "1e-09", "2", ""],
        ["c.jpg", "", "", "", "", "truncated, it seems"],
    ]


def test_json_lines_has_an_object_per_image(tmp_path: Path) -> None:
    """Breaks if a line is no JSON, or failures lack the keys of the others."""
    output = tmp_path / "preds.jsonl"
    write(output, GOOD, BAD, NAMELESS)
    first, second, third = (json.loads(line) for line in output.read_text().splitlines())
    assert first == {
        "filename": GOOD.filename,
        "index": [3, 0],
        "label": ["tench, fish", "cat"],
        "prob": [0.75, 1e-9],
        "error": None,
    }
    assert second == {
        "filename": "c.jpg",
        "index": [],
        "label": [],
        "prob": [],
        "error": "truncated, it seems",
    }
    assert (third["filename"], third["label"]) == ("\udcff.jpg", [None])


def test_name_that_is_not_utf8_keeps_its_bytes(tmp_path: Path) -> None:
    """Breaks if one foreign file name stops the job, or names another file afterwards."""
    output = tmp_path / "preds.csv"
    write(output, NAMELESS)
    assert output.read_bytes().splitlines()[1] == b"\xff.jpg,1,,1,1,"


@pytest.mark.parametrize("name", ["preds.csv", "preds.jsonl"])
def test_output_appears_only_when_complete(tmp_path: Path, name: str) -> None:
    """Breaks if a crash can leave a half file under the final name, or harm an older one."""
    output = tmp_path / name
    output.write_text("older")
    writer = Writer(str(output))
    writer.write(GOOD)
    writer.flush()
    assert output.read_text() == "older"
    writer.finish()
    assert "tench" in output.read_text()
    assert os.listdir(tmp_path) == [name]


def test_abandoned_output_keeps_the_rows_under_another_name(tmp_path: Path) -> None:
    """Breaks if an interrupted job throws its rows away, or makes them look complete."""
    output = tmp_path / "preds.csv"
    writer = Writer(str(output))
    writer.write(GOOD)
    part = writer.abandon()
    assert part is not None and part.endswith(".part")
    assert "tench" in Path(part).read_text()
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "overwrite", "message"),
    [
        ("preds.txt", False, "must end in .csv or .jsonl, got"),
        ("missing/preds.csv", False, "no .*missing"),
        ("older.csv", False, "exists; give another name, or --overwrite"),
        ("folder.csv", True, "exists"),
    ],
)
def test_bad_outputs_are_refused(tmp_path: Path, name: str, overwrite: bool, message: str) -> None:
    """Breaks if hours of work end at an output that cannot be written, or replace one unasked."""
    (tmp_path / "older.csv").touch()
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match=message):
        check(str(tmp_path / name), overwrite)
    check(str(tmp_path / "older.csv"), True)
    check(None, False)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.json", '["cat", "dog", "tench, fish"]'),
        ("names.JSON", '{"2": "tench, fish", "0": "cat", "1": "dog"}'),
        ("imagenet.json", '{"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "tench, fish"]}'),
        ("names.txt", "cat\ndog\ntench, fish\n"),
        ("windows.txt", "\ufeffcat\r\ndog\r\ntench, fish\r\n\r\n"),
        ("noending", "cat\ndog\ntench, fish"),
    ],
)
def test_labels(tmp_path: Path, name: str, text: str) -> None:
    """Breaks if an object's keys are taken in file order, or line ends stay on names."""
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert read_labels(str(path), 3) == ["cat", "dog", "tench, fish"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("few.txt", b"cat\ndog", "must name 3 classes.* got 2"),
        ("many.json", b'["a", "b", "c", "d"]', "must name 3 classes.* got 4"),
        ("gap.json", b'{"0": "a", "1": "b", "3": "c"}', 'keys "0" to "2", got \'3\''),
        ("turned.json", b'{"cat": 0, "dog": 1, "fish": 2}', 'keys "0" to "2", got \'cat\''),
        ("numbers.json", b"[1, 2, 3]", "list of names or an object"),
        ("nested.json", b'{"0": [], "1": [], "2": []}', "list of names or an object"),
        ("scalar.json", b'"cat"', "list of names or an object"),
        ("broken.json", b'["cat", ', "must be UTF-8 text, JSON"),
        ("latin.txt", b"caf\xe9\nb\nc", "must be UTF-8 text"),
    ],
)
def test_wrong_labels_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Breaks if names could be given to the wrong classes."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_labels(str(path), 3)
    assert str(path) in str(caught.value)
