# SPDX-License-Identifier: BSD-3-Clause
"""A job in this process, or this process's share of it; processes meet only in the folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from resnet_fused.jobs.job import Job, open_job
from resnet_fused.jobs.manifest import NAME
from resnet_fused.jobs.parts import Part
from resnet_fused.predict.pipeline import Tally
from resnet_fused.predict.predictor import Predictor

PATIENCE = 3600.0  # seconds to wait for another process that shows no sign of life
POLL = 0.2


@dataclass
class Progress:
    """What has been done of a share: ``tally`` in this run, what was kept in earlier ones."""

    tally: Tally = field(default_factory=Tally)
    made: int = 0
    kept: int = 0
    kept_images: int = 0
    kept_failed: int = 0
    slowest: float = 0.0  # seconds for a unit

    @property
    def images(self) -> int:
        """Of this run and the kept parts."""
        return self.kept_images + self.tally.images

    @property
    def failed(self) -> int:
        """Likewise."""
        return self.kept_failed + self.tally.failed

    def keep(self, part: Part) -> None:
        """Count a part that was there."""
        self.kept += 1
        self.kept_images += part.images
        self.kept_failed += part.failed


def run(
    job: Job,
    predictor: Predictor,
    *,
    rank: int = 0,
    world: int = 1,
    max_errors: int | None = None,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Make the missing parts of units ``rank``, ``rank + world``, ...

    Args:
        job: the job.
        predictor: of its fingerprint.
        rank: number of this process.
        world: how many there are.
        max_errors: failed images to accept in this run and process; None accepts all.
        show: called after every batch and every part.

    Raises:
        TooManyErrors, ValueError, OSError: see ``Job.do``; parts that are complete stay.
    """
    progress = Progress()
    for unit in range(rank, job.header.units, world):
        part = job.part(unit)
        if part is not None:
            progress.keep(part)
            show(progress)
            continue
        start = time.monotonic()
        job.do(
            unit,
            predictor,
            tally=progress.tally,
            max_errors=max_errors,
            progress=lambda tally: show(progress),
        )
        progress.made += 1
        progress.slowest = max(progress.slowest, time.monotonic() - start)
        show(progress)
    return progress


def wait_for_job(
    folder: str | os.PathLike[str],
    predictor: Predictor,
    *,
    given: Sequence[str] = (),
    unit: int | None = None,
    batch_size: int | None = None,
) -> Job:
    """Open the job that another process is writing the manifest of.

    Args:
        folder: where it will be.
        predictor: as for ``open_job``.
        given: likewise, but stdin is not read: rank 0 does that.
        unit: likewise.
        batch_size: likewise.

    Raises:
        TimeoutError: there is none after ``PATIENCE`` seconds.
        ValueError: see ``open_job``.
    """
    deadline = time.monotonic() + PATIENCE
    while not os.path.exists(os.path.join(folder, NAME)):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"no manifest in {os.fspath(folder)} after {PATIENCE:.0f} s; rank 0 writes it: see "
                "what became of it, and whether it is given the same --output on the same disk"
            )
        time.sleep(POLL)
    given = () if "-" in given else given
    return open_job(folder, predictor, given=given, unit=unit, batch_size=batch_size)


def wait_for_parts(job: Job, slowest: float) -> Progress:
    """Wait until other processes have made their parts, too.

    Args:
        job: the job.
        slowest: seconds that this process took for a unit; ten times that is added to the patience,
            which begins anew with every part that appears, whoever makes it.

    Returns:
        All parts, as kept ones.

    Raises:
        TimeoutError: no part comes any more, and one is missing.
    """
    patience = PATIENCE + 10 * slowest
    whole = Progress()
    for unit in range(job.header.units):
        deadline, before = time.monotonic() + patience, -1
        while (part := job.part(unit)) is None:
            before = _parts(job) if before < 0 else before
            if time.monotonic() > deadline:
                now = _parts(job)  # not more often, because a folder may have very many
                if now > before:
                    deadline, before = time.monotonic() + patience, now
                    continue
                raise TimeoutError(
                    f"{job.path(unit)} did not come in {patience:.0f} s, nor any other; the "
                    "process that makes it may be dead: run the same command again with --resume"
                )
            time.sleep(POLL)
        whole.keep(part)
    return whole


def _parts(job: Job) -> int:
    with os.scandir(job.folder) as entries:
        return sum(entry.name.startswith("part-") for entry in entries)
