# SPDX-License-Identifier: BSD-3-Clause
"""`resnet-fused profile`: its arguments and files, and the ranges of its traces."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import resnet_fused
from profiles import PEAKS, Net
from resnet_fused.cli import profile as cli
from resnet_fused.cli.main import main
from resnet_fused.profile import peaks, trace


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and no large matrix product: small calls of several threads are slow on a busy
    machine.
    """
    monkeypatch.setattr(peaks, "ceilings", lambda device, dtype: PEAKS)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL = ["profile", "--model", "resnet18", "--size", "32", "--budget-s", "1", "--threads", "1"]


def test_a_file_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a full disk hides the table behind a traceback."""

    def full(place: str) -> Any:
        raise OSError(28, "No space left on device", place)

    monkeypatch.setattr(cli, "open_output", full)
    assert main([*SMALL, "--json", str(tmp_path / "p.json")]) == 1
    out, err = capsys.readouterr()
    assert "layer4.1" in out and "error: [Errno 28] No space left on device: " in err


def test_one_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if a file is not written, not readable, or stdout is not the CSV alone."""
    names = {kind: tmp_path / f"p.{kind}" for kind in ("json", "svg", "json.gz")}
    files = ["--json", str(names["json"]), "--svg", str(names["svg"])]
    files += ["--trace", str(names["json.gz"]), "--csv", "-"]
    assert main([*SMALL, "--dtype", "bf16", "--batch", "2", *files]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(out.splitlines()))
    assert {row["dtype"] for row in rows} == {"bf16"} and {row["batch"] for row in rows} == {"2"}
    assert [r["layer"] for r in rows if r["side"] == "fused"][:2] == ["stem", "layer1.0"]
    assert "layer1.0" in err and "untouched" in err and f"wrote {names['svg']}" in err
    whole = json.loads(names["json"].read_text())
    assert whole["setting"]["model"] == "resnet18" and whole["setting"]["weights"] == "random"
    assert len(whole["layers"]) == len(rows)
    root = ElementTree.fromstring(names["svg"].read_text())
    assert any("resnet18, bf16, batch 2" in (t.text or "") for t in root.iter())
    events = json.loads(gzip.decompress(names["json.gz"].read_bytes()))["traceEvents"]
    ranges = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert {"eager", "fused", "stem", "head", "layer4.1", "layer2.0.downsample.1"} <= set(ranges)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet19"], "argument --model: invalid choice: 'resnet19'"),
        (["--batch", "0"], "argument --batch: must be an integer of at least 1, got '0'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
        (["--csv", "-", "--json", "-"], "--json - and --csv - cannot share stdout"),
        (["--svg", "no/such/p.svg"], "--svg no/such/p.svg: the folder does not exist"),
        (["--svg", "."], "--svg .: is a folder, not a file"),
        (["--svg", "-"], "--svg -: cannot be stdout"),
        (["--json", "a.txt", "--csv", "./a.txt"], "is the file of --json, too"),
        (["--trace", "trace.txt"], "--trace must end in .json or .json.gz, got trace.txt"),
        (["--weights", "none.pth"], "none.pth"),
    ],
)
def test_wrong_arguments_give_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a wrong argument is found out late, or by a traceback."""
    try:
        code = main([*SMALL, *arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "error" in line]
    assert code == 1 and len(lines) == 1 and message in lines[0] and "Traceback" not in err


def test_weights_are_read_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if --weights is not heeded."""
    place = tmp_path / "w.pth"
    torch.save(resnet_fused.resnet18().state_dict(), place)
    assert main([*SMALL, "--weights", str(place), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["setting"]["weights"] == str(place)


def test_nvtx_ranges_are_named_like_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if ranges on a GPU are missing, left open, or named otherwise than in the trace."""
    seen: list[str] = []
    open_now: list[str] = []

    class Nvtx:
        @staticmethod
        def range_push(name: str) -> None:
            open_now.append(name)
            seen.append("/".join(open_now))

        @staticmethod
        def range_pop() -> None:
            open_now.pop()

    monkeypatch.setattr(trace, "nvtx", Nvtx)
    model = resnet_fused.fuse(Net().eval())
    twin = trace.sharing(model)
    trace.Spans(twin, trace.Ranges("fused", to_nvtx=True))
    with torch.inference_mode():
        twin(torch.ones(1, 3, 16, 16))
    assert open_now == []
    assert seen[:2] == ["fused", "fused/stem"] and "fused/head" in seen
    assert "fused/blocks/blocks.1/blocks.1.conv2" in seen
    assert "fused/blocks/blocks.0/blocks.0.gate" in seen


def test_a_block_is_not_named_twice() -> None:
    """Breaks if a block's range holds one of the same name, which hides what is inside."""
    seen = []

    class Listener(trace.Ranges):
        def enter(self, name: str, leaf: bool) -> None:
            super().enter(name, leaf)
            seen.append(name)

    twin = trace.sharing(resnet_fused.resnet18(num_classes=10).eval())
    trace.Spans(twin, Listener("fused", to_nvtx=False))
    with torch.inference_mode():
        for _ in range(2):
            seen.clear()
            twin(torch.ones(1, 3, 32, 32))
    assert seen[2:6] == ["layer1", "layer1.0", "basic_block", "layer1.1"]


def test_a_trace_has_another_name(tmp_path: Path) -> None:
    """Breaks if a trace is written where no viewer opens it."""
    with pytest.raises(ValueError, match="place must end in .json or .json.gz, got .*trace.txt"):
        trace.trace(Net().eval(), torch.ones(1, 3, 8, 8), tmp_path / "trace.txt")
