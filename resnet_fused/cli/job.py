# SPDX-License-Identifier: BSD-3-Clause
"""``resnet-fused predict`` with a folder as output: a job that can be resumed and shared."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NamedTuple

import torch
from tqdm import tqdm

from resnet_fused.predict.predictor import Predictor


class Place(NamedTuple):
    """Which of several processes this is, as torchrun and others say in the environment."""

    rank: int = 0
    world: int = 1
    local_rank: int | None = None
    local_world: int = 1

    def device(self, asked: str) -> str:
        """``cuda`` becomes this process's GPU."""
        if asked != "cuda" or self.local_rank is None or not torch.cuda.is_available():
            return asked
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK={self.local_rank} has no GPU of its own, there are "
                f"{torch.cuda.device_count()}; start at most one process per GPU, or name one by "
                "--device cuda:N"
            )
        return f"cuda:{self.local_rank}"

    def threads(self, asked: int | None) -> int | None:
        """This process's share of the cores; torchrun's own default is one, also for decoding."""
        if asked is not None or self.local_world == 1:
            return asked
        cores = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))(0)
        return max(1, len(cores) // self.local_world)


def place() -> Place:
    """Read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``.

    Raises:
        ValueError: they contradict each other or are no numbers.
    """
    world = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0)
    if not 0 <= rank < world:
        raise ValueError(f"RANK must be from 0 to WORLD_SIZE - 1 ({world - 1}), got {rank}")
    local = _number("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else None
    return Place(rank, world, local, max(1, _number("LOCAL_WORLD_SIZE", 1)))


def folder_of(args: argparse.Namespace, where: Place) -> str | None:
    """The folder to put parts into; None if the output is a file or stdout.

    Raises:
        ValueError: options contradict each other.
        ModuleNotFoundError: jobs need pyarrow, which is not installed.
    """
    output = args.output
    if output is not None and (args.resume or output.endswith("/") or os.path.isdir(output)):
        if args.overwrite:
            raise ValueError("--overwrite is for a file; delete the folder yourself, or --resume")
        if os.path.exists(output) and not os.path.isdir(output):
            raise ValueError(f"--resume needs --output to be a folder, but {output} is a file")
        importlib.import_module("resnet_fused.jobs")  # early, for its message
        if args.engine == "ray":
            _check_ray(args, where)
        if where.world > 1 and not args.resume:
            raise ValueError(
                f"with several processes (WORLD_SIZE={where.world}) give --resume, which begins a "
                "job, too: one that finds a manifest cannot tell whether rank 0 has just written it"
            )
        return str(output)
    if args.resume:
        raise ValueError("--resume needs --output FOLDER")
    if args.unit is not None:
        raise ValueError("--unit is for a folder: end --output in /")
    if args.engine == "ray":
        raise ValueError("--engine ray needs --output to be a folder: end it in /")
    if where.world > 1:
        raise ValueError(
            f"with several processes (WORLD_SIZE={where.world}) --output must be a folder: end it "
            "in /"
        )
    return None


def run(args: argparse.Namespace, folder: str, predictor: Predictor, where: Place) -> int:
    """Do this process's share of the job; returns how many images of the whole job failed.

    Rank 0 waits for the others. They return 0, because torchrun ends all processes as soon as one
    reports anything else.
    """
    from resnet_fused.jobs import local, plan  # here, because it needs pyarrow

    options = {"unit": args.unit, "batch_size": args.batch_size}
    if where.rank == 0:
        job = plan(args.sources, folder, predictor, resume=args.resume, **options)
    else:
        job = local.wait_for_job(folder, predictor, given=args.sources, **options)
    quiet = args.quiet or where.rank > 0
    own = range(where.rank, job.header.units, where.world)
    total = sum(map(job.header.size, own))
    bar = tqdm(total=total, unit="img", disable=quiet or not sys.stderr.isatty())
    made = 0

    def show(now: local.Progress) -> None:
        nonlocal made
        made = now.made
        bar.set_postfix(failed=now.failed, refresh=False)
        bar.update(now.images - bar.n)

    try:
        if args.engine == "ray":
            from resnet_fused.jobs import ray_engine

            options = {"threads": args.threads, "max_errors": args.max_errors, "show": show}
            done = ray_engine.run(job, predictor, **options)
        else:
            done = local.run(
                job,
                predictor,
                rank=where.rank,
                world=where.world,
                max_errors=args.max_errors,
                show=show,
            )
    except BaseException:
        bar.close()
        print(
            f"resnet-fused predict: stopped after {made:,} new parts, which are complete; the same "
            "command with --resume goes on",
            file=sys.stderr,
        )
        raise
    bar.close()
    if where.rank > 0:
        return 0
    whole = done if where.world == 1 else local.wait_for_parts(job, done.slowest)
    if not quiet:
        who = "" if where.world == 1 else f"rank 0 of {where.world}: "
        if done.made:
            print(f"{who}{done.tally}", file=sys.stderr)
        print(
            f"{who}{done.made:,} parts made, {done.kept:,} kept\n"
            f"{folder}: {job.header.images:,} images, {whole.failed:,} failed, "
            f"{job.header.units:,} parts",
            file=sys.stderr,
        )
    return whole.failed


def _check_ray(args: argparse.Namespace, where: Place) -> None:
    """Refuse what Ray cannot do, before any work is done."""
    importlib.import_module("resnet_fused.jobs.ray_engine").load()
    if where.world > 1:
        raise ValueError(f"--engine ray starts its own processes; WORLD_SIZE is {where.world}")
    if args.device not in ("cpu", "cuda"):
        raise ValueError(
            f"--device must be cpu or cuda with --engine ray, which gives out the GPUs itself, "
            f"got {args.device}"
        )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} in the environment must be a number, got {text!r}") from None
