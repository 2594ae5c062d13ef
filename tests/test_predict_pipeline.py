# SPDX-License-Identifier: BSD-3-Clause
"""Order, memory and batches of the pipeline between the files and the rows."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from resnet_fused.predict import loading, pipeline
from resnet_fused.predict.loading import Loaded, load
from resnet_fused.predict.pipeline import Tally, ahead, run
from resnet_fused.predict.predictor import Predictor
from resnet_fused.predict.preprocess import Preprocessing
from resnet_fused.predict.sources import Found
from resnet_fused.predict.writer import Prediction

PREP = Preprocessing(resize=32, crop=32)


class Mean(nn.Module):
    """Three logits per image: the means of its channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Rows:
    """Stands for a Writer; keeps the predictions if asked to."""

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.predictions: list[Prediction] = []
        self.count = 0

    def write(self, prediction: Prediction) -> None:
        self.count += 1
        if self.keep:
            self.predictions.append(prediction)

    def flush(self) -> None:
        pass


def predictor(model: nn.Module | None = None, **options: Any) -> Predictor:
    options = {"preprocessing": PREP, "top": 3, "threads": 3, **options}
    return Predictor(model or Mean(), **options)


def picture(folder: Path, name: str, colour: tuple[int, int, int]) -> Found:
    path = folder / name
    Image.new("RGB", (40, 36), colour).save(path)
    return Found(str(path))


def do(sources: Any, rows: Any, **options: Any) -> Tally:
    model = predictor(labels=["red", "green", "blue"])
    return run(sources, model, rows, **({"batch_size": 4} | options))


def test_results_come_in_the_order_of_the_items_whichever_is_ready_first() -> None:
    """Breaks if a result overtakes a slower one before it."""

    def slow_first(i: int) -> int:
        time.sleep(0.02 if i % 4 == 0 else 0)
        return i

    assert list(ahead(slow_first, range(40), threads=4, window=8)) == list(range(40))


def test_items_are_taken_at_most_a_window_ahead() -> None:
    """Breaks if everything is read at once: memory would grow with the number of images."""
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for i in range(100):
            taken += 1
            yield i

    for done, _ in enumerate(ahead(lambda i: i, items(), threads=2, window=7)):
        assert taken <= done + 7
    assert taken == 100


def test_work_is_done_while_the_consumer_is_busy() -> None:
    """Breaks if images are decoded only when the model asks for them."""
    results = ahead(threading.Barrier(4, timeout=5).wait, iter([None] * 4), threads=4, window=4)
    # Each call waits for three others: the first result needs all four to run at once.
    assert sorted(results) == [0, 1, 2, 3]


def test_stopping_early_starts_nothing_new() -> None:
    """Breaks if Ctrl-C waits until everything that was queued is decoded."""
    started: list[int] = []

    def work(i: int) -> None:
        started.append(i)
        time.sleep(0.01)

    results = ahead(work, iter(range(1000)), threads=1, window=500)
    next(results)
    before = len(started)
    results.close()
    assert len(started) <= before + 1


