# SPDX-License-Identifier: BSD-3-Clause
"""Predictor by itself: dictionaries of arrays in and out, no engine, no command line."""

from __future__ import annotations

import csv
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from resnet_fused import Predictor
from resnet_fused.cli.main import main
from resnet_fused.predict.preprocess import Preprocessing

CLASSES = 7
NAMES = [f"class {i}" for i in range(CLASSES)]
PREP = Preprocessing(resize=40, crop=33)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def predictor(weights: str) -> Predictor:
    return Predictor("resnet18", weights, preprocessing=PREP, top=3, labels=NAMES)


def array(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, height, width])
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def objects(*items: Any) -> np.ndarray:
    result = np.empty(len(items), object)
    for i, item in enumerate(items):
        result[i] = item
    return result


SIZES = [(61, 50), (33, 90), (40, 40), (300, 200), (1, 1)]
IMAGES = [array(*size) for size in SIZES]


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in ("index", "prob", "label", "error"):
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_every_input_gives_the_same(predictor: Predictor, tmp_path: Path) -> None:
    """Breaks if bytes, paths and arrays of one image are prepared differently, or sizes mix up."""
    files = [png(image) for image in IMAGES]
    paths = [tmp_path / f"{i}.png" for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    results = [
        predictor({"image": objects(*IMAGES)}),
        predictor({"bytes": objects(*files)}),
        predictor({"path": np.array([str(path) for path in paths])}),
        predictor({"path": objects(*map(str, paths))}),
    ]
    for other in results[1:]:
        same(results[0], other)
    whole = np.stack([array(50, 60, seed) for seed in range(4)])
    same(predictor({"image": whole}), predictor({"image": objects(*whole)}))


def test_shapes_and_dtypes(predictor: Predictor) -> None:
    """Breaks if an engine that checks schemas sees another one in another batch."""
    bad = objects(*[b""] * 2)
    for batch, n in (({"image": objects(*IMAGES)}, 5), ({"bytes": bad}, 2), ({"path": []}, 0)):
        out = predictor(batch)
        assert (out["index"].dtype, out["index"].shape) == (np.int64, (n, 3))
        assert (out["prob"].dtype, out["prob"].shape) == (np.float32, (n, 3))
        assert (out["label"].dtype, out["label"].shape) == (object, (n, 3))
        assert (out["error"].dtype, out["error"].shape) == (object, (n,))
        assert all(type(text) is str for text in [*out["label"].flat, *out["error"]])


@pytest.mark.parametrize("key", ["image", "bytes", "path", "pixels"])
def test_empty_batch(predictor: Predictor, key: str) -> None:
    """Breaks if the last, empty block of an engine reaches the model."""
    empty = np.empty((0, 33, 33, 3), np.uint8) if key in ("image", "pixels") else objects()
    out = predictor({key: empty, "id": np.empty(0)})
    assert out["index"].shape == (0, 3) and out["error"].shape == (0,) and out["id"].shape == (0,)


def test_bad_items_are_rows(predictor: Predictor, tmp_path: Path) -> None:
    """Breaks if a bad item ends the batch, or shifts the results of the others."""
    good = predictor({"image": objects(IMAGES[0], IMAGES[1])})
    mixed = objects(
        None, png(IMAGES[0]), b"", b"text", png(IMAGES[3])[:900], "text", png(IMAGES[1])
    )
    out = predictor({"bytes": mixed, "id": np.arange(7)})
    assert [bool(text) for text in out["error"]] == [True, False, True, True, True, True, False]
    assert out["error"][0] == "must be the bytes of an image file, got NoneType"
    np.testing.assert_array_equal(out["id"], np.arange(7))
    for key in ("index", "prob", "label"):
        np.testing.assert_array_equal(out[key][[1, 6]], good[key])
    assert (out["index"][0] == -1).all() and np.isnan(out["prob"][0]).all()
    assert list(out["label"][0]) == ["", "", ""]
    shapes = objects(IMAGES[0][..., 0], IMAGES[0].astype(float), None, np.empty((0, 4, 3), "u1"))
    assert all("must be uint8 of shape" in text for text in predictor({"image": shapes})["error"])
    errors = predictor({"path": objects(str(tmp_path / "no.png"), 7, str(tmp_path))})["error"]
    assert list(errors) == [
        "No such file or directory",
        "path must be a str, got int",
        "Is a directory",
    ]


def test_labels_and_order(predictor: Predictor) -> None:
    """Breaks if a name is given to another index, or the best class does not come first."""
    out = predictor({"image": objects(*IMAGES)})
    assert out["label"].tolist() == [[NAMES[i] for i in row] for row in out["index"].tolist()]
    assert (np.diff(out["prob"], axis=1) <= 0).all() and (out["prob"] > 0).all()


def test_pixels_are_taken_as_they_are(weights: str, predictor: Predictor) -> None:
    """Breaks if prepared pixels are resized again, or the normalisation is left out."""
    exact = Preprocessing(resize=33, crop=33)
    plain = Predictor("resnet18", weights, preprocessing=exact, top=3, labels=NAMES)
    prepared = np.stack([array(33, 33, seed) for seed in range(3)])
    prepared.setflags(write=False)
    same(plain({"image": prepared}), predictor({"pixels": prepared}))


def test_other_keys_are_handed_through(predictor: Predictor, tmp_path: Path) -> None:
    """Breaks if a user's column is lost, changed or copied, or the images come back."""
    ids = objects({"a": 1}, None)
    out = predictor({"image": objects(*IMAGES[:2]), "id": ids})
    assert set(out) == {"id", "index", "prob", "label", "error"} and out["id"] is ids
    paths = np.array(["x.png"])
    assert predictor({"path": paths})["path"] is paths


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "exactly one of the keys bytes, path, image, pixels, got none"),
        ({"images": []}, "got images"),
        ({"image": [], "bytes": []}, "exactly one"),
        ({"image": [], "label": []}, "'label', which is a result's; rename yours"),
        ({"image": np.zeros((2, 5, 5, 3))}, r"uint8 .* got float64 of shape \[2, 5, 5, 3\]"),
        ({"image": np.zeros((2, 3, 5, 5), np.uint8)}, r"got uint8 of shape \[2, 3, 5, 5\]"),
        ({"pixels": np.zeros((2, 5, 5, 3), np.uint8)}, r"uint8 of shape \[N, 33, 33, 3\]"),
        ({"bytes": np.array([b"abc"])}, "object array, because others cut zeros"),
    ],
)
def test_a_wrong_batch_is_refused(predictor: Predictor, batch: Any, message: str) -> None:
    """Breaks if a mistake in the program becomes an error of every image."""
    with pytest.raises(ValueError, match=message):
        predictor(batch)


