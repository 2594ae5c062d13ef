# SPDX-License-Identifier: BSD-3-Clause
"""``resnet-fused predict`` with a folder as output."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pq = pytest.importorskip("pyarrow.parquet")

from job_cases import contents, photos  # noqa: E402

from resnet_fused.cli.main import main  # noqa: E402

HERE = Path(__file__).parent
SMALL = ["--model", "resnet18", "--resize", "8", "--crop", "8", "--unit", "3"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("cli") / "photos", 8, broken=(1, 4))


def predict(*arguments: object) -> int:
    return main(["predict", *map(str, arguments)])


def test_a_job_from_beginning_to_end(
    source: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a folder is not taken for a job, the counts or the exit code are wrong, or anything
    reaches stdout."""
    command = [source, "--weights", weights, *SMALL, "--output", f"{tmp_path}/out/"]
    assert predict(*command) == 2
    out, err = capsys.readouterr()
    *_, tally, made, whole = err.splitlines()
    assert out == "" and re.search(r"^8 images, 2 failed, .* img/s; .*; limit: \w+$", tally)
    assert made == "3 parts made, 0 kept"
    assert whole == f"{tmp_path}/out/: 8 images, 2 failed, 3 parts"
    before = contents(tmp_path / "out")
    assert predict(*command) == 1
    assert "--resume" in capsys.readouterr().err
    (tmp_path / "out" / "part-00001.parquet").unlink()
    assert predict("--resume", "--weights", weights, *SMALL, "--output", tmp_path / "out") == 2
    assert "1 parts made, 2 kept" in capsys.readouterr().err
    assert predict(*command, "--resume", "--quiet") == 2
    assert capsys.readouterr().err == ""
    assert predict(*command, "--resume", "--topk", "2") == 1
    assert "top: 5 there, 2 here" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.png", "--resume"], "--resume needs --output FOLDER"),
        (
            ["x.png", "--resume", "--output", "file.csv"],
            "--output to be a folder, but file.csv is a file",
        ),
        (["x.png", "--output", "new/", "--overwrite"], "--overwrite is for a file"),
        (["x.png", "--output", "new.csv", "--unit", "5"], "--unit is for a folder"),
        (["x.png", "--output", "file.csv/sub/"], "Not a directory"),
        (["@missing.txt", "--output", "new/"], "missing.txt"),
    ],
)
def test_wrong_use(
    arguments: list[str],
    message: str,
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Breaks if a mistake gives a traceback, or leaves a folder behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.csv").touch()
    code = predict(*arguments, "--weights", weights, "--model", "resnet18")
    assert code == 1 and message in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir(tmp_path) == ["file.csv"]


def test_without_pyarrow(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Breaks if a missing extra is found only after the model was loaded, or names no remedy."""
    for name in [name for name in sys.modules if name.startswith("resnet_fused.jobs")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("resnet_fused.cli.predict.Predictor", None)
    assert predict("x.png", "--weights", weights, "--output", f"{tmp_path}/out/") == 1
    assert "pip install 'resnet_fused[parquet]'" in capsys.readouterr().err


def test_errors_stop_the_job_where_it_is(
    source: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if what was done before --max-errors is lost, or the way on is not told."""
    out = tmp_path / "out"
    command = [source, "--weights", weights, *SMALL, "--output", out, "--resume"]
    assert predict(*command, "--max-errors", "1") == 1
    assert "stopped after 1 new parts" in (err := capsys.readouterr().err) and "--resume" in err
    assert "more than 1 images failed" in err.splitlines()[-1]
    assert sorted(os.listdir(out)) == ["_manifest.parquet", "part-00000.parquet"]
    assert predict(*command) == 2


def test_interrupted_from_stdin(weights: str, source: Path, tmp_path: Path) -> None:
    """Breaks if Ctrl-C shows a traceback, leaves a temporary file, or cannot be gone on from
    although what stdin said is gone."""
    fifo = tmp_path / "slow.png"
    os.mkfifo(fifo)
    out = tmp_path / "out"
    options = ["--weights", weights, *SMALL, "--output", str(out), "--resume"]
    process = subprocess.Popen(
        [sys.executable, "-m", "resnet_fused", "predict", "-", *options],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write("".join(f"{source}/00{i}.png\n" for i in range(4)) + f"{fifo}\n")
    process.stdin.close()
    hold = os.open(fifo, os.O_RDWR)  # who reads it waits
    deadline = time.monotonic() + 300
    while not (out / "part-00000.parquet").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    os.close(hold)
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=300) == 130, err
    assert "interrupted" in err and "stopped after 1 new parts" in err and "Traceback" not in err
    assert sorted(os.listdir(out)) == ["_manifest.parquet", "part-00000.parquet"]
    fifo.unlink()
    fifo.write_bytes((source / "000.png").read_bytes())
    assert predict(*options, "--quiet") == 2
    table = pq.read_table(out / "part-00001.parquet")
    assert table["filename"].to_pylist() == [f"{source}/003.png", str(fifo)]
    assert table["error"].to_pylist() == [None, None]


def test_a_read_only_folder(
    source: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Breaks if a folder that cannot be written gives a traceback (as root, chmod stops nobody)."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("resnet_fused.jobs.files.appearing", refuse)
    assert predict(source, "--weights", weights, *SMALL, "--output", f"{tmp_path}/") == 1
    assert "Permission denied" in capsys.readouterr().err.splitlines()[-1]
