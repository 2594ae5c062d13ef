# SPDX-License-Identifier: BSD-3-Clause
"""`resnet-fused compare`: settings before numbers, no speed-up below the noise, flips by name."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resnet_fused.cli.main import main
from resnet_fused.predict import differences
from resnet_fused.predict.writer import Prediction
from source_tree import ROOT

MACHINE = {"cpu": "Testor 9", "cpus": 2, "threads": 2, "device": "Testor 9", "torch": "2.13.0"}
VERSIONS = "resnet_fused 0.1.0, torch 2.13.0, python 3.11.7"


def row(contender: str, ms: float | None, noise: float | None = 0.02, **other: Any) -> Any:
    """A row as bench writes it; few samples, so that their spread says nothing."""
    found = {"model": "resnet50", "infer_step_time": ms, "infer_batch_size": 1}
    found |= {"infer_img_size": 224, "contender": contender, "dtype": "bf16", "device": "cpu"}
    found |= {"threads": 2, "count": 3, "p50": ms, "p90": ms, "noise": noise, "ratio": None}
    return {**found, "agrees": True, "path": "amx", "versions": VERSIONS, **other}


def write(path: Path, rows: list[Any], **machine: Any) -> str:
    path.write_text(json.dumps({"machine": {**MACHINE, **machine}, "results": rows}))
    return str(path)


def compare(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["compare", *arguments])
    found = capsys.readouterr()
    return code, found.out, found.err


def cells(out: str, contender: str) -> list[str]:
    """The table's line of a contender from its figure on."""
    line = next(line for line in out.splitlines() if line.strip().startswith(contender))
    return line.split(maxsplit=2)[2].replace("1.0 ± ", "±").split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_settings_come_before_numbers_and_name_what_differs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a version, the machine or the threads differ and the reader sees only times."""
    a = write(folder / "a.json", [row("resnet_fused", 10)])
    newer = VERSIONS.replace("torch 2.13.0", "torch 2.14.1")
    b = write(folder / "b.json", [row("resnet_fused", 5, versions=newer)], cpu="Testor 10")
    code, out, _ = compare(capsys, a, b)
    head, _, table = out.partition("every row:")
    assert code == 0 and "2.00x" in table
    assert head.index("settings that differ:") < head.index("the same in both:")
    differing = [line.split() for line in head.splitlines() if line.startswith("  ")]
    assert ["torch", "2.13.0", "2.14.1"] in differing
    assert ["cpu", "Testor", "9", "Testor", "10"] in differing
    assert "warning: a difference may come from any of these settings" in head


@pytest.mark.parametrize(
    ("ms", "noise", "said"),
    [
        (8.0, 0.02, "1.25x"),  # B takes less time: it is faster
        (12.5, 0.02, "0.80x"),
        (9.8, 0.02, "±0.04"),  # two files with 2 % each: 1.02 * 1.02 - 1
        (8.0, None, "±?"),  # no noise in the file: nothing can be said
    ],
)
def test_a_ratio_has_its_direction_and_is_refused_below_the_noise(
    ms: float, noise: float | None, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if the ratio is inverted, or noise of one file only, or of none, counts."""
    a = write(folder / "a.json", [row("resnet_fused", 10, noise)])
    b = write(folder / "b.json", [row("resnet_fused", ms, noise)])
    _, out, _ = compare(capsys, a, b)
    assert cells(out, "resnet_fused")[2] == said


