# SPDX-License-Identifier: BSD-3-Clause
"""The notebook in docs/ runs, and is committed without what it printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "resnet_fused.ipynb"


def printed(cell: Any) -> str:
    """Everything a cell wrote or returned."""
    texts = [out.get("text", out.get("data", {}).get("text/plain", "")) for out in cell.outputs]
    return "".join(texts)


def test_it_is_committed_without_outputs() -> None:
    """Figures of somebody's machine, and diffs full of them."""
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_it_runs(tmp_path: Path) -> None:
    """A name in it that has changed since, or a step that no longer shows what the text says."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, timeout=100, resources=folder)
    client.execute()
    fuse, report, verify, predict, bench, _ = (
        printed(cell) for cell in notebook.cells if cell.cell_type == "code"
    )
    assert "SmallNet" in fuse and "True" in fuse
    assert "blocks.2.conv2" in report and "basic_block" in report
    assert "largest difference to the model as it was: " in verify
    rows = dict(line.split(maxsplit=1) for line in predict.splitlines())
    assert rows.pop("broken.jpg") == "no image in a format that Pillow can read"
    assert sorted(rows) == ["blue.jpg", "green.jpg", "red.jpg"]
    assert all(row.count("%") == 2 for row in rows.values())
    assert "resnet18" in bench and "channels_last" in bench
