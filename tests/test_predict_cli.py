# SPDX-License-Identifier: BSD-3-Clause
"""``resnet-fused predict`` as its users run it: arguments, streams, files, exit codes."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_fused import __version__
from resnet_fused.cli.main import COMMANDS, main
from resnet_fused.models import resnet18
from resnet_fused.predict.predictor import Predictor

CLASSES = 7
COLUMNS = ["filename", "index", "label", "prob", "rank", "error"]
SMALL = ["--model", "resnet18", "--resize", "40", "--crop", "33"]

# Not the repository root, whose source tree would hide the installed package.
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images, of other sizes and kinds, and four files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    kinds = ["jpg", "png", "gif", "webp", "bmp", "jpg", "png", "jpg", "png", "tiff", "jpg"]
    for i, kind in enumerate(kinds):
        levels = rng.integers(0, 256, (4 + i, 6, 3), dtype=np.uint8)
        image = Image.fromarray(levels).resize((50 + 7 * i, 61), Image.Resampling.BICUBIC)
        image.convert("L" if i == 5 else "RGB").save(folder / f"{i:02}.{kind}")
    (folder / "03a-empty.jpg").touch()
    (folder / "05a-text.jpg").write_text("no picture")
    (folder / "90-cut.jpg").write_bytes((folder / "10.jpg").read_bytes()[:-200])
    (folder / "91-cut.png").write_bytes((folder / "08.png").read_bytes()[:900])
    return folder


def good(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.iterdir() if "-" not in p.name)


def rows(text: str) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text))
    result = list(reader)
    assert reader.fieldnames == COLUMNS
    return result


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "resnet_fused", *arguments]


def test_predict_in_a_shell(photos: Path, weights: str) -> None:
    """Breaks if anything but CSV reaches stdout, a bad file stops the others, or the exit code
    hides that some failed."""
    command = program("predict", str(photos), "--weights", weights, "--top", "2", *SMALL)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=HERE)
    assert done.returncode == 2, done.stderr
    found = rows(done.stdout)
    assert [r["filename"] for r in found if r["rank"] != "2"] == sorted(map(str, photos.iterdir()))
    failed = [Path(r["filename"]).name for r in found if r["error"]]
    assert failed == ["03a-empty.jpg", "05a-text.jpg", "90-cut.jpg", "91-cut.png"]
    for r in found:
        numbers = (r["index"], r["prob"], r["rank"])
        assert numbers == ("", "", "") if r["error"] else 0 <= int(r["index"]) < CLASSES
    assert (
        "preprocessing: resize 40 (shorter side, bilinear, antialias), centre crop 33, mean "
        in (done.stderr)
    )
    assert "except resize crop as given" in done.stderr
    shares = r"read \d+ % decode \d+ % resize \d+ % model \d+ % write \d+ %"
    closing = done.stderr.splitlines()[-1]
    assert re.fullmatch(rf"15 images, 4 failed, [\d.,]+ img/s; {shares}; limit: \w+", closing)
    assert "\r" not in done.stderr, "a progress bar where nobody watches"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_batch_size_and_threads_change_nothing(
    photos: Path, weights: str, tmp_path: Path, suffix: str
) -> None:
    """Breaks if an image's result depends on its neighbours beyond rounding, or on timing."""
    results = []
    for batch_size, threads in ((1, 1), (2, 3), (4, 2), (32, 2)):
        output = tmp_path / f"{batch_size}{suffix}"
        options = ["--batch-size", str(batch_size), "--threads", str(threads), "--quiet"]
        before = torch.get_num_threads()
        code = main(
            ["predict", *good(photos), "--weights", weights, *SMALL]
            + [*options, "--top", str(CLASSES), "--output", str(output)]
        )
        torch.set_num_threads(before)
        assert code == 0
        prob = torch.zeros(11, CLASSES, dtype=torch.float64)
        if suffix == ".csv":
            for r in rows(output.read_text()):
                prob[good(photos).index(r["filename"]), int(r["index"])] = float(r["prob"])
        else:
            for i, line in enumerate(output.read_text().splitlines()):
                prob[i, json.loads(line)["index"]] = torch.tensor(json.loads(line)["prob"]).double()
        results.append(prob)
    assert ((results[0].sum(1) - 1).abs() < 1e-5).all()  # six digits are written
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision(
    photos: Path, weights: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if --dtype reaches the model but not its input, or the other way round."""
    command = ["predict", *good(photos), "--weights", weights, *SMALL, "--top", "7", "--quiet"]
    prob = {}
    for name in ("fp32", dtype):
        assert main([*command, "--dtype", name]) == 0
        found = rows(capsys.readouterr().out)
        prob[name] = {(r["filename"], r["index"]): float(r["prob"]) for r in found}
    distance = max(abs(p - prob["fp32"][key]) for key, p in prob[dtype].items())
    assert 0 < distance < 0.05


def test_labels_and_top_and_jsonl(photos: Path, weights: str, tmp_path: Path) -> None:
    """Breaks if a name is given to another index, or --topk is no alias of --top."""
    names = [f"class {i}" for i in range(CLASSES)]
    labels = tmp_path / "names.txt"
    labels.write_text("\n".join(names))
    output = tmp_path / "preds.jsonl"
    options = ["--labels", str(labels), "--topk", "3", "--output", str(output), "--quiet"]
    assert main(["predict", str(photos), "--weights", weights, *SMALL, *options]) == 2
    for line in output.read_text().splitlines():
        item = json.loads(line)
        assert item["label"] == [names[i] for i in item["index"]]
        assert len(item["prob"]) == (0 if item["error"] else 3)


def test_wrong_number_of_labels(
    photos: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if labels of another model are accepted, or the output is begun before the check."""
    labels = tmp_path / "names.txt"
    labels.write_text("cat\ndog\n")
    output = tmp_path / "preds.csv"
    options = ["--labels", str(labels), "--output", str(output)]
    assert main(["predict", str(photos), "--weights", weights, *SMALL, *options]) == 1
    assert "must name 7 classes, one for each output of the model, got 2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [labels]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SOURCE must name at least one file"),
        (["x.jpg"], "weights must be given, because an untrained model predicts nothing"),
        (["x.jpg", "--weights", "missing.pth"], "missing.pth does not exist"),
        (["x.jpg", "--weights", "random", "--model", "resnet19"], "invalid choice: 'resnet19'"),
        (["x.jpg", "--weights", "random", "--crop", "300"], "crop must be from 1 to resize"),
        (["x.jpg", "--weights", "random", "--batch-size", "0"], "of at least 1, got '0'"),
        (["x.jpg", "--weights", "random", "--mean", "0.5"], "three numbers such as 0.5,0.5,0.5"),
        (["x.jpg", "--weights", "random", "--std", "0,1,1"], "std must be above 0"),
        (["x.jpg", "--weights", "random", "--device", "tpu"], "tpu"),
        (["x.jpg", "--weights", "random", "--device", "mps"], "must be cpu, cuda or cuda:N"),
        (["x.jpg", "--weights", "random", "--output", "preds.txt"], "must end in .csv or .jsonl"),
        (["@missing.txt", "--weights", "random"], "missing.txt"),
    ],
)
def test_wrong_use_is_told_in_one_line_with_exit_code_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a mistake gives a traceback, is found late, or has the code of failed images."""
    try:
        code = main(["predict", *arguments])
    except SystemExit as stop:  # argparse's way
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert code == 1 and out == ""
    assert message in err.splitlines()[-1]


def test_cuda_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if --device cuda quietly runs on the CPU, or fails with torch's long message."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["predict", "x.jpg", "--weights", "random", "--device", "cuda"]) == 1
    assert "needs a GPU" in capsys.readouterr().err


def test_random_weights_only_when_asked_for(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if 'random' is another model each time, or its use is not visible."""
    command = ["predict", good(photos)[0], "--weights", "random", *SMALL, "--top", "1"]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "weights random" in first.err and "labels: none known" in first.err
    assert main(command) == 0
    assert capsys.readouterr().out == first.out