@pytest.mark.parametrize(("torch", "said"), [("2.13.0", "±0.30"), ("2.14.1", "1.25x")])
def test_what_eager_moved_by_on_the_same_machine_is_noise(
    torch: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if the machine's mood passes for a speed-up, or a new torch's for the machine's."""
    a = write(folder / "a.json", [row("eager", 26), row("resnet_fused", 10)])
    newer = VERSIONS.replace("2.13.0", torch)
    rows = [row("eager", 20, versions=newer), row("resnet_fused", 8, versions=newer)]
    b = write(folder / "b.json", rows, torch=torch)
    _, out, _ = compare(capsys, a, b)
    assert cells(out, "resnet_fused")[2] == said


def test_only_rows_with_equal_settings_are_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a batch of 8 is held against one of 1, or a row vanishes without a word."""
    a = write(folder / "a.json", [row("eager", 1), row("resnet_fused", 2, infer_batch_size=8)])
    b = write(folder / "b.json", [row("eager", 1), row("resnet_fused", 3, threads=1)])
    _, out, _ = compare(capsys, a, b)
    table, _, rest = out.partition("only in A, not compared:")
    assert "resnet_fused" not in table.partition("every row:")[2]
    only_a, _, only_b = rest.partition("only in B, not compared:")
    assert "batch 8 size 224 cpu threads 2: resnet_fused" in only_a
    assert "batch 1 size 224 cpu threads 1: resnet_fused" in only_b

    c = write(folder / "c.json", [row("eager", 1, threads=4)])
    code, out, err = compare(capsys, a, c)
    assert code == 1 and "threads" in out and "no row of A has its match" in err


@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        ([row("resnet_fused", 10.9)], 2, "slower than 5.0% allows"),
        ([row("resnet_fused", 10.3)], 0, ""),  # slower, but less than allowed
        ([row("resnet_fused", 10.9, 0.2)], 0, "1 of 1 rows have more noise"),
        ([row("resnet_fused", 8.0)], 0, ""),
        ([row("resnet_fused", 10, agrees=False)], 2, "B's results are wrong"),
        ([row("resnet_fused", None, agrees=True)], 2, "did not run in B"),
        ([row("eager", 10)], 1, "no row of A"),
        ([row("resnet_fused", 10), row("eager", 10)], 0, "only in B"),
    ],
)
def test_fail_slower_judges_what_the_noise_lets_it_judge(
    rows: list[Any], code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if CI passes a slower, wrong or missing row, or fails on noise."""
    a = write(folder / "a.json", [row("resnet_fused", 10)])
    b = write(folder / "b.json", rows)
    found, out, err = compare(capsys, a, b, "--fail-slower", "5%")
    assert found == code, out + err
    assert said in out + err


def test_fail_slower_wants_one_machine_and_all_rows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if CI compares two machines, or a row that B lost counts as fine."""
    a = write(folder / "a.json", [row("resnet_fused", 10), row("eager", 20)])
    b = write(folder / "b.json", [row("resnet_fused", 9), row("eager", 20)], cpu="Testor 10")
    code, _, err = compare(capsys, a, b, "--fail-slower", "5")
    assert code == 1 and "same machine" in err
    c = write(folder / "c.json", [row("resnet_fused", 10)])
    code, out, _ = compare(capsys, a, c, "--fail-slower", "5")
    assert code == 2 and "eager: not in B" in out


RESULTS = [
    path
    for path in sorted((ROOT / "benchmarks" / "results").glob("*-infer-*"))
    if "-infer-layers-" not in path.name  # microseconds by contender, a table of its own
]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_the_committed_results_can_be_read_and_equal_themselves(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a script in benchmarks/ writes columns that compare does not know."""
    code, out, _ = compare(capsys, str(path), str(path))
    assert code == 0
    assert "settings that differ: none" in out and "only in" not in out
    table = out.partition("every row:")[2].splitlines()[2:]
    assert len(table) > 3 and all("1.0 ± " in line or " - " in line for line in table)


# --------------------------------------------------------------------------------- predictions
def image(name: str, index: list[int], prob: list[float], error: str | None = None) -> Prediction:
    return Prediction(name, index, [None for _ in index], prob, error)


def write_jsonl(path: Path, items: list[Prediction]) -> str:
    path.write_text("".join(json.dumps(vars(item)) + "\n" for item in items))
    return str(path)


def test_flips_errors_and_lost_images_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a flip hides behind equal classes, order matters, or a new failure is fine."""
    same, moved = image("same.png", [3, 1], [0.9, 0.1]), image("moved.png", [1], [0.5])
    a = [same, image("flip.png", [3, 1], [0.6, 0.4]), moved, image("gone.png", [1], [1.0])]
    b = [
        image("moved.png", [1], [0.75]),
        image("flip.png", [1, 3], [0.55, 0.45]),
        same,
        image("new.png", [2], [1.0]),
    ]
    one = write_jsonl(folder / "a.jsonl", a)
    code, out, _ = compare(capsys, one, write_jsonl(folder / "b.jsonl", b))
    assert code == 0
    assert "flip  flip.png: 3 0.6 -> 1 0.55" in out
    assert "3 images in both: 2 differ, 1 with another best class" in out
    assert "largest difference of a class's probability: 0.25 (moved.png)" in out
    assert "only in A, not compared: gone.png" in out and "only in B, not compared: new.png" in out
    # gone.png is not in B, which no number of flips allows
    assert compare(capsys, one, str(folder / "b.jsonl"), "--fail-flips", "9")[0] == 2
    whole = write_jsonl(folder / "whole.jsonl", [*b, a[-1]])
    assert compare(capsys, one, whole, "--fail-flips", "1")[0] == 0
    assert compare(capsys, one, whole, "--fail-flips", "0")[0] == 2

    broken = [same, image("moved.png", [], [], "empty file")]
    code, out, _ = compare(capsys, one, write_jsonl(folder / "c.jsonl", broken))
    assert code == 2 and "error moved.png: fine -> empty file" in out


def test_csv_and_json_lines_of_one_run_are_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if ranks of an image are taken apart, or an image twice in the sources is lost."""
    items = [image("a,b.png", [3, 1], [0.9, 0.1]), image("x", [], [], "empty file")]
    items += [image("twice", [1], [0.5]), image("twice", [2], [0.5])]
    with (folder / "a.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["filename", "index", "label", "prob", "rank", "error"])
        for item in items:
            for rank, (index, prob) in enumerate(zip(item.index, item.prob, strict=True), 1):
                out.writerow([item.filename, index, "", prob, rank, ""])
            if item.error:
                out.writerow([item.filename, "", "", "", "", item.error])
    lines = write_jsonl(folder / "b.jsonl", items)
    code, out, _ = compare(capsys, str(folder / "a.csv"), lines)
    assert code == 0 and "4 images in both: 0 differ, 0 with another" in out


def test_files_in_one_order_are_not_held_in_memory() -> None:
    """Breaks if a file is read to its end before the first pair comes out."""
    read = 0

    def endless() -> Iterator[Prediction]:
        nonlocal read
        for number in range(10**9):
            read += 1
            yield image(str(number), [1], [1.0])

    found = differences.pairs(endless(), endless())
    for _, (a, b) in zip(range(100), found, strict=False):
        assert a == b
    assert read <= 2 * 101


PREDICTED = b"filename,index,label,prob,rank,error\nx,1,,0.5,1,\n"


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"", "a.csv", "must be a result file"),
        (b"a,b\n1,2\n", "a.csv", "must be a result file"),
        (b"\x89PNG\x00\xff", "a.csv", "must be a result file"),
        (b"model,infer_step_time\n", "a.csv", "holds no rows"),
        (b"[]", "a.json", "holds no rows"),
        (b"model,infer_step_time\na,1\na,2\n", "a.csv", "has two for a cpu"),
        (b'{"results": [{"loss": 1}]}', "a.json", "must have rows with"),
        (b"{", "a.json", "must be CSV, or JSON"),
        (b'{"filename": "x"}\n', "a.jsonl", "image 1 does not"),
        (b"3\n", "a.jsonl", "image 1 does not"),
        (b"filename,index,prob\nx,1,0.5\n", "a.csv", "image 1 does not"),
        (b"filename,index,label,prob,rank,error\nx,1,,big,1,\n", "a.csv", "image 1 does not"),
        (PREDICTED + b"x,2,,0.", "a.csv", "a cut file?"),
        (PREDICTED + b"x,2,,0.1,2", "a.csv", "a cut file?"),
        (PREDICTED + b"x,2,,0.1,,\n", "a.csv", "neither rank nor error"),
        (b"model,contender,judged_by\nr,eager,\n", "a.csv", "none of the columns judged_by"),
    ],
)
def test_other_files_are_refused_with_a_reason(
    content: bytes, name: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a wrong file ends in a traceback, or in exit code 0."""
    path = folder / name
    path.write_bytes(content)
    code, _, err = compare(capsys, str(path), str(path))
    assert code == 1 and said in err and err.count("\n") == 1, err


def test_wrong_pairs_and_options_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if times are compared with predictions, or an option that does nothing is taken."""
    times = write(folder / "a.json", [row("eager", 10)])
    classes = write_jsonl(folder / "a.jsonl", [image("x", [1], [1.0])])
    assert compare(capsys, times, classes)[0] == 1
    assert compare(capsys, times, times, "--fail-flips", "1")[0] == 1
    assert compare(capsys, classes, classes, "--fail-slower", "5")[0] == 1
    assert compare(capsys, str(folder), str(folder))[0] == 1
    assert compare(capsys, str(folder / "none.json"), times)[0] == 1
    for wrong in ("-1", "x", "nan"):
        with pytest.raises(SystemExit, match="1"):
            main(["compare", times, times, "--fail-slower", wrong])


@pytest.mark.parametrize(("other", "differ"), [(0.123457, 0), (0.123456788, 1), (0.123458, 1)])
def test_six_digits_of_a_text_file_are_no_difference(
    other: float, differ: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a job and the CSV of the same results differ in every image, or bits are lost."""
    a = write_jsonl(folder / "a.jsonl", [image("x", [1], [0.123456789])])
    b = write_jsonl(folder / "b.jsonl", [image("x", [1], [other])])
    code, out, _ = compare(capsys, a, b)
    assert code == 0 and f"1 images in both: {differ} differ" in out
    assert ("probability: 0\n" in out) == (differ == 0)
