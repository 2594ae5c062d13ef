# SPDX-License-Identifier: BSD-3-Clause
"""The scripts in benchmarks/: what they cover, and that they run."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from resnet_fused.bench.results import Row, Setting
from resnet_fused.timing import Ratio, Summary

FOLDER = Path(__file__).parent.parent / "benchmarks"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes() -> ModuleType:
    """benchmarks/shapes.py."""
    return _load("shapes")


@pytest.fixture(scope="module")
def collect() -> ModuleType:
    """benchmarks/collect.py."""
    return _load("collect")


def test_shapes_are_those_of_the_networks(shapes: ModuleType) -> None:
    """Breaks if a stage is missed; the examples are the first and last layers of two depths."""
    convs, blocks = shapes.convs(), shapes.blocks()
    assert len(convs) == len(set(convs)) == 28
    assert shapes.Conv(56, 64, 64, 3, 1) in convs
    assert shapes.Conv(14, 1024, 2048, 1, 2) in convs
    assert len(blocks) == len(set(blocks)) == 15
    assert shapes.Block("basic_block", 56, 64, 64, 1, False) in blocks
    assert shapes.Block("bottleneck", 7, 2048, 512, 1, False) in blocks
    assert shapes.Block("bottleneck", 56, 64, 64, 1, True) in blocks
    assert (2048, 7) in shapes.features() and (64, 56) in shapes.features()


def test_every_block_is_made_of_the_listed_convolutions(shapes: ModuleType) -> None:
    """Breaks if a block is rebuilt with other geometry than the network's."""
    import torch

    convs = set(shapes.convs())
    for block in shapes.blocks():
        with torch.device("meta"):
            module = block.module()
        size = block.size
        for name in ("conv1", "conv2", "conv3"):
            conv = getattr(module, name, None)
            if conv is not None:
                k, r, stride = conv.out_channels, conv.kernel_size[0], conv.stride[0]
                assert shapes.Conv(size, conv.in_channels, k, r, stride) in convs, block
                size = -(-size // stride)


def test_the_collected_settings_are_the_promised_grid(collect: ModuleType) -> None:
    """Breaks if a depth, batch or dtype is left out or measured twice."""
    args = collect.argparse.Namespace(dtype="fp32,bf16", size=224, device="cpu")
    found = [(s.model, s.batch, s.dtype) for s, _ in collect.settings(args)]
    assert len(found) == len(set(found)) == 5 * 3 * 2 + 2
    for depth in (18, 34, 50, 101, 152):
        for batch in (1, 8, 32):
            for dtype in ("fp32", "bf16"):
                assert (f"resnet{depth}", batch, dtype) in found
    headline = [(s.model, s.batch) for s, first in collect.settings(args) if first]
    assert headline == [("resnet50", 1), ("resnet50", 16)] * 2


@pytest.fixture
def rows(
    collect: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Setting, float | None]]:
    """Replace measuring by made-up rows; gives what was asked for."""
    asked: list[tuple[Setting, float | None]] = []

    def compare(setting: Setting, model: Any, *, compile_s: float | None, **_: Any) -> list[Row]:
        asked.append((setting, compile_s))
        times, ratio = Summary(9, 2.0, 3.0, 4.0, None), Ratio(1.5, 1.4, 1.6, 0.02, 9)
        common: dict[str, Any] = {"layout": "nhwc", "path": "x", "param_count": 1, "gmacs": 1.0}
        names = ("eager", "channels_last", *(["compile"] if compile_s else []), "resnet_fused")
        fused = {"versus_best": ratio, "bound": 0.1, "max_err": 0.01}
        return [
            Row(setting, name, summary=times, **common, **(fused if name == names[-1] else {}))
            for name in names
        ]

    monkeypatch.setattr(collect, "compare", compare)
    monkeypatch.setattr(collect.subjects, "make_model", lambda name: name)
    return asked


def test_collect_writes_every_file_and_the_table(
    collect: ModuleType,
    rows: list[tuple[Setting, float | None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Breaks if a file or a line of the table is missing, or compile is asked of the whole grid."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["collect.py", "--results", str(tmp_path)])
    assert collect.main() == 0
    assert {setting.model for setting, compile_s in rows if compile_s} == {"resnet50"}
    assert len([1 for _, compile_s in rows if compile_s]) == 4

    names = sorted(path.name for path in tmp_path.iterdir())
    assert [n.split("-nhwc-")[0] for n in names] == [
        "benchmark-infer-all",
        "benchmark-infer-bf16",
        "benchmark-infer-fp32",
        "resnet50.png",
        "table.md",
    ]
    table = (tmp_path / "table.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("| resnet")]
    assert len(lines) == 32 and all(line.endswith("| 1.50x |") for line in lines)
    assert lines[0].startswith("| resnet18 | fp32 | 1 |")
    assert lines[-1].startswith("| resnet152 | bf16 | 32 |")
    everything = json.loads(next(tmp_path.glob("*all*.json")).read_text())["results"]
    by_dtype = [r for path in tmp_path.glob("*.csv") for r in csv.DictReader(path.open())]
    assert len(everything) == len(by_dtype) == 32 * 3 + 4


def test_collect_fails_on_a_wrong_result(
    collect: ModuleType,
    rows: list[tuple[Setting, float | None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Breaks if figures of a wrong kernel can be committed unnoticed."""
    pytest.importorskip("matplotlib")
    right = collect.compare

    def wrong(*args: Any, **kwargs: Any) -> list[Row]:
        *others, fused = right(*args, **kwargs)
        return [*others, Row(**{**fused.__dict__, "max_err": 0.2})]

    monkeypatch.setattr(collect, "compare", wrong)
    monkeypatch.setattr(sys, "argv", ["collect.py", "--results", str(tmp_path), "--dtype", "bf16"])
    assert collect.main() == 1


def _suite(file: str, *arguments: str) -> Iterator[str]:
    command = [sys.executable, "-m", "pytest", str(FOLDER / file), "-q", "-p", "no:cacheprovider"]
    options = ["--benchmark-disable", "--batches", "1", "--dtypes", "bf16", *arguments]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    yield from done.stdout.splitlines()


def test_the_op_suite_runs_all_but_compile() -> None:
    """Breaks if a shape cannot be built or a contender cannot take it; one shape of each op."""
    pytest.importorskip("pytest_benchmark")
    pieces = (
        "1x1s2-256-512-at56",
        "2048-512s1",
        "512-512s1",
        "add_relu-512-at7",
        "stem",
        "linear-512",
    )
    chosen = f"({' or '.join(pieces)}) and not compile"
    assert any("18 passed" in line for line in _suite("bench_ops.py", "-k", chosen))


def test_the_model_suite_runs_all_but_compile() -> None:
    """Breaks if a contender of the models' suite cannot run."""
    pytest.importorskip("pytest_benchmark")
    arguments = ("-k", "not compile", "--models", "resnet18", "--size", "64")
    assert any("3 passed" in line for line in _suite("bench_models.py", *arguments))
