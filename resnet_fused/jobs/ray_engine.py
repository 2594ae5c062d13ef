# SPDX-License-Identifier: BSD-3-Clause
"""The units of a job done by actors of Ray, on one machine or on many.

Ray only hands out units: parts are written by the actors, as by any other process, so that the
folder of results is the same byte for byte, and what is there survives whatever happens to Ray.
Every node must see the images and the folder under the same names, and have the same packages.
"""

from __future__ import annotations

import importlib
import itertools
import os
import platform
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnet_fused.jobs.job import Job
from resnet_fused.jobs.local import Progress
from resnet_fused.predict.pipeline import Tally, TooManyErrors
from resnet_fused.predict.predictor import Predictor

ATTEMPTS = 3  # at one unit; at starting an actor, besides the others of the crew
MOST_LOST = 10  # actors in a row, besides ATTEMPTS for each of the crew
MOST_CPUS = 8  # per actor: beyond, more actors use the CPUs better than more threads
NOTICE_AFTER_S = 30


class Worker:
    """What an actor is: one predictor, which does one unit at a time."""

    def start(self, job: Job, predictor: Predictor, threads: int) -> None:
        """Take over the model; Ray has fetched one copy of it per node."""
        torch.set_num_threads(threads)
        self._job = job
        self._predictor = predictor

    def do(self, unit: int) -> Tally:
        """Classify a unit's images and write its part."""
        tally = Tally()
        try:
            self._job.do(unit, self._predictor, tally=tally)
        except ValueError as error:
            package = Path(__file__).parents[1]
            raise ValueError(f"{error}; here is {platform.node()}, with {package}") from None
        return tally


class Share(NamedTuple):
    """How many actors, and what of the cluster each gets."""

    actors: int
    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.cpus} CPUs" + (" and a GPU" if self.gpus else "")


