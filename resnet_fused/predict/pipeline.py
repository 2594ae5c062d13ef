# SPDX-License-Identifier: BSD-3-Clause
"""Images through the model: threads read and decode ahead while the main thread runs batches."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from resnet_fused.predict import loading
from resnet_fused.predict.loading import Loaded, load
from resnet_fused.predict.predictor import Predictor
from resnet_fused.predict.sources import Found
from resnet_fused.predict.writer import Prediction

STAGES = (*loading.STAGES, "model", "write")
BATCH_SIZE = {"cpu": 32, "cuda": 256}

A = TypeVar("A")
B = TypeVar("B")


class TooManyErrors(Exception):
    """More images failed than the user allows."""


class Sink(Protocol):
    """What takes the predictions one by one."""

    def write(self, prediction: Prediction) -> None:
        """Take one prediction."""

    def flush(self) -> None:
        """Called after every batch."""


@dataclass
class Tally:
    """What has been done so far.

    ``seconds`` are thread-seconds per stage: those of the loading threads are added up, and those
    of the model on a CPU count once per thread of torch, because it keeps that many cores busy.
    ``beside`` is how many threads load while another device computes, 0 if they share the cores.
    """

    images: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    started: float = field(default_factory=time.perf_counter)
    beside: int = 0

    def rate(self) -> float:
        """Images per second since the start."""
        return self.images / max(time.perf_counter() - self.started, 1e-9)

    def limit(self) -> str:
        """The stage that takes most of what the job is short of; "none" before the first image.

        With loading beside the model that is a stage of whichever of the two keeps the other
        waiting, else the largest of all.
        """
        stages: Iterable[str] = STAGES
        if self.beside:
            loading_time = sum(self.seconds[s] for s in loading.STAGES) / self.beside
            own = STAGES[len(loading.STAGES) :]
            stages = loading.STAGES if loading_time > sum(self.seconds[s] for s in own) else own
        return max(stages, key=lambda s: self.seconds[s]) if any(self.seconds.values()) else "none"

    def __str__(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        shares = " ".join(f"{s} {100 * self.seconds[s] / total:.0f} %" for s in STAGES)
        rate = self.rate()
        return (
            f"{self.images:,} images, {self.failed:,} failed, "
            f"{rate:,.{0 if rate >= 10 else 1}f} img/s; {shares}; limit: {self.limit()}"
        )


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
    predictor: Predictor,
    writer: Sink,
    *,
    batch_size: int,
    max_errors: int | None = None,
    progress: Callable[[Tally], None] = lambda tally: None,
    tally: Tally | None = None,
) -> Tally:
    """Classify images and write a prediction for each, in the order of ``sources``.

    Memory holds two batches of decoded images and what the threads work on, whatever the number of
    images.

    Args:
        sources: files, or sources with an error.
        predictor: the model; says how many threads read and decode.
        writer: takes the predictions.
        batch_size: images per batch; failed ones are left out of theirs.
        max_errors: failed images to accept; None accepts all.
        progress: called after every batch.
        tally: of what was done before, to be added to.

    Raises:
        TooManyErrors: more than ``max_errors`` images failed; what came before is written.
    """
    tally = Tally() if tally is None else tally
    threads = predictor.threads
    on_cpu = predictor.device.type == "cpu"
    model_threads = torch.get_num_threads() if on_cpu else 1
    tally.beside = 0 if on_cpu else threads

    def load_one(found: Found) -> Loaded:
        return load(found, predictor.prep)

    with closing(ahead(load_one, sources, threads, 2 * batch_size + threads)) as loaded:
        while batch := list(itertools.islice(loaded, batch_size)):
            start = time.perf_counter()
            predictions = predictor.classify(batch)
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
