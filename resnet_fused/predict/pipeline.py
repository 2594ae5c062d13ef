# SPDX-License-Identifier: BSD-3-Clause
"""Images through the model: threads read and decode ahead while the main thread runs batches."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from resnet_fused.predict.decode import decode
from resnet_fused.predict.preprocess import Preprocessing, normalise, resize_and_crop
from resnet_fused.predict.sources import Found
from resnet_fused.predict.writer import Prediction, Writer

STAGES = ("read", "decode", "resize", "model", "write")

A = TypeVar("A")
B = TypeVar("B")


class TooManyErrors(Exception):
    """More images failed than the user allows."""


class Loaded(NamedTuple):
    """One image as the model takes it, uint8 [crop, crop, 3], or why there is none."""

    path: str
    pixels: Tensor | None
    error: str | None
    seconds: dict[str, float]


@dataclass
class Tally:
    """What has been done so far.

    ``seconds`` are thread-seconds per stage: those of the loading threads are added up, and those
    of the model on a CPU count once per thread of torch, because it keeps that many cores busy.
    """

    images: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    started: float = field(default_factory=time.perf_counter)

    def rate(self) -> float:
        """Images per second since the start."""
        return self.images / max(time.perf_counter() - self.started, 1e-9)

    def __str__(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        shares = " ".join(f"{s} {100 * self.seconds[s] / total:.0f} %" for s in STAGES)
        rate = self.rate()
        return (
            f"{self.images:,} images, {self.failed:,} failed, "
            f"{rate:,.{0 if rate >= 10 else 1}f} img/s; {shares}"
        )


class Classifier:
    """A model behind its preprocessing: pixels to the best classes.

    Args:
        model: in eval mode, on ``device``, with parameters of ``dtype``.
        prep: the preprocessing.
        dtype: of the model's input.
        device: where the model is.
        top: how many classes to return, at most all.
    """

    def __init__(
        self,
        model: nn.Module,
        prep: Preprocessing,
        dtype: torch.dtype,
        device: torch.device,
        top: int,
    ) -> None:
        self.model = model
        self.prep = prep
        self.dtype = dtype
        self.device = device
        self.top = top

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[Tensor]) -> tuple[list[list[float]], list[list[int]]]:
        """Classify one batch.

        Args:
            pixels: at least one image, each uint8 of shape [crop, crop, 3].

        Returns:
            Softmax probabilities and class indices, best first, per image.
        """
        batch = torch.stack(tuple(pixels)).to(self.device)
        logits = self.model(normalise(batch, self.prep, self.dtype))
        best = logits.float().softmax(1).topk(min(self.top, logits.shape[1]), dim=1)
        return best.values.tolist(), best.indices.tolist()


def load(found: Found, prep: Preprocessing) -> Loaded:
    """Read, decode and resize one image; never raises for a bad one."""
    times = [time.perf_counter()]
    pixels = None
    error = found.error
    if error is None:
        try:
            data = Path(found.path).read_bytes()
            times.append(time.perf_counter())
            image = decode(data)
            times.append(time.perf_counter())
            pixels = resize_and_crop(image, prep)
        except Exception as problem:  # decoders raise nearly anything on damaged data
            error = describe(problem)
    times.append(time.perf_counter())
    spans = (later - earlier for earlier, later in itertools.pairwise(times))
    return Loaded(found.path, pixels, error, dict(zip(STAGES, spans, strict=False)))


def describe(problem: Exception) -> str:
    """One line about an exception, without the file's name, which has its own column."""
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    text = " ".join(str(problem).split())
    return text if type(problem) is ValueError else f"{type(problem).__name__}: {text}"


def ahead(
    function: Callable[[A], B], items: Iterable[A], threads: int, window: int
) -> Generator[B, None, None]:
    """``map`` in threads: results in order, never more than ``window`` of them waiting."""
    pending: deque[Future[B]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="resnet_fused-load")
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def run(
    sources: Iterable[Found],
    classifier: Classifier,
    names: Sequence[str] | None,
    writer: Writer,
    *,
    batch_size: int,
    threads: int,
    max_errors: int | None = None,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Classify images and write a prediction for each, in the order of ``sources``.

    Memory holds two batches of decoded images and what the threads work on, whatever the number of
    images.

    Args:
        sources: files, or sources with an error.
        classifier: the model.
        names: class names by index, or None.
        writer: takes the predictions.
        batch_size: images per batch; failed ones are left out of theirs.
        threads: that read and decode.
        max_errors: failed images to accept; None accepts all.
        progress: called after every batch.

    Raises:
        TooManyErrors: more than ``max_errors`` images failed; what came before is written.
    """
    tally = Tally()
    model_threads = torch.get_num_threads() if classifier.device.type == "cpu" else 1

    def load_one(found: Found) -> Loaded:
        return load(found, classifier.prep)

    with closing(ahead(load_one, sources, threads, 2 * batch_size + threads)) as loaded:
        while batch := list(itertools.islice(loaded, batch_size)):
            start = time.perf_counter()
            predictions = classify(batch, classifier, names)
            middle = time.perf_counter()
            for item, prediction in zip(batch, predictions, strict=True):
                writer.write(prediction)
                tally.images += 1
                tally.failed += prediction.error is not None
                for stage, seconds in item.seconds.items():
                    tally.seconds[stage] += seconds
                if max_errors is not None and tally.failed > max_errors:
                    writer.flush()
                    raise TooManyErrors(
                        f"more than {max_errors} images failed, the last {item.path}: "
                        f"{prediction.error}"
                    )
            writer.flush()
            tally.seconds["model"] += (middle - start) * model_threads
            tally.seconds["write"] += time.perf_counter() - middle
            progress(tally)
    return tally


def classify(
    batch: Sequence[Loaded], classifier: Classifier, names: Sequence[str] | None
) -> list[Prediction]:
    """Run the images that could be loaded as one batch.

    Args:
        batch: images, some of them failed.
        classifier: the model.
        names: class names by index, or None.

    Returns:
        A prediction for each item of ``batch``; an error where there is no image or the model's
        output is NaN (fp16 overflows where the weights were not trained for it).
    """
    good = [item.pixels for item in batch if item.pixels is not None]
    best = iter(zip(*classifier(good), strict=True) if good else ())
    predictions = []
    for item in batch:
        error = item.error
        prob, index = ([], []) if item.pixels is None else next(best)
        if any(math.isnan(p) for p in prob):
            prob, index, error = [], [], "the model's output is NaN; try --dtype fp32"
        label = [None if names is None else names[i] for i in index]
        predictions.append(Prediction(item.path, index, label, prob, error))
    return predictions
