# SPDX-License-Identifier: BSD-3-Clause
"""Several processes on one job, as torchrun starts them."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pyarrow")

from job_cases import contents, photos, predictor  # noqa: E402

from resnet_fused import jobs  # noqa: E402
from resnet_fused.cli.job import Place, place  # noqa: E402
from resnet_fused.cli.main import main  # noqa: E402
from resnet_fused.jobs import local  # noqa: E402

HERE = Path(__file__).parent
SMALL = ["--model", "resnet18", "--weights", "random", "--resize", "8", "--crop", "8"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("ranks") / "photos", 7)


def test_torchrun(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the module cannot be started by torchrun, a rank works on another's units, or the
    result differs from one process's."""
    monkeypatch.chdir(HERE)  # which the manifest notes
    options = [str(source), *SMALL, "--unit", "2", "--output"]
    assert main(["predict", *options, f"{tmp_path}/one/", "--quiet"]) == 0
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "resnet_fused", "predict", *options, f"{tmp_path}/two/", "--resume"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, cwd=HERE
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert "rank 0 of 2: 4 images, 0 failed" in done.stderr
    assert "rank 0 of 2: 2 parts made, 0 kept" in done.stderr
    assert f"{tmp_path}/two/: 7 images, 0 failed, 4 parts" in done.stderr
    assert done.stderr.count("preprocessing:") == 1


@pytest.mark.parametrize(("images", "world"), [(3, 2), (0, 2), (1, 4), (7, 3), (2, 3)])
def test_uneven_work(source: Path, tmp_path: Path, images: int, world: int) -> None:
    """Breaks if the last images are done twice or by nobody where ranks do not divide them."""
    (tmp_path / "list.txt").write_text("".join(f"{source}/00{i}.png\n" for i in range(images)))
    given = [f"@{tmp_path / 'list.txt'}"]
    out = tmp_path / "out"
    models = [predictor() for _ in range(world)]
    first = jobs.plan(given, out, models[0], unit=1)
    made: list[int] = []
    for rank in reversed(range(world)):
        job = first if rank == 0 else local.wait_for_job(out, models[rank])
        assert all(unit % world == rank for unit in job.missing(rank, world))
        made.append(local.run(job, models[rank], rank=rank, world=world).made)
    assert sum(made) == images and max(made) - min(made) <= 1
    whole = local.wait_for_parts(first, 0)
    assert (whole.kept, whole.images, whole.failed) == (images, images, 0)
    alone = jobs.plan(given, tmp_path / "alone", models[0], unit=1)
    local.run(alone, models[0])
    assert contents(out) == contents(tmp_path / "alone")


def test_ranks_wait_for_the_manifest_and_for_each_other(source: Path, tmp_path: Path) -> None:
    """Breaks if a rank that comes first fails, or rank 0 ends before the others are done."""
    models = [predictor(), predictor()]
    done: list[Any] = []

    def rank_1() -> None:
        job = local.wait_for_job(tmp_path, models[1])
        done.append(local.run(job, models[1], rank=1, world=2))

    thread = threading.Thread(target=rank_1)
    thread.start()
    job = jobs.plan([str(source)], tmp_path, models[0], unit=2)
    local.run(job, models[0], rank=0, world=2)
    assert local.wait_for_parts(job, 0).images == 7
    thread.join(timeout=60)
    assert done[0].made == 2 and list(job.missing()) == []


def test_waiting_ends_with_a_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a dead rank makes the others wait for ever, or without saying for what."""
    monkeypatch.setattr(local, "PATIENCE", 0.05)
    model = predictor()
    with pytest.raises(TimeoutError, match="no manifest in .*; rank 0 writes it"):
        local.wait_for_job(tmp_path, model)
    job = jobs.plan([str(source)], tmp_path, model, unit=2)
    local.run(job, model, rank=0, world=2)
    with pytest.raises(
        TimeoutError, match="part-00001.parquet did not come .*, nor any other; .* --resume"
    ):
        local.wait_for_parts(job, 0)


def test_waiting_goes_on_while_parts_appear(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if rank 0 gives up on a part while others still make theirs."""
    model = predictor()
    job = jobs.plan([str(source)], tmp_path, model, unit=1)
    now, order = [0.0], [1, 2, 6, 3, 5, 4, 0]  # the first that rank 0 looks for comes last

    def sleep(seconds: float) -> None:
        now[0] += 0.4 * local.PATIENCE
        if now[0] > local.PATIENCE * (8 - len(order)) and order:
            job.do(order.pop(0), model)

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", sleep)
    assert local.wait_for_parts(job, 0).images == 7
    assert now[0] > 6 * local.PATIENCE


def test_another_rank_with_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    """Breaks if machines with other versions or kernels mix their results."""
    jobs.plan([str(source)], tmp_path, predictor(), unit=2)
    with pytest.raises(ValueError, match="top: 2 there, 1 here"):
        local.wait_for_job(tmp_path, predictor(top=1))


def test_every_rank_checks_that_the_job_is_its_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Breaks if ranks other than 0 work on an old job that they were not told to go on with, or on
    one with other units or images than the command says."""
    out = tmp_path / "out"
    assert main(["predict", f"{source}/000.png", *SMALL, "--output", f"{out}/", "--quiet"]) == 0
    (out / "part-00000.parquet").unlink()
    before = contents(out)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    start = ["predict", *SMALL, "--output", f"{out}/"]
    for more, message in (
        ([f"{source}/000.png"], "(WORLD_SIZE=2) give --resume"),
        ([f"{source}/000.png", "--resume", "--unit", "2"], "has units of 1000 images, not 2"),
        ([str(source), "--resume"], "rank 1: the job in .* is about other images: the sources"),
        ([f"{source}/001.png", "--resume"], "image 1 was .*000.png and is now .*001.png"),
    ):
        assert main([*start, *more]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error or re.search(message, error), error
        assert contents(out) == before
    for more in ([f"{source}/000.png", "--resume"], ["-", "--resume"], ["--resume"]):
        assert main([*start, *more]) == 0
    assert contents(out) == before


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((), Place(0, 1, None, 1)),
        (("1", "2"), Place(1, 2, None, 1)),
        (("5", "8", "1", "4"), Place(5, 8, 1, 4)),
        (("2", "2"), "RANK must be from 0 to WORLD_SIZE - 1 .1., got 2"),
        (("-1", "2"), "got -1"),
        (("a", "2"), "RANK in the environment must be a number, got 'a'"),
    ],
)
def test_environment(values: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a wrong environment makes two processes believe that they are the same."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(NAMES, values, strict=False):
        monkeypatch.setenv(name, value)
    if isinstance(expected, Place):
        assert place() == expected
    else:
        with pytest.raises(ValueError, match=expected):
            place()


def test_each_process_has_its_gpu_and_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if all ranks use the first GPU, or decode with the one thread that torchrun sets."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(13)), raising=False)
    where = Place(3, 4, 1, 4)
    assert (where.device("cuda"), where.device("cuda:0"), where.device("cpu")) == (
        "cuda:1",
        "cuda:0",
        "cpu",
    )
    assert (where.threads(None), where.threads(5), Place(1, 2).threads(None)) == (3, 5, None)
    with pytest.raises(ValueError, match="LOCAL_RANK=2 has no GPU of its own, there are 2"):
        Place(2, 4, 2, 4).device("cuda")


def test_several_processes_cannot_write_one_file(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if two ranks both classify everything and write over each other."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["predict", str(source), *SMALL, "--output", "preds.csv"]) == 1
    assert "(WORLD_SIZE=2) --output must be a folder" in capsys.readouterr().err