def test_equal_to_the_command_line(
    predictor: Predictor, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if the command prepares a model or an image in another way than its own Predictor."""
    for i, image in enumerate(IMAGES):
        (tmp_path / f"{i}.png").write_bytes(png(image))
    Image.fromarray(IMAGES[3]).save(tmp_path / "5.jpg")
    (tmp_path / "6.png").write_bytes(b"broken")
    labels = tmp_path / "names.txt"
    labels.write_text("\n".join(NAMES))
    options = ["--model", "resnet18", "--resize", "40", "--crop", "33", "--top", "3", "--quiet"]
    command = ["predict", str(tmp_path), "--weights", weights, "--labels", str(labels)]
    assert main([*command, *options]) == 2
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    paths = [str(tmp_path / f"{i}.{'jpg' if i == 5 else 'png'}") for i in range(7)]
    out = predictor({"path": np.array(paths)})
    expected = [
        (path, str(i), f"{p:.6g}", name)
        for path, *columns in zip(paths, out["index"], out["prob"], out["label"], strict=True)
        for i, p, name in zip(*columns, strict=True)
        if i >= 0
    ]
    found = [(r["filename"], r["index"], r["prob"], r["label"]) for r in rows if not r["error"]]
    assert found == expected
    assert [r["error"] for r in rows if r["error"]] == [out["error"][6]]


def test_pickled_in_another_process(predictor: Predictor, tmp_path: Path) -> None:
    """Breaks if a predictor cannot be sent to a worker, or computes, counts threads or describes
    itself differently there."""
    batch = {"image": objects(*IMAGES)}
    job = tmp_path / "job.pickle"
    sent = Predictor(predictor.model, preprocessing=PREP, top=3, labels=NAMES)
    sent._threads = 1
    job.write_bytes(pickle.dumps((sent, batch)))
    code = (
        "import pickle, sys, torch\n"
        f"predictor, batch = pickle.load(open({str(job)!r}, 'rb'))\n"
        "answer = predictor(batch), predictor.fingerprint, torch.get_num_threads()\n"
        "sys.stdout.buffer.write(pickle.dumps(answer))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=120, cwd=HERE, check=True
    )
    out, fingerprint, threads = pickle.loads(done.stdout)
    same(out, predictor(batch))
    assert fingerprint == sent.fingerprint and threads == 1


def test_several_threads_at_once(predictor: Predictor) -> None:
    """Breaks if calls share something: servers call from many threads."""
    batches = [{"image": objects(*IMAGES[i:], *IMAGES[:i])} for i in range(4)]
    alone = [predictor(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for i, out in enumerate(pool.map(predictor, batches * 3)):
            same(out, alone[i % 4])


class Sums(nn.Module):
    """Logits of the means of the three channels; has one parameter."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * self.scale


def test_a_module_is_used_as_it_is() -> None:
    """Breaks if a user's module is copied, cast or left in train mode."""
    model = Sums().train()
    predictor = Predictor(model, preprocessing=PREP, top=9)
    assert predictor.model is model and not model.training
    assert (predictor.classes, predictor.top, predictor.labels) == (3, 3, None)
    colours = np.zeros((2, 40, 40, 3), np.uint8)
    colours[0, ..., 1] = colours[1, ..., 2] = 255
    assert predictor({"image": colours})["index"][:, 0].tolist() == [1, 2]


def test_nan_is_an_error_of_its_image() -> None:
    """Breaks if fp16's overflow looks like a prediction."""
    model = Sums()
    predictor = Predictor(model, preprocessing=PREP, top=1)
    with torch.no_grad():
        model.scale.fill_(float("nan"))
    out = predictor({"image": objects(IMAGES[0])})
    assert "NaN" in out["error"][0] and out["index"][0, 0] == -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "weights must be given, because an untrained model predicts nothing"),
        ({"model": "resnet19", "weights": "random"}, "model must be .* got 'resnet19'"),
        ({"weights": "random", "dtype": "int8"}, "dtype must be one of fp32, bf16, fp16"),
        ({"weights": "random", "device": "meta"}, "device must be cpu, cuda or cuda:N"),
        ({"weights": "random", "top": 0}, "top must be 1 or more, got 0"),
        ({"weights": "random", "threads": 0}, "threads must be 1 or more, got 0"),
        ({"weights": "random", "top": 2.5}, "top must be an integer, got 2.5"),
        (
            {"weights": "random", "preprocessing": {"resize": 40.5, "crop": 33}},
            "resize must be an integer, got 40.5",
        ),
        (
            {"weights": "random", "preprocessing": {"mean": (124, 117, 104)}},
            r"mean must be of values in \[0, 1\], got .*; divide mean and std by 255",
        ),
        ({"model": Sums(), "weights": "random"}, "weights must be None where model is a module"),
        ({"model": Sums(torch.bfloat16)}, "dtype must be that of the model's parameters"),
        ({"model": nn.Conv2d(3, 4, 3)}, r"logits of shape \[N, classes\], got \[1, 4, 222, 222\]"),
        ({"model": Sums(), "labels": ["a", "b"]}, "labels must name 3 classes, .* got 2"),
        ({"model": Sums(), "labels": [1, 2, 3]}, "labels must hold a list of names"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    """Breaks if a mistake is found only when the first image comes, or names no argument."""
    with pytest.raises(ValueError, match=message):
        Predictor(**options)


@pytest.mark.parametrize(
    "batch",
    [
        {"path": "photos/a.png"},
        {"path": Path("a.png")},
        {"bytes": b"12345"},
        {"path": np.array("a.png")},
        {"image": 3},
    ],
    ids=repr,
)
def test_one_image_instead_of_a_batch(batch: dict[str, Any], predictor: Predictor) -> None:
    """Breaks if every character of a path is taken for an image."""
    with pytest.raises(ValueError, match="must be an array or a list with one entry per image"):
        predictor(batch)


def test_the_callers_autocast_changes_nothing(predictor: Predictor) -> None:
    """Breaks if results depend on something that is in no fingerprint."""
    batch = {"image": objects(*IMAGES)}
    expected = predictor(batch)["prob"]
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(predictor(batch)["prob"], expected)


def test_random_is_the_same_model_and_leaves_the_random_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Breaks if building a predictor changes what the user's program draws next, on a GPU too."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    Predictor("resnet18", "random", preprocessing=PREP)
    assert seeded == []
    monkeypatch.undo()
    torch.manual_seed(3)
    first = Predictor("resnet18", "random", preprocessing=PREP).fingerprint
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert Predictor("resnet18", "random", preprocessing=PREP).fingerprint == first


def test_import_loads_no_image_library() -> None:
    """Breaks if ``import resnet_fused`` pays for what only Predictor needs."""
    code = (
        "import sys, resnet_fused\n"
        "assert 'PIL.Image' not in sys.modules\n"
        "assert resnet_fused.Predictor.__name__ == 'Predictor' and 'PIL.Image' in sys.modules"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=HERE)
    assert done.returncode == 0, done.stderr


def test_preprocessing_by_field(weights: str) -> None:
    """Breaks if fields change what the weights do not name, or None overrides something."""
    fields = {"resize": 40, "crop": 33, "mean": None}
    named = Predictor("resnet18", weights, preprocessing=fields).prep
    assert (named.resize, named.crop) == (40, 33) and named.mean == Preprocessing().mean
    with pytest.raises(ValueError, match="crop must be from 1 to resize"):
        Predictor("resnet18", "random", preprocessing={"crop": 300})