@pytest.mark.parametrize("batch_size", [1, 2, 5, 6, 7, 100])
def test_every_image_has_its_own_prediction(tmp_path: Path, batch_size: int) -> None:
    """Breaks if failures shift predictions to another image, in any position within a batch, or
    the last batch, partial or full (5 + 1 images), is lost."""
    colours = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}
    sources = [
        Found("first", "no file matches this pattern"),
        picture(tmp_path, "1.png", colours["green"]),
        Found(str(tmp_path / "missing.png")),
        picture(tmp_path, "2.png", colours["blue"]),
        picture(tmp_path, "3.png", colours["red"]),
        Found(str(tmp_path)),
    ]
    rows = Rows()
    tally = do(sources, rows, batch_size=batch_size)
    assert (tally.images, tally.failed) == (6, 3)
    assert [row.filename for row in rows.predictions] == [found.path for found in sources]
    best = [row.label[0] if row.label else row.error for row in rows.predictions]
    assert best == [
        "no file matches this pattern",
        "green",
        "No such file or directory",
        "blue",
        "red",
        "Is a directory",
    ]
    for row in rows.predictions:
        assert row.error or (row.prob == sorted(row.prob, reverse=True) and sum(row.prob) > 0.999)


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Breaks if pixels (3 KB an image) or predictions (0.7 KB) are kept.

    Peak memory while the last 2,000 images pass is compared with that of the first 1,000; a window
    of 43 images may be full at one peak and not at the other.
    """
    found = picture(tmp_path, "tiny.png", (1, 2, 3))
    peaks: dict[int, int] = {}

    def progress(tally: Tally) -> None:
        if tally.images in (1000, 3000):
            peaks[tally.images] = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        rows = Rows(keep=False)
        do((Found(found.path) for _ in range(3000)), rows, batch_size=20, progress=progress)
    finally:
        tracemalloc.stop()
    assert rows.count == 3000
    assert peaks[3000] < peaks[1000] + 400_000


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_too_many_errors_stop_the_job(batch_size: int) -> None:
    """Breaks if --max-errors counts by batches, is off by one, or loses the rows before."""
    sources = [Found(f"{i}.png") for i in range(10)]
    rows = Rows()
    with pytest.raises(pipeline.TooManyErrors, match="more than 4 images failed, the last 4.png"):
        do(iter(sources), rows, batch_size=batch_size, max_errors=4)
    assert [row.filename for row in rows.predictions] == [f"{i}.png" for i in range(5)]
    assert do(iter(sources), Rows(), max_errors=10).failed == 10


def test_nan_of_the_model_is_a_failure(tmp_path: Path) -> None:
    """Breaks if an overflow in fp16 is written as a prediction."""

    class Overflow(Mean):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            y[1:2] = float("nan")
            return y

    items = [load(picture(tmp_path, f"{i}.png", (i, 0, 0)), PREP) for i in range(3)]
    first, second, third = predictor(Overflow()).classify(items)
    assert first.error is None and third.error is None
    assert second.index == [] and "NaN" in (second.error or "")


def test_any_exception_of_a_decoder_becomes_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if one odd file ends the job, or its message spans lines."""
    found = picture(tmp_path, "1.png", (0, 0, 0))

    def fail(data: bytes) -> Any:
        raise SyntaxError("not a\n  TIFF")

    monkeypatch.setattr(loading, "decode", fail)
    item = load(found, PREP)
    assert item.pixels is None and item.error == "SyntaxError: not a TIFF"


def test_no_images_at_all() -> None:
    """Breaks if an empty list from stdin divides by zero in the closing line."""
    tally = do(iter(()), Rows())
    assert str(tally).startswith("0 images, 0 failed, 0.0 img/s; read 0 %")


def test_closing_line_gives_shares_of_busy_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the shares do not add up or the format changes under those who parse it."""
    seconds = {"read": 0.4, "decode": 6.1, "resize": 1.2, "model": 2.1, "write": 0.2}
    tally = Tally(12345, 38, seconds, started=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 100.0 + 12345 / 322)
    assert str(tally) == (
        "12,345 images, 38 failed, 322 img/s; "
        "read 4 % decode 61 % resize 12 % model 21 % write 2 %; limit: decode"
    )


def test_stages_are_timed(tmp_path: Path) -> None:
    """Breaks if a stage is not counted, or a failed image counts for a stage it did not reach."""
    tally = do([picture(tmp_path, "1.png", (9, 9, 9))], Rows())
    assert all(tally.seconds[stage] > 0 for stage in pipeline.STAGES)
    assert set(load(Found("missing.png"), PREP).seconds) == {"read"}


def test_top_is_at_most_all_classes() -> None:
    """Breaks if --top 5 fails on a model of three classes."""
    image = Loaded("a", torch.zeros(32, 32, 3, dtype=torch.uint8), None, {})
    (prediction,) = predictor(top=5).classify([image])
    assert len(prediction.prob) == len(prediction.index) == 3
    assert prediction.label == [None] * 3


@pytest.mark.parametrize(
    ("seconds", "beside", "limit"),
    [
        ({"decode": 30, "resize": 25, "model": 40}, 0, "model"),  # one pool of cores
        ({"decode": 30, "resize": 25, "model": 40}, 1, "decode"),  # a GPU waits for one thread
        ({"decode": 30, "resize": 25, "model": 40}, 4, "model"),  # four are enough
        ({"read": 9, "write": 2, "model": 1}, 3, "write"),
        ({}, 0, "none"),
    ],
)
def test_limit_is_what_keeps_the_rest_waiting(
    seconds: dict[str, float], beside: int, limit: str
) -> None:
    """Breaks if users of a GPU are told that it is too slow where it waits for the decoder."""
    tally = Tally(1, 0, defaultdict(float, seconds), beside=beside)
    assert tally.limit() == limit
