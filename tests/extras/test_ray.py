# SPDX-License-Identifier: BSD-3-Clause
"""Jobs on Ray: actors and nodes that die, and results equal to a local run's byte for byte."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray")

from resnet_cases import lively  # noqa: E402
from resnet_fused import Predictor, jobs  # noqa: E402
from resnet_fused.cli.main import main  # noqa: E402
from resnet_fused.jobs import ray_engine  # noqa: E402
from resnet_fused.jobs.job import Job  # noqa: E402
from resnet_fused.jobs.local import Progress  # noqa: E402
from resnet_fused.models import resnet18  # noqa: E402
from resnet_fused.predict.pipeline import Tally, TooManyErrors  # noqa: E402
from resnet_fused.predict.preprocess import Preprocessing  # noqa: E402

UNITS = 6
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A node on this machine with room for one actor, and this process connected to it.

    It is connected from a folder where another resnet_fused lies, as users do in a checkout.
    """
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # leave no token in the user's home
        nodes = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        checkout = tmp_path_factory.mktemp("checkout")
        (checkout / "resnet_fused").mkdir()
        (checkout / "resnet_fused/__init__.py").write_text("raise ImportError('not this one')\n")
        with pytest.MonkeyPatch.context() as there:
            there.chdir(checkout)
            with ray_engine.this_package_first():
                ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
            assert Path.cwd() == checkout
        # The actors of these tests are sent by value: no node can import this file.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield nodes
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    torch.manual_seed(0)
    weights = tmp_path_factory.mktemp("weights") / "seven.pth"
    torch.save(lively(resnet18(num_classes=7)).state_dict(), weights)
    return Predictor("resnet18", weights, preprocessing=Preprocessing(resize=40, crop=33))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 images, 4 to a unit, and one file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(22):
        levels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(levels).resize((60, 50 + i)).save(folder / f"{i:02}.jpg")
    (folder / "11.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    photos: Path, predictor: Predictor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What a local run writes."""
    folder = tmp_path_factory.mktemp("local")
    job = jobs.plan([str(photos)], folder, predictor, unit=4)
    assert job.header.units == UNITS
    for unit in job.missing():
        job.do(unit, predictor)
    return contents(folder)


@pytest.fixture
def job(cluster: Any, photos: Path, predictor: Predictor, tmp_path: Path) -> Job:
    return jobs.plan([str(photos)], tmp_path / "out", predictor, unit=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class DiesOnce(ray_engine.Worker):
    """Its process ends in the middle of unit 2, the first time."""

    def do(self, unit: int) -> Tally:
        marker = self._job.folder.parent / "died"
        if unit == 2 and not marker.exists():
            marker.touch()
            os._exit(1)
        return super().do(unit)


def test_an_actor_that_dies(
    job: Job, predictor: Predictor, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit that is lost with its process; a finished job that is done again."""
    monkeypatch.setattr(ray_engine, "Worker", DiesOnce)
    seen: list[int] = []
    done = ray_engine.run(job, predictor, show=lambda now: seen.append(now.images))
    assert (job.folder.parent / "died").exists()
    assert contents(job.folder) == undisturbed
    assert (done.made, done.images, done.failed) == (UNITS, 22, 1)
    assert done.tally.seconds["model"] > 0
    assert len(seen) == UNITS and seen[-1] == 22
    again = ray_engine.run(job, predictor)
    assert (again.made, again.kept, again.images, again.failed) == (0, UNITS, 22, 1)


class DiesAlways(ray_engine.Worker):
    """No process survives unit 2, as with an image that crashes a decoder."""

    def do(self, unit: int) -> Tally:
        if unit == 2:
            with (self._job.folder.parent / "deaths").open("a") as deaths:
                deaths.write("x")
            os._exit(1)
        return super().do(unit)


def test_a_unit_that_kills_every_actor(
    job: Job, predictor: Predictor, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endless job, or one that loses the other units with this one."""
    monkeypatch.setattr(ray_engine, "Worker", DiesAlways)
    with pytest.raises(ChildProcessError, match=r"tried 3 times in vain: unit 2 \(.*--resume"):
        ray_engine.run(job, predictor)
    assert (job.folder.parent / "deaths").read_text() == "xxx"
    assert list(job.missing()) == [2]
    monkeypatch.undo()
    done = ray_engine.run(job, predictor)
    assert (done.made, done.kept, done.tally.images) == (1, 5, 4)
    assert contents(job.folder) == undisturbed


class Waits(ray_engine.Worker):
    """On the node that a test names, it takes a unit and never ends; others wait for that."""

    def do(self, unit: int) -> Tally:
        folder = self._job.folder.parent
        if ray.get_runtime_context().get_node_id() == (folder / "node").read_text():
            (folder / "taken").touch()
            time.sleep(300)
        wait_for(folder / "taken")
        return super().do(unit)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 240  # on a busy machine
    while not path.exists():
        assert time.monotonic() < end, f"no {path.name}"
        time.sleep(0.05)


def test_a_node_that_is_removed(
    cluster: Any,
    job: Job,
    predictor: Predictor,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A unit that is lost with its machine, or waited for without end."""
    node = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    folder = job.folder.parent
    (folder / "node").write_text(node.node_id)

    def remove() -> None:
        wait_for(folder / "taken")
        cluster.remove_node(node)

    monkeypatch.setattr(ray_engine, "Worker", Waits)
    with ThreadPoolExecutor(1) as pool:
        removed = pool.submit(remove)
        ray_engine.run(job, predictor)
        removed.result()
    assert contents(job.folder) == undisturbed


class Other(ray_engine.Worker):
    """A node that computes something else than the job's fingerprint says."""

    def start(self, job: Job, predictor: Predictor, threads: int) -> None:
        super().start(job, predictor, threads)
        self._predictor.labels = [f"class {i}" for i in range(7)]


class Broken(ray_engine.Worker):
    """A node where the model cannot be loaded."""

    def start(self, job: Job, predictor: Predictor, threads: int) -> None:
        raise ImportError("no torch here")


@pytest.mark.parametrize(
    ("worker", "error", "message"),
    [
        (Other, ValueError, "something else.*labels: none there.*here is .*, with .*resnet_fused"),
        (Broken, ChildProcessError, "actors do not start, 3 in a row; .*no torch here"),
    ],
)
def test_what_no_retry_can_mend(
    worker: type,
    error: type[Exception],
    message: str,
    cluster: Any,
    photos: Path,
    predictor: Predictor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts that are not alike, an endless job, or a page of Ray's own words."""
    monkeypatch.setattr(ray_engine, "Worker", worker)
    job = jobs.plan([str(photos)], tmp_path / "out", predictor, unit=100)
    with pytest.raises(error, match=message) as caught:
        ray_engine.run(job, predictor)
    assert not isinstance(caught.value, ray.exceptions.RayError)
    assert list(contents(job.folder)) == ["_manifest.parquet"]


def test_more_errors_than_allowed() -> None:
    """--max-errors counts over all units of this run, and only what failed in it."""
    progress = Progress(kept_failed=7)
    for _ in range(2):
        ray_engine._add(progress, Tally(images=4, failed=1), max_errors=2)
    assert (progress.made, progress.tally.failed, progress.failed) == (2, 2, 9)
    with pytest.raises(TooManyErrors, match="more than 2 images failed"):
        ray_engine._add(progress, Tally(images=4, failed=1), max_errors=2)


def node(cpus: float, gpus: float | None = None) -> dict[str, float]:
    return {"CPU": cpus} if gpus is None else {"CPU": cpus, "GPU": gpus}


@pytest.mark.parametrize(
    ("nodes", "device", "threads", "expected"),
    [
        ([node(4)], "cpu", None, (1, 4, 0)),
        ([node(64), node(64)], "cpu", None, (16, 8, 0)),
        ([node(0), node(4), node(8)], "cpu", None, (3, 4, 0)),  # a head without CPUs of its own
        ([node(4), node(3)], "cpu", 2, (3, 2, 0)),
        ([node(16, 4), node(32)], "cuda", None, (4, 4, 1)),
        ([node(2, 4)], "cuda", None, (2, 1, 1)),  # an actor needs a CPU, too
        ([node(16, 1)], "cpu", None, (2, 8, 0)),
    ],
)
def test_share(
    nodes: list[dict[str, float]], device: str, threads: int | None, expected: tuple[int, int, int]
) -> None:
    """More actors than fit, which would wait for ever, or fewer."""
    assert ray_engine.share(nodes, device, threads) == expected


@pytest.mark.parametrize(
    ("nodes", "device", "threads", "message"),
    [
        ([node(4)], "cuda", None, "a GPU for each actor, but Ray's nodes have 4 CPUs and 0 GPUs"),
        (
            [node(4), node(2)],
            "cpu",
            8,
            "8 CPUs for each actor, but Ray's nodes have 4 CPUs, 2 CPUs",
        ),
        ([], "cpu", None, "CPUs for each actor"),
    ],
)
def test_no_share(
    nodes: list[dict[str, float]], device: str, threads: int | None, message: str
) -> None:
    """A job that waits for a node that there is not."""
    with pytest.raises(ValueError, match=message):
        ray_engine.share(nodes, device, threads)


def test_without_ray(job: Job, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra's name instead of a bare ModuleNotFoundError."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs Ray: pip install 'resnet_fused\[ray\]'"):
        ray_engine.run(job, predictor)


def test_on_the_command_line(
    cluster: Any,
    photos: Path,
    predictor: Predictor,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Options that get lost on the way, and combinations that cannot be meant."""
    weights = tmp_path / "seven.pth"
    torch.save(predictor.model.state_dict(), weights)
    command = ["predict", str(photos), "--weights", str(weights), "--model", "resnet18"]
    command += ["--resize", "40", "--crop", "33", "--engine", "ray"]
    out = tmp_path / "out"
    assert main([*command, "--unit", "4", "--output", f"{out}/"]) == 2
    assert contents(out) == undisturbed
    assert "6 parts made, 0 kept" in capsys.readouterr().err
    for arguments, message in {
        ("--output", str(tmp_path / "a.csv")): "--engine ray needs --output to be a folder",
        ("--output", f"{out}/", "--device", "cuda:0"): "must be cpu or cuda with --engine ray",
        ("--output", f"{out}/", "--resume", "--threads", "9"): "",  # nothing is left to do
        ("--output", f"{tmp_path}/b/", "--threads", "9"): "needs a node with 9 CPUs",
    }.items():
        assert main([*command, *arguments]) == (1 if message else 2)
        assert message in capsys.readouterr().err