def test_quiet_says_nothing_but_the_rows(
    photos: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if cron mails a line for every job that went well."""
    assert main(["predict", *good(photos), "--weights", weights, *SMALL, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_progress_bar_on_a_terminal(
    photos: Path,
    weights: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Breaks if the bar has no total, does not count failures, or is drawn on stdout."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["predict", str(photos), "--weights", weights, *SMALL]) == 2
    out, err = capsys.readouterr()
    assert "15/15" in err and "failed=4" in err
    assert len(rows(out)) == 11 * 5 + 4


def test_existing_output_is_kept_unless_told(
    photos: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a second run replaces the first one's results unasked."""
    output = tmp_path / "preds.csv"
    output.write_text("older")
    command = ["predict", good(photos)[0], "--weights", weights, *SMALL, "--output", str(output)]
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err and output.read_text() == "older"
    assert main([*command, "--overwrite"]) == 0
    assert len(rows(output.read_text())) == 5


def test_too_many_errors(
    photos: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a job that --max-errors stopped leaves an output that looks complete."""
    output = tmp_path / "preds.csv"
    options = ["--output", str(output), "--max-errors", "1", "--top", "1"]
    assert main(["predict", str(photos), "--weights", weights, *SMALL, *options]) == 1
    err = capsys.readouterr().err
    assert "stopped: more than 1 images failed" in err
    (part,) = tmp_path.iterdir()
    assert str(part) in err and not output.exists()
    assert len(rows(part.read_text())) == 8  # 00 to 05 and the two failures among them


def test_full_disk_is_told_and_leaves_no_output(
    photos: Path,
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Breaks if a write error is taken for an image's, or renames a cut file."""

    def fail(self: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("resnet_fused.predict.writer.Writer.flush", fail)
    output = tmp_path / "preds.csv"
    command = ["predict", good(photos)[0], "--weights", weights, *SMALL, "--output", str(output)]
    assert main(command) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not output.exists()


def test_an_error_in_the_model_is_not_hidden(
    photos: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a bug in a kernel becomes an image's error, or leaves a complete-looking file."""

    def fail(self: object, pixels: object) -> None:
        raise RuntimeError("kernel")

    monkeypatch.setattr(Predictor, "classify", fail)
    output = tmp_path / "preds.csv"
    with pytest.raises(RuntimeError, match="kernel"):
        main(["predict", str(photos), "--weights", weights, *SMALL, "--output", str(output)])
    assert not output.exists()


def test_ctrl_c(weights: str, tmp_path: Path) -> None:
    """Breaks if an interrupt shows a traceback, hangs in a thread, or completes the output."""
    output = tmp_path / "preds.csv"
    process = subprocess.Popen(
        program("predict", "-", "--weights", weights, *SMALL, "--output", str(output)),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE,
        # A shell's background jobs ignore interrupts, and so would this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("labels:"):
            break
    process.send_signal(signal.SIGINT)  # while it waits for the first path
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "resnet-fused: interrupted" in err and "Traceback" not in err
    assert not output.exists()


def test_reader_of_stdout_that_goes_away(photos: Path, weights: str, tmp_path: Path) -> None:
    """Breaks if '| head' shows a traceback."""
    (tmp_path / "list.txt").write_text(f"{good(photos)[0]}\n" * 300)
    source = f"@{tmp_path / 'list.txt'}"
    process = subprocess.Popen(
        program("predict", source, "--weights", weights, *SMALL, "--batch-size", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().rstrip("\n").split(",") == COLUMNS
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert "Traceback" not in err and "BrokenPipe" not in err


def test_names_and_labels_come_from_torchvision_weights(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if --weights IMAGENET1K_V2 keeps 256/224, or the names of its classes are lost."""
    enum = pytest.importorskip("torchvision.models").ResNet50_Weights
    state = resnet18(num_classes=1000).state_dict()
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **options: state)
    monkeypatch.setattr(
        "resnet_fused.models.resnet50", lambda weights, progress: resnet18(num_classes=1000)
    )
    assert main(["predict", good(photos)[0], "--weights", "IMAGENET1K_V2"]) == 0
    out, err = capsys.readouterr()
    assert "resize 232 " in err and "from ResNet50_Weights.IMAGENET1K_V2" in err
    names = enum.IMAGENET1K_V2.meta["categories"]
    assert [r["label"] for r in rows(out)] == [names[int(r["index"])] for r in rows(out)]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if --help imports or forgets a command, or --version tells another version."""
    for arguments, words in (
        (["--version"], [f"resnet-fused {__version__}\n"]),
        (["--help"], list(COMMANDS)),
        (["predict", "--help"], ["filename,index,label,prob", "exit code", "@list.txt"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)


def test_help_loads_no_image_library() -> None:
    """Breaks if the commands' modules are imported before one is chosen."""
    code = (
        "import sys; from resnet_fused.cli import main\n"
        "try: main.main(['--help'])\n"
        "except SystemExit: pass\n"
        "loaded = {'PIL.Image', 'resnet_fused.cli.predict'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=HERE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [[], ["predikt"], ["--nothing"]])
def test_unknown_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if a mistyped command does nothing, or has the code of failed images."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    assert "resnet-fused: error:" in capsys.readouterr().err
