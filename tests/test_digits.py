# SPDX-License-Identifier: BSD-3-Clause
"""A network trained on real images: ResNet-18 on scikit-learn's handwritten digits, start to end.

Trained in plain PyTorch, saved, and then used through ``resnet-fused predict`` on PNG files.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from resnet_cases import exact, plain, rounded
from resnet_fused.cli.main import main
from resnet_fused.models import ResNet, resnet18
from resnet_fused.predict.decode import decode
from resnet_fused.predict.preprocess import Preprocessing, normalise, resize_and_crop

load_digits = pytest.importorskip("sklearn.datasets").load_digits

# Small enough to train in seconds. At this side layer4 writes a column of width 1, where torch's
# strided bfloat16 convolution is wrong on AMX CPUs; so the bf16 judge is eager as it should be.
SIDE = 32
TEST_IMAGES = 360
EPOCHS = 3
BATCH = 64


class Trained(NamedTuple):
    """The network's file, the folder of test images, their paths in order, and the true digits."""

    weights: Path
    folder: Path
    paths: list[Path]
    digits: Tensor


class Run(NamedTuple):
    """What ``predict`` wrote: the best class and the probabilities by class, per image."""

    best: Tensor
    prob: Tensor


def to_input(files: list[bytes], dtype: torch.dtype = torch.float32) -> Tensor:
    """The model's input of whole files, as ``predict --resize 32 --crop 32`` makes it."""
    prep = Preprocessing(resize=SIDE, crop=SIDE)
    return normalise(
        torch.stack([resize_and_crop(decode(data), prep) for data in files]), prep, dtype
    )


def png(image: Any) -> bytes:
    """An 8x8 digit with levels 0 to 16 as a grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray((image * (255 / 16)).astype("uint8")).save(buffer, "PNG")
    return buffer.getvalue()


def train(x: Tensor, digits: Tensor) -> ResNet:
    torch.manual_seed(0)
    model = resnet18(num_classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(model(x[rows]), digits[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trains once, in about 20 seconds of one core."""
    data = load_digits()
    folder = tmp_path_factory.mktemp("digits")
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    files = [png(data.images[i]) for i in order]
    digits = torch.tensor(data.target)[order]
    paths = [folder / f"{i:04}.png" for i in range(TEST_IMAGES)]
    for path, content in zip(paths, files, strict=False):
        path.write_bytes(content)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums on every machine, and no slower where cores are shared
    model = train(to_input(files[TEST_IMAGES:]), digits[TEST_IMAGES:])
    torch.set_num_threads(threads)
    weights = tmp_path_factory.mktemp("weights") / "digits.pth"
    torch.save(model.state_dict(), weights)
    return Trained(weights, folder, paths, digits[:TEST_IMAGES])


def predict(trained: Trained, dtype: str, output: Path) -> Run:
    arguments = f"--model resnet18 --top 10 --quiet --resize {SIDE} --crop {SIDE} --dtype {dtype}"
    command = ["predict", str(trained.folder), "--weights", str(trained.weights)]
    assert main([*command, *arguments.split(), "--output", str(output)]) == 0
    prob = torch.zeros(TEST_IMAGES, 10)
    best = torch.zeros(TEST_IMAGES, dtype=torch.int64)
    place = {str(path): image for image, path in enumerate(trained.paths)}
    with output.open(newline="") as lines:
        for row in csv.DictReader(lines):
            image = place[row["filename"]]
            prob[image, int(row["index"])] = float(row["prob"])
            if row["rank"] == "1":
                best[image] = int(row["index"])
    return Run(best, prob)


def accuracy(best: Tensor, trained: Trained) -> float:
    return (best == trained.digits).double().mean().item()


@torch.no_grad()
def test_predict_equals_eager_in_fp32(trained: Trained, tmp_path: Path) -> None:
    """Breaks if file loading, preprocessing, order of rows or a fused fp32 kernel is wrong."""
    found = predict(trained, "fp32", tmp_path / "digits.csv")
    model = resnet18(weights=trained.weights).eval()
    eager = plain(model, to_input([p.read_bytes() for p in trained.paths]))
    # Fused and eager both differ from the exact logits by far less than this, so a smaller margin
    # between the two best classes decides nothing.
    best_two = eager.topk(2).values
    decided = best_two[:, 0] - best_two[:, 1] > 1e-4 * eager.abs().amax(1)
    assert decided.sum() >= TEST_IMAGES - 1
    assert torch.equal(found.best[decided], eager.argmax(1)[decided])
    torch.testing.assert_close(found.prob, eager.softmax(1), rtol=1e-3, atol=2e-6)
    assert accuracy(found.best, trained) > 0.95


@torch.no_grad()
def test_predict_is_as_good_as_eager_in_bf16(trained: Trained, tmp_path: Path) -> None:
    """Breaks if a bf16 kernel loses more than rounding does, or takes torch's faulty one: judged by
    eager's own distance from the exact network (1.5 times, and one rounding)."""
    found = predict(trained, "bf16", tmp_path / "digits.csv")
    model = resnet18(weights=trained.weights).eval().bfloat16()
    x = to_input([p.read_bytes() for p in trained.paths], torch.bfloat16)
    right = exact(model, x)
    eager = rounded(model, x, torch.bfloat16)
    bound = 1.5 * (eager - right).abs().max() + 2**-8 * right.abs().max()

    # Two logits may move towards each other by the bound each.
    best_two = right.topk(2).values
    decided = best_two[:, 0] - best_two[:, 1] > 2 * bound
    undecided = 1 - decided.double().mean().item()
    assert undecided < 0.1, "the bound leaves too many images unjudged"
    assert torch.equal(found.best[decided], right.argmax(1)[decided])
    assert abs(accuracy(found.best, trained) - accuracy(eager.argmax(1), trained)) <= undecided
    assert accuracy(found.best, trained) > 0.95
    # Every logit moved by at most the bound changes a probability by at most this factor.
    assert (found.prob <= right.softmax(1) * (2 * bound).exp() + 1e-6).all()
    assert (found.prob >= right.softmax(1) * (-2 * bound).exp() - 1e-6).all()
