# SPDX-License-Identifier: BSD-3-Clause
"""``resnet-fused predict`` where files, their names or the process's streams are not as usual."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_fused.cli.main import main
from resnet_fused.predict import pipeline, sources
from resnet_fused.predict.differences import read
from resnet_fused.predict.sources import Found, expand
from resnet_fused.predict.writer import Prediction, Writer, spelled

HERE = Path(__file__).parent  # not the root, whose source tree would hide the installed package
SMALL = ["--model", "resnet18", "--resize", "40", "--crop", "33", "--threads", "1"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images, one of them in a folder; the working folder is above them."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos/sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        levels = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(levels).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def run(*arguments: str, shell: str = "", **options: Any) -> subprocess.CompletedProcess[bytes]:
    """A process of its own; ``shell`` redirects its streams."""
    command = [sys.executable, "-m", "resnet_fused.cli.main", *arguments]
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "utf-8",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    return subprocess.run(command, capture_output=True, env=environment, timeout=120, **options)


@pytest.mark.parametrize(
    "pattern", ["photos/**", "./**", "photos/*", "**/photos", "photos/**/*.png"]
)
def test_a_pattern_that_matches_folders_and_their_files(photos: Path, pattern: str) -> None:
    """Breaks if an image is classified once for itself and once for each folder that holds it."""
    found = [os.path.normpath(item.path) for item in expand([pattern])]
    assert sorted(found) == ["photos/a.png", "photos/sub/b.png"]


def test_what_lies_in_a_folder_and_is_no_file(photos: Path) -> None:
    """Breaks if a link to itself ends the run, or a pipe without a writer holds it."""
    os.symlink("loop.png", photos / "loop.png")
    os.mkfifo(photos / "pipe.png")
    found = {os.path.basename(path): error or "" for path, error in expand(["photos"])}
    assert list(found) == ["a.png", "loop.png", "pipe.png", "b.png"]
    assert found["a.png"] == found["b.png"] == ""
    assert "symbolic links" in found["loop.png"] and found["pipe.png"] == "is no regular file"


def test_lists_that_are_read_once(photos: Path) -> None:
    """Breaks if a pipe is no list, or is emptied by counting its lines."""
    reader, writer = os.pipe()
    source = f"@/dev/fd/{reader}"
    sources.check([source])
    assert sources.count([source]) is None and sources.count(["photos"]) == 2
    os.write(writer, b"photos/a.png\r\nphotos/sub\n")
    os.close(writer)
    assert list(expand([source])) == [Found("photos/a.png"), Found("photos/sub/b.png")]
    os.close(reader)
    with pytest.raises(ValueError, match="@ and a text file"):
        sources.check(["@photos"])


def test_a_carriage_return_in_a_name(
    photos: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a list is cut inside of a name, or a row of CSV is."""
    (photos / "a.png").rename(photos / "c\rr.png")
    Path("list.txt").write_bytes(b"photos/c\rr.png\nphotos/sub/b.png\r\n")
    assert main(["predict", "@list.txt", "--weights", weights, *SMALL, "--output", "p.csv"]) == 0
    assert [p.filename for p in read(Path("p.csv"))] == ["photos/c\rr.png", "photos/sub/b.png"]
    capsys.readouterr()
    assert main(["compare", "p.csv", "p.csv"]) == 0
    assert "2 images in both" in capsys.readouterr().out


def test_names_that_are_not_utf8(photos: Path, weights: str) -> None:
    """Breaks if stdin, stdout or a comparison stops at a byte that predict has classified."""
    name = b"photos/a\xff.png"
    os.rename(b"photos/a.png", name)
    arguments = ["predict", "-", "--weights", weights, *SMALL, "--quiet", "--output"]
    for output in ("p.csv", "p.jsonl"):
        assert run(*arguments, output, input=name + b"\n").returncode == 0
    assert name in Path("p.csv").read_bytes()
    for path in ("p.csv", "p.jsonl"):
        assert [p.filename for p in read(Path(path))] == [r"photos/a\xff.png"]
    text = Path("p.csv").read_bytes()
    best = re.search(rb"png,(\d)", text)
    assert best is not None
    Path("q.csv").write_bytes(
        text.replace(b"png," + best[1], b"png,%d" % ((int(best[1]) + 1) % 7), 1)
    )
    compared = run("compare", "p.csv", "q.csv")
    assert compared.returncode == 0, compared.stderr
    assert rb"photos/a\xff.png" in compared.stdout
    checked = run("check", "--images", "photos", "--weights", weights, *SMALL[:6])
    assert checked.returncode == 0, checked.stderr


def test_every_special_name_comes_back_from_csv(tmp_path: Path) -> None:
    """Breaks if a row cannot be read again."""
    names = ["a,b", 'a"b', "a\nb", "a\rb", "a\r\nb", "\r", "é", " a "]
    out = Writer(str(tmp_path / "p.csv"))
    for name in names:
        out.write(Prediction(name, [1, 0], [name, None], [0.75, 0.25]))
        out.write(Prediction(name, [], [], [], f"broken {name}"))
    out.finish()
    found = list(read(tmp_path / "p.csv"))
    assert [p.filename for p in found] == [name for name in names for _ in range(2)]
    assert [p.label[0] for p in found[::2]] == names
    assert [p.error for p in found[1::2]] == [f"broken {name}" for name in names]
    assert spelled("a\udcff") == "a\\xff" and spelled("é") == "é"


def test_closed_streams(photos: Path, weights: str) -> None:
    """Breaks if what belongs to stderr gets into the CSV, or a closed stream is a traceback."""
    arguments = ["predict", "photos", "--weights", weights, *SMALL, "--top", "1"]
    silent = run(*arguments, shell="2>&-")
    assert silent.returncode == 0
    rows = list(csv.reader(silent.stdout.decode().splitlines()))
    assert [row[0] for row in rows] == ["filename", "photos/a.png", "photos/sub/b.png"]
    for shell, source, message in (
        (">&-", "photos", b"stdout is closed; give --output"),
        ("<&-", "-", b"stdin, which is closed"),
    ):
        closed = run("predict", source, *arguments[2:], shell=shell)
        assert closed.returncode == 1
        assert message in closed.stderr and b"Traceback" not in closed.stderr
    assert run(*arguments, "--output", "p.csv", shell=">&- 2>&-").returncode == 0
    assert len(list(read(Path("p.csv")))) == 2


@pytest.mark.parametrize("output", ["p.csv", "job/"])
def test_too_little_memory_is_told(
    output: str,
    photos: Path,
    weights: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Breaks if the likeliest error on a GPU is a traceback that does not say what helps."""
    if output == "job/":
        pytest.importorskip("pyarrow")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 8 GiB")

    monkeypatch.setattr(pipeline.Predictor, "classify", full)
    assert main(["predict", "photos", "--weights", weights, *SMALL, "--output", output]) == 1
    assert "tried to allocate 8 GiB; give a smaller --batch-size" in capsys.readouterr().err


def test_nothing_to_check(photos: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if a check that saw no image says that all is well."""
    Path("empty.txt").touch()
    arguments = ["check", "--images", "@empty.txt", "--weights", weights, *SMALL[:6]]
    assert main(arguments) == 1
    assert "there was no image to compare" in capsys.readouterr().err
