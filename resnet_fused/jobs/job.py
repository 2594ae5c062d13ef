# SPDX-License-Identifier: BSD-3-Clause
"""plan, and the Job it makes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from resnet_fused import dispatch
from resnet_fused.jobs import files, manifest, parts
from resnet_fused.jobs.manifest import Header, Manifest
from resnet_fused.jobs.parts import Part
from resnet_fused.predict import pipeline, sources
from resnet_fused.predict.predictor import Predictor
from resnet_fused.predict.sources import Found

UNIT = 1000


@dataclass
class Job:
    """A folder with a manifest; can be pickled and opened by any process that sees the folder.

    Args:
        folder: where the parts are.
        header: what the manifest says.
    """

    folder: Path
    header: Header
    _manifest: Manifest | None = field(default=None, repr=False)
    _accepted: tuple[int, ...] = field(default=(), repr=False)  # weights

    def path(self, unit: int) -> Path:
        """Where the part of a unit is, or will be."""
        return self.folder / parts.name(unit, self.header.units)

    def part(self, unit: int) -> Part | None:
        """The part of a unit; None if there is none or it is cut, and must be made.

        Raises:
            ValueError: there is another job's file in its place.
        """
        try:
            return parts.read(self.path(unit), self.header, unit)
        except (FileNotFoundError, parts.Damaged):
            return None

    def missing(self, rank: int = 0, world: int = 1) -> Iterator[int]:
        """Units without a part, each looked at when its turn comes.

        Args:
            rank: leave out all but units ``rank``, ``rank + world``, ...
            world: of how many processes.
        """
        return (u for u in range(rank, self.header.units, world) if self.part(u) is None)

    def do(
        self,
        unit: int,
        predictor: Predictor,
        *,
        tally: pipeline.Tally | None = None,
        max_errors: int | None = None,
        progress: Callable[[pipeline.Tally], None] = lambda tally: None,
    ) -> Part:
        """Classify the images of one unit and write its part, in place of a damaged one.

        Args:
            unit: its number.
            predictor: of the job's fingerprint.
            tally: is added to.
            max_errors: as for ``pipeline.run``.
            progress: likewise.

        Raises:
            ValueError: the predictor has another fingerprint.
            TooManyErrors: more images failed than ``max_errors``; there is no part.
            OSError: the part cannot be written.
        """
        with _batch_invariant():
            self._check(predictor)
            images = self._images(unit)
            located = [Found(os.path.join(self.header.root, i.path), i.error) for i in images]
            names = [image.path for image in images]
            with (
                files.appearing(self.path(unit), replace=True) as file,
                parts.PartWriter(file, self.header, unit, names) as writer,
            ):
                pipeline.run(
                    located,
                    predictor,
                    writer,
                    batch_size=self.header.batch_size,
                    max_errors=max_errors,
                    progress=progress,
                    tally=tally,
                )
        return Part(self.path(unit), unit, len(images), writer.failed)

    def _images(self, unit: int) -> list[Found]:
        if self._manifest is None:
            self._manifest = Manifest(self.folder)
        return self._manifest.unit(unit)

    def _check(self, predictor: Predictor) -> None:
        weights = _versions(predictor)
        if self._accepted != weights:
            _compare(self.header, _fingerprint(predictor, self.header.batch_size), self.folder)
            self._accepted = weights

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_manifest": None, "_accepted": ()}


def plan(
    given: Sequence[str],
    folder: str | os.PathLike[str],
    predictor: Predictor,
    *,
    unit: int | None = None,
    batch_size: int | None = None,
    resume: bool = False,
) -> Job:
    """Begin a job, or open the one in ``folder`` after a check that it is the same.

    Args:
        given: sources as on the command line (files, folders, globs, ``@list.txt``, ``-``); none to
            go on with the images of the manifest, whatever has become of the sources.
        folder: for the results; made if it is missing. Other files in it are left alone.
        predictor: of which the fingerprint counts.
        unit: images per part; None for 1,000, or what the manifest says.
        batch_size: images per batch; None for what suits the device, or what the manifest says.
        resume: accept a folder with a manifest; begin if there is none.

    Raises:
        ValueError: the job in ``folder`` is another; the message says in what. Or ``unit`` or
            ``batch_size`` is less than 1, or ``unit`` more than 10,000,000.
        TypeError: ``given`` is one name instead of a list.
        FileExistsError: there is one, and ``resume`` is False.
        OSError: the folder cannot be written.
    """
    if isinstance(given, (str, os.PathLike)):
        raise TypeError(
            f"given must be a list of sources, got {given!r} alone; give [{os.fspath(given)!r}]"
        )
    for name, value in (("unit", unit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(
                f"{name} must be at least 1, got {value}; give more, or None for the default"
            )
    if unit is not None and unit > manifest.LARGEST_UNIT:
        raise ValueError(
            f"unit must be at most {manifest.LARGEST_UNIT:,} images per part, got {unit:,}; give a "
            "smaller one"
        )
    folder = Path(folder)
    exists = (folder / manifest.NAME).exists()
    if given or not exists:
        sources.check(given)
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_stale(folder)
    if not exists:
        strays = [p.name for p in folder.glob("part-*.parquet")]
        if strays:
            raise ValueError(
                f"{folder} has {min(strays)} but no manifest; give another folder, or move the "
                "parts away"
            )
        size = batch_size or pipeline.BATCH_SIZE[predictor.device.type]
        with _batch_invariant():
            header = Header(_fingerprint(predictor, size), unit or UNIT, size, os.getcwd())
        try:
            return Job(folder, manifest.write(folder, header, sources.expand(given)))
        except FileExistsError:  # another process was quicker
            pass
    if not resume:
        raise FileExistsError(
            f"{folder} holds a job already; go on with it by --resume, or give another folder"
        )
    return open_job(folder, predictor, given=given, unit=unit, batch_size=batch_size)


def open_job(
    folder: str | os.PathLike[str],
    predictor: Predictor,
    *,
    given: Sequence[str] = (),
    unit: int | None = None,
    batch_size: int | None = None,
) -> Job:
    """Open the job in ``folder``.

    Args:
        folder: with a manifest.
        predictor: must have the job's fingerprint.
        given: sources that must mean the manifest's images; none to take these as they are.
        unit: must be the manifest's; None for any.
        batch_size: instead of the manifest's, where results do not depend on it.

    Raises:
        ValueError: the fingerprint, the unit or an image is another; the message says in what.
        OSError: the manifest cannot be read.
    """
    folder = Path(folder)
    listed = Manifest(folder)
    header = listed.header
    size = batch_size or header.batch_size
    with _batch_invariant():
        _compare(header, _fingerprint(predictor, size), folder)
    if unit not in (None, header.unit):
        raise ValueError(f"the job in {folder} has units of {header.unit} images, not {unit}")
    if given and (why := manifest.first_difference(listed, sources.expand(given), os.getcwd())):
        raise ValueError(
            f"the job in {folder} is about other images: {why}; give another folder, or leave "
            "SOURCE out to go on with the images of the manifest"
        )
    return Job(folder, replace(header, batch_size=size), listed, _versions(predictor))


def _versions(predictor: Predictor) -> tuple[int, ...]:
    """Another value when the weights are no longer the same: cheaper than their hash."""
    found = [id(predictor)]
    for t in predictor.model.state_dict(keep_vars=True).values():
        found += [id(t), 0 if t.is_inference() else t._version]
    return tuple(found)


def _fingerprint(predictor: Predictor, batch_size: int) -> dict[str, str]:
    """The predictor's; with the batch size where results depend on it."""
    own = predictor.fingerprint
    return own if predictor.batch_invariant else {**own, "batch_size": str(batch_size)}


def _compare(header: Header, fingerprint: dict[str, str], folder: Path) -> None:
    before = header.fingerprint
    differing = [
        f"{key}: {before.get(key, 'none')} there, {fingerprint.get(key, 'none')} here"
        for key in sorted(before.keys() | fingerprint.keys())
        if before.get(key) != fingerprint.get(key)
    ]
    if differing:
        raise ValueError(
            f"the job in {folder} was begun with something else, and its parts must be alike; "
            f"{'; '.join(differing)}; give another folder, or the same model and options"
        )


_lock = threading.Lock()
_inside = 0
_before = False


@contextmanager
def _batch_invariant() -> Iterator[None]:
    """Results must not depend on where batches begin; costs nothing on own kernels.

    Threads that are inside at the same time share the setting, which is the whole process's.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = dispatch.batch_invariant()
            dispatch.set_batch_invariant(True)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                dispatch.set_batch_invariant(_before)
