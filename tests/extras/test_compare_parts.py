# SPDX-License-Identifier: BSD-3-Clause
"""`resnet-fused compare` on the folders that jobs write: first their metadata, then rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resnet_fused.cli.main import main

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(folder: Path, best: list[int], **fingerprint: str) -> str:
    """A job of two parts, the second image failed."""
    folder.mkdir()
    images = [(f"{i}.png", [k, 9], [0.75, 0.25], None) for i, k in enumerate(best)]
    images[1] = ("1.png", [], [], "empty file")
    for unit in range(2):
        rows = images[unit::2]
        columns = dict(
            zip(("filename", "index", "prob", "error"), zip(*rows, strict=True), strict=True)
        )
        about = json.dumps({"fingerprint": {"model": "resnet18", **fingerprint}})
        table = pa.table({name: list(values) for name, values in columns.items()})
        table = table.replace_schema_metadata({"resnet_fused": about})
        pq.write_table(table, folder / f"part-{unit:05}.parquet")
    return str(folder)


def test_settings_come_first_and_then_flips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if the fingerprint is not read, a part is left out, or a list column is misread."""
    a = write(tmp_path / "a", [1, 2, 3, 4], dtype="float32")
    b = write(tmp_path / "b", [1, 2, 3, 5], dtype="bfloat16")
    assert main(["compare", a, b]) == 0
    out = capsys.readouterr().out
    settings, _, rows = out.partition("flip ")
    assert ["dtype", "float32", "bfloat16"] in [line.split() for line in settings.splitlines()]
    assert "the same in both: model" in settings
    assert "3.png: 4 0.75 -> 5 0.75" in rows
    assert "4 images in both: 1 differ, 1 with another" in rows


def test_damaged_parts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if a cut part ends in a traceback, or is left out in silence."""
    a = write(tmp_path / "a", [1, 2, 3, 4])
    for part in sorted((tmp_path / "a").iterdir()):
        content = part.read_bytes()
        part.write_bytes(content[: len(content) // 2])
        assert main(["compare", a, a]) == 1
        err = capsys.readouterr().err
        assert "is damaged or no Parquet file" in err and err.count("\n") == 1
        part.write_bytes(content)