def share(nodes: list[dict[str, float]], device: str, threads: int | None) -> Share:
    """Divide a cluster into actors.

    Args:
        nodes: the resources of each, under Ray's names "CPU" and "GPU".
        device: "cuda" for one actor per GPU, "cpu" for one per ``threads`` CPUs.
        threads: CPUs per actor; None for all of the smallest node's, at most MOST_CPUS, or its
            GPU's share of them.

    Raises:
        ValueError: no node can hold an actor.
    """
    gpu = device == "cuda"
    sizes = [(int(n.get("CPU", 0)), int(n.get("GPU", 0)) if gpu else 0) for n in nodes]
    usable = [(cpus, gpus) for cpus, gpus in sizes if cpus >= 1 and (gpus >= 1 or not gpu)]
    per_actor = [cpus // gpus if gpu else cpus for cpus, gpus in usable]
    cpus = threads or max(1, min([*per_actor, MOST_CPUS]))
    actors = sum(min(own // cpus, gpus if gpu else own) for own, gpus in usable)
    found = Share(actors, cpus, int(gpu))
    if not actors:
        raise ValueError(
            f"--engine ray needs a node with {found} for each actor, but Ray's nodes have "
            f"{', '.join(f'{c} CPUs and {g} GPUs' if gpu else f'{c} CPUs' for c, g in sizes)}"
        )
    return found


def run(
    job: Job,
    predictor: Predictor,
    *,
    threads: int | None = None,
    max_errors: int | None = None,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Make the missing parts of a job.

    A cluster is found as Ray finds it (``RAY_ADDRESS``, one on this machine); without one, Ray is
    started on this machine and stopped at the end.

    Args:
        job: from ``plan`` or ``open_job``.
        predictor: of the job's fingerprint; is sent to the nodes.
        threads: CPUs per actor; None for what ``share`` chooses.
        max_errors: failed images to accept in this run; None accepts all.
        show: called after every part, made or kept.

    Raises:
        ModuleNotFoundError: Ray is missing.
        ValueError: the cluster has no place for an actor, or a node computes something else than
            the job's fingerprint says.
        TooManyErrors: more than ``max_errors`` images failed; parts that are complete stay.
        OSError: a part cannot be written, a unit was tried ATTEMPTS times in vain, actors do not
            start, or Ray cannot be reached.
    """
    if predictor.device.index not in (None, 0):  # an actor sees one GPU, as number 0
        raise ValueError(
            "device must be cpu or cuda with Ray, which gives out the GPUs itself, got "
            f"{predictor.device}"
        )
    progress = Progress()
    units = _missing(job, progress, show)
    first = next(units, None)
    if first is None:
        return progress
    ray = load()
    try:
        with _connected(ray):
            crew = _Crew(ray, job, predictor, threads, itertools.chain([first], units))
            try:
                for tally in crew.work():
                    _add(progress, tally, max_errors)
                    show(progress)
            finally:
                crew.dismiss()
    except ray.exceptions.RayError as error:
        raise ConnectionError(f"Ray: {_brief(str(error))}") from error
    return progress


def load() -> Any:
    """Ray; it sends no usage statistics unless the user has switched them on.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--engine ray needs Ray: pip install 'resnet_fused[ray]'"
        ) from error


def _missing(job: Job, progress: Progress, show: Callable[[Progress], None]) -> Iterator[int]:
    for unit in range(job.header.units):
        part = job.part(unit)
        if part is None:
            yield unit
        else:
            progress.keep(part)
            show(progress)


def _add(progress: Progress, tally: Tally, max_errors: int | None) -> None:
    whole = progress.tally
    progress.made += 1
    whole.images += tally.images
    whole.failed += tally.failed
    whole.beside = tally.beside
    for stage, seconds in tally.seconds.items():
        whole.seconds[stage] += seconds
    if max_errors is not None and whole.failed > max_errors:
        raise TooManyErrors(f"more than {max_errors} images failed")


@dataclass
class _Crew:
    """The actors and what each is at."""

    ray: Any
    job: Job
    predictor: Predictor
    threads: int | None
    units: Iterator[int]
    at_work: dict[Any, tuple[Any, int | None]] = field(default_factory=dict)  # None: it starts
    idle: list[Any] = field(default_factory=list)
    again: deque[int] = field(default_factory=deque)  # before all others
    attempts: Counter[int | None] = field(default_factory=Counter)
    given_up: dict[int, str] = field(default_factory=dict)
    lost_in_a_row: int = 0

    def __post_init__(self) -> None:
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        self.share = share(nodes, self.predictor.device.type, self.threads)
        options = {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus}
        self.actor = self.ray.remote(Worker).options(**options, scheduling_strategy="SPREAD")
        # Other nodes and processes have a working folder of their own.
        self.sent = self.ray.put(replace(self.job, folder=self.job.folder.absolute()))
        self.model = self.ray.put(self.predictor)
        self.again.extend(itertools.islice(self.units, self.share.actors))
        self.coming = next(self.units, None)
        self.size = len(self.again)

    def work(self) -> Iterator[Tally]:
        """Hand out all missing units; yields each as it is done."""
        for _ in range(self.size):
            self._hire()
        noticed = False
        while self._hand_out():
            ready, _ = self.ray.wait(list(self.at_work), timeout=NOTICE_AFTER_S)
            if not ready and not noticed and all(u is None for _, u in self.at_work.values()):
                noticed = True
                print(f"waiting for a node of Ray to have {self.share} free", file=sys.stderr)
            for ref in ready:
                actor, unit = self.at_work.pop(ref)
                done = self._result(ref, actor, unit)
                if done is not None:
                    yield done
        if self.given_up:
            units = ", ".join(f"{unit} ({why})" for unit, why in sorted(self.given_up.items()))
            raise ChildProcessError(
                f"tried {ATTEMPTS} times in vain: unit {units}; all others are done, and --resume "
                "tries these again"
            )

    def dismiss(self) -> None:
        """End all actors at once; a part that one of them writes will not appear."""
        for actor in [*self.idle, *(actor for actor, _ in self.at_work.values())]:
            self.ray.kill(actor)

    def _hire(self) -> None:
        actor = self.actor.remote()
        ref = actor.start.remote(self.sent, self.model, self.share.cpus)
        self.at_work[ref] = (actor, None)

    def _hand_out(self) -> bool:
        """Give idle actors units; False when there is nothing left to wait for."""
        while self.idle and (unit := self._take()) is not None:
            actor = self.idle.pop()
            self.at_work[actor.do.remote(unit)] = (actor, unit)
        return self._left() or any(unit is not None for _, unit in self.at_work.values())

    def _left(self) -> bool:
        return bool(self.again) or self.coming is not None

    def _take(self) -> int | None:
        if self.again:
            return self.again.popleft()
        unit, self.coming = self.coming, next(self.units, None)
        return unit

    def _result(self, ref: Any, actor: Any, unit: int | None) -> Tally | None:
        """What an actor did; if it died, somebody else gets its unit."""
        errors = self.ray.exceptions
        try:
            done: Tally | None = self.ray.get(ref)
        except errors.RayTaskError as error:  # raised by our code
            if isinstance(error.cause, OSError | ValueError):
                raise error.cause from None
            self._replace(actor, unit, _brief(f"{type(error.cause).__name__}: {error.cause}"))
        except errors.RayError as error:  # the actor, its process or its node is gone
            self._replace(actor, unit, _brief(str(error)))
        else:
            self.attempts.pop(unit, None)
            self.lost_in_a_row = 0 if unit is not None else self.lost_in_a_row
            self.idle.append(actor)
            return done
        return None

    def _replace(self, actor: Any, unit: int | None, why: str) -> None:
        # The idle ones may be of the same dead node, and would cost the unit an attempt.
        for gone in [actor, *self.idle]:
            self.ray.kill(gone)
        self.idle.clear()
        self.attempts[unit] += 1
        self.lost_in_a_row += 1
        if unit is None and self.attempts[unit] == ATTEMPTS + self.size - 1:
            raise ChildProcessError(
                f"Ray's actors do not start, {self.attempts[unit]} in a row; every node needs the "
                f"same versions of torch and resnet_fused: {why}"
            )
        if self.lost_in_a_row == MOST_LOST + ATTEMPTS * self.size:
            raise ChildProcessError(f"{self.lost_in_a_row} actors of Ray died in a row: {why}")
        if unit is not None and self.attempts[unit] < ATTEMPTS:
            self.again.append(unit)
        elif unit is not None:
            self.given_up[unit] = why
        if self._left():
            self._hire()


def _brief(text: str) -> str:
    """The first and the last line, which name the event and its cause."""
    plain = re.sub(r"\x1b\[\d*m", "", text)
    lines = [line.strip() for line in plain.splitlines() if line.strip(" ^~")]
    return " ... ".join(line[:200] for line in dict.fromkeys([*lines[:1], *lines[-1:]]))


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    with this_package_first():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def this_package_first() -> Iterator[None]:
    """Around ``ray.init``, lets the actors import the package that this process runs.

    Ray puts the working folder in front of the actors' import path; in a checkout, sources that
    were never built would then stand for the package that is installed.
    """
    package = Path(__file__).parents[1]
    here = Path.cwd()
    if not (here / package.name).exists() or here == package.parent:
        yield
        return
    os.chdir(package.parent)
    try:
        yield
    finally:
        os.chdir(here)
