# SPDX-License-Identifier: BSD-3-Clause
"""`resnet-fused check` on images: accuracy, flips and errors beside eager, and broken files.

The network is a ResNet-18 whose last layer was fitted to tell squares of four colours apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from resnet_fused import ops
from resnet_fused.bench import subjects
from resnet_fused.cli.main import main
from resnet_fused.models import resnet18
from resnet_fused.predict import agreement
from resnet_fused.predict.agreement import EAGER, EXACT, FUSED, Labelled, Rivals, Tally
from resnet_fused.predict.predictor import Predictor
from resnet_fused.predict.preprocess import Preprocessing
from resnet_fused.predict.sources import Found

# At this side layer4 is two pixels wide: torch's bfloat16 is wrong on AMX CPUs where it is one.
SIDE = 64
COLOURS = {"blue": (20, 30, 200), "green": (30, 180, 40), "red": (210, 30, 20), "white": (240,) * 3}
EACH = 5
IMAGES = EACH * len(COLOURS)
SIZE = ["--model", "resnet18", "--resize", str(SIDE), "--crop", str(SIDE)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small images gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Squares(NamedTuple):
    """Where the images and the weights are."""

    folder: Path
    weights: Path


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Squares:
    """Draw noisy squares, one folder per colour, and fit the last layer to them."""
    folder = tmp_path_factory.mktemp("squares")
    draw = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(EACH):
            noise = draw.integers(-15, 16, (SIDE, SIDE, 3))
            image = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / name / f"{i}.png")
    body = subjects.make_model("resnet18")
    model = resnet18(num_classes=len(COLOURS)).eval()
    state = {k: v for k, v in body.state_dict().items() if not k.startswith("fc.")}
    model.load_state_dict(state, strict=False)
    prep = Preprocessing(resize=SIDE, crop=SIDE)
    features, targets = [], []
    with torch.inference_mode():
        for target, name in enumerate(COLOURS):
            for path in sorted((folder / name).iterdir()):
                pixels = torch.from_numpy(np.array(Image.open(path)))[None]
                x = agreement.normalise(pixels, prep, torch.float32)
                features.append(model.forward_features(x).mean((2, 3))[0])
                targets.append(target)
    x = torch.stack(features).double()
    wanted = 8.0 * torch.nn.functional.one_hot(torch.tensor(targets)).double() - 2
    gram = x @ x.T + 1e-2 * torch.eye(len(x))
    with torch.no_grad():
        model.fc.weight.copy_((x.T @ torch.linalg.solve(gram, wanted)).T)
        model.fc.bias.zero_()
    weights = tmp_path_factory.mktemp("weights") / "squares.pth"
    torch.save(model.state_dict(), weights)
    return Squares(folder, weights)


@pytest.fixture
def check(
    squares: Squares, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command; gives exit code, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["check", *map(str, arguments), "--weights", str(squares.weights), *SIZE])
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


def line(out: str, start: str) -> list[str]:
    return next(text for text in out.splitlines() if text.startswith(start)).split()


def test_labelled_images_give_accuracy_and_the_difference_to_eager(
    squares: Squares, check: Any
) -> None:
    """Breaks if classes are mixed up, eager is not counted, or agreement is a flip."""
    code, out, err = check("--data", squares.folder)
    assert code == 0, out + err
    assert "4 class folders, in the order of their names" in err
    assert f"{IMAGES} images compared, 0 failed" in out
    assert line(out, "eager float32")[2:] == ["100.00", "%", "100.00", "%"]
    assert line(out, "fused float32")[2:] == ["100.00", "%", "100.00", "%"]
    assert line(out, "fused - eager")[3:] == ["+0.00", "+0.00"]
    assert "(0 flips)" in out and "flip  " not in out


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_below_float32_there_is_a_third_column_and_a_judge(
    dtype: str, name: str, squares: Squares, check: Any
) -> None:
    """Breaks if eager bfloat16 judges itself, or the bound is tighter than rounding."""
    code, out, _ = check("--data", squares.folder, "--dtype", dtype, "--batch-size", "7")
    assert code == 0, out
    for title in (f"eager {name}", f"fused {name}", "eager float32"):
        assert line(out, title)[2] == "100.00"
    assert "against eager in float32" in out
    errors = {name: float(line(out, f"  {name}")[1].rstrip(",")) for name in ("eager", "fused")}
    assert all(0 < error < 0.2 for error in errors.values())


def test_folders_named_like_the_labels_belong_to_them(
    squares: Squares, check: Any, tmp_path: Path
) -> None:
    """Breaks if folders are counted in order although the labels name them: one is missing here."""
    for name in ("white", "green"):
        (tmp_path / "some" / name).mkdir(parents=True)
        image = squares.folder / name / "0.png"
        (tmp_path / "some" / name / "0.png").write_bytes(image.read_bytes())
    (tmp_path / "labels.txt").write_text("\n".join(COLOURS))
    code, out, err = check("--data", tmp_path / "some", "--labels", tmp_path / "labels.txt")
    assert code == 0 and "by the names of the 4 labels" in err
    assert line(out, "fused float32")[2] == "100.00" and "2 images compared" in out


def test_folders_that_fit_nothing_are_refused(check: Any, tmp_path: Path) -> None:
    """Breaks if an accuracy is computed against classes that were guessed."""

    def refused(labels: list[str] | None = None, root: Path = tmp_path) -> str:
        with pytest.raises(ValueError) as problem:
            agreement.class_folders(str(root), 4, labels)
        return str(problem.value)

    assert "holds no folder" in refused()
    (tmp_path / "n01440764").mkdir()
    said = refused()
    assert "for each of the model's 4 classes" in said and "n01440764" in said
    (tmp_path / "red").mkdir()
    assert "1 of 2 are no label" in refused(list(COLOURS))
    assert "must be a folder" in refused(root=tmp_path / "none")
    # A name that two classes have decides nothing.
    (tmp_path / "n01440764").rmdir()
    assert "for each of the model's 4 classes" in refused(["red", "red", "blue", "green"])
    code, _, err = check("--data", tmp_path)
    assert code == 1 and "for each of the model's 4 classes" in err


def raised(factor: float, column: int = 2) -> Callable[..., Tensor]:
    """The last op with one class's logit raised by a share of the largest."""
    right = ops.pool_linear

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        y = right(*args, **kwargs).clone()
        y[:, column] += factor * y.abs().max()
        return y

    return wrong


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_class_is_seen_as_flips(
    dtype: str, squares: Squares, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if eager runs through the op it judges, a flip is not listed, or the code is 0."""
    monkeypatch.setattr(ops, "pool_linear", raised(2.0))
    code, out, _ = check("--images", squares.folder, "--dtype", dtype)
    assert code == 1 and "FAIL" in out
    flips = [text for text in out.splitlines() if text.startswith("flip ")]
    others = [name for name in COLOURS if name != "red"]
    assert len(flips) == EACH * 3 and all(any(name in text for name in others) for text in flips)
    assert all("-> 2; eager has the first ahead by" in text for text in flips)
    assert f"({EACH * 3} flips)" in out
    if dtype == "bf16":
        assert all("float32 has the first ahead by" in text for text in flips)
    assert "top-1" not in out

    code, out, _ = check("--data", squares.folder, "--dtype", dtype)
    assert code == 1 and line(out, "fused - eager")[3] == "-75.00"


def test_an_error_too_small_to_flip_anything_still_fails(
    squares: Squares, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if only flips count: this one moves a logit by a thousandth."""
    monkeypatch.setattr(ops, "pool_linear", raised(1e-3))
    code, out, _ = check("--images", squares.folder)
    assert code == 1 and "(0 flips)" in out and "FAIL" in out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_path_of_bytes_is_seen(
    dtype: str, squares: Squares, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if the fused model is given floats here, where predict gives it bytes."""
    right = ops.stem

    def wrong(x: Tensor, *args: Any) -> Tensor:
        return right(255 - x if x.dtype is torch.uint8 else x, *args)

    monkeypatch.setattr(ops, "stem", wrong)
    code, out, _ = check("--images", squares.folder, "--dtype", dtype)
    assert code == 1 and "FAIL" in out


def test_broken_images_are_listed_and_counted(squares: Squares, check: Any, tmp_path: Path) -> None:
    """Breaks if a broken file ends the check, shifts its batch, or goes unsaid."""
    files = sorted(map(str, squares.folder.rglob("*.png")))
    (tmp_path / "broken.png").write_bytes(b"no image")
    listed = [files[0], str(tmp_path / "broken.png"), *files[1:], str(tmp_path / "none.png")]
    (tmp_path / "list.txt").write_text("\n".join(listed))
    code, out, _ = check("--images", f"@{tmp_path / 'list.txt'}", "--batch-size", "3")
    assert code == 2
    failed = [text for text in out.splitlines() if text.startswith("failed ")]
    assert len(failed) == 2 and "broken.png: no image in a format" in failed[0]
    assert f"{IMAGES} images compared, 2 failed" in out and "(0 flips)" in out

    code, out, _ = check("--images", tmp_path / "broken.png", tmp_path / "*.jpg")
    assert code == 2 and "0 images compared, 2 failed" in out and "no file matches" in out


def test_logits_that_are_no_number(
    squares: Squares, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if NaN compares as equal or small; where eager has it, too, nothing can be said."""
    right = ops.pool_linear
    monkeypatch.setattr(ops, "pool_linear", lambda *args: right(*args) * torch.nan)
    code, out, _ = check("--data", squares.folder)
    assert code == 1 and f"({IMAGES} flips)" in out and "FAIL" in out
    assert line(out, "fused float32")[2] == "0.00"
    monkeypatch.undo()
    plain = Rivals.logits

    def broken(self: Rivals, x: Tensor) -> dict[str, Tensor]:
        return {name: y * torch.nan for name, y in plain(self, x).items()}

    monkeypatch.setattr(Rivals, "logits", broken)
    code, out, _ = check("--images", squares.folder / "red")
    assert code == 2 and "0 images compared, 5 failed" in out and "no finite numbers" in out


def predictor(squares: Squares, side: int = SIDE, **other: Any) -> Predictor:
    prep = Preprocessing(resize=side, crop=side)
    return Predictor("resnet18", squares.weights, preprocessing=prep, **other)


def test_a_flip_says_by_how_much_and_whose_it_is(squares: Squares) -> None:
    """Breaks if the margins are another pair's, or float32's side is the wrong one."""
    names = ["a", "b", "c", "d"]
    tally = Tally(Rivals(predictor(squares, dtype="bf16")), names)

    def add(fused: list[float], eager: list[float], exact: list[float]) -> str:
        logits = {FUSED: fused, EAGER: eager, EXACT: exact}
        return tally.add("x", 1, {n: torch.tensor(y).double() for n, y in logits.items()})

    said = add([0.0, 4.0, 3.5, 0.0], [0.0, 3.0, 3.25, 0.0], [0.0, 4.0, 3.9, 0.0])
    assert said == (
        "flip   x: 2 c -> 1 b; eager has the first ahead by 0.25, fused the second by 0.5; "
        "float32 has the second ahead by 0.1"
    )
    assert add([0.0, 8.0, 1.0, 2.0], [0.0, 8.0, 1.0, 2.0], [0.0, 8.0, 1.0, 2.0]) == ""
    assert (tally.images, tally.flips, tally.hits[FUSED]) == (2, 1, [2, 2])
    assert tally.hits[EAGER] == [1, 2]
    # The largest error of any image over the largest logit of any image.
    assert tally.relative(EAGER) == pytest.approx(1.0 / 8)
    assert tally.relative(FUSED) == pytest.approx(0.4 / 8) and tally.worst == "x"


def test_memory_does_not_grow_with_the_images(squares: Squares) -> None:
    """Breaks if images are listed or loaded before they are needed."""
    paths = sorted(map(str, squares.folder.rglob("*.png")))
    taken = 0

    def images() -> Iterator[Labelled]:
        nonlocal taken
        for i in range(32):
            taken += 1
            yield Labelled(Found(paths[i % IMAGES]))

    model = predictor(squares, side=32)
    ahead: list[int] = []
    tally = agreement.run(
        images(), model, batch_size=4, progress=lambda tally: ahead.append(taken - tally.images)
    )
    assert tally.images == 32 and len(ahead) == 8
    assert max(ahead) <= 2 * 4 + model.threads


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--weights x.pth", "--weights needs --data or --images"),
        ("--resize 3 --op stem", "--resize needs --data or --images"),
        ("--data . --images .", "two checks"),
        ("--images . --op stem", "--op does not go with"),
        ("--images . --dtype fp32 --dtype bf16", "at most once"),
        ("--images . --dtype fp64", "--dtype must be one of fp32, bf16, fp16"),
        ("--images .", "weights must be given"),
        ("--images . --weights none.pth", "none.pth"),
        ("--images @none.txt --weights random", "no file 'none.txt'"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if an option does nothing, or a wrong one ends in a traceback."""
    assert main(["check", *arguments.split()]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
