# SPDX-License-Identifier: BSD-3-Clause
"""Jobs: what is in a part, what is refused, and what they leave alone."""

from __future__ import annotations

import os
import pickle
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from job_cases import PREP, contents, photos, predictor  # noqa: E402

import resnet_fused  # noqa: E402
from resnet_cases import small  # noqa: E402
from resnet_fused import Predictor, dispatch, jobs  # noqa: E402
from resnet_fused.jobs import files, local, manifest  # noqa: E402
from resnet_fused.jobs.job import Job  # noqa: E402
from resnet_fused.predict.pipeline import TooManyErrors  # noqa: E402
from resnet_fused.predict.predictor import DTYPES  # noqa: E402
from resnet_fused.predict.preprocess import Preprocessing  # noqa: E402

MODEL = predictor()


def do(given: Any, folder: Path, model: Predictor = MODEL, **options: Any) -> Job:
    """A whole job."""
    given = [str(given)] if isinstance(given, Path) else given
    job = jobs.plan(given, folder, model, **({"unit": 3, "batch_size": 2} | options))
    local.run(job, model)
    return job


def rows(folder: Path) -> list[dict[str, Any]]:
    parts = sorted(folder.glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("jobs") / "photos", 8, broken=(1, 4))


def test_a_row_for_every_image(source: Path, tmp_path: Path) -> None:
    """Breaks if an image is left out or doubled, a failure shifts the rows behind it, or a job
    gives something else than its Predictor."""
    job = do([str(source), str(tmp_path / "missing"), str(source / "002.png")], tmp_path / "out")
    found = rows(tmp_path / "out")
    paths = [*map(str, sorted(source.iterdir())), str(tmp_path / "missing")]
    paths.append(str(source / "002.png"))
    assert [row["filename"] for row in found] == paths
    assert job.header.images == 10 and job.header.units == 4 and list(job.missing()) == []
    single = MODEL({"path": paths})
    for i, row in enumerate(found):
        good = row["error"] is None
        assert (row["error"] or "") == single["error"][i] and good == (i not in (1, 4, 8))
        assert row["index"] == (single["index"][i].tolist() if good else [])
        assert row["prob"] == (single["prob"][i].tolist() if good else [])
        assert row["label"] == (single["label"][i].tolist() if good else [])
    failed = [job.part(unit).failed for unit in range(4)]
    assert failed == [1, 1, 1, 0]


def test_parts_say_what_they_are(source: Path, tmp_path: Path) -> None:
    """Breaks if a part that was copied elsewhere no longer tells how it was made, or if readers of
    the folder would take the manifest for a part."""
    job = do(source, tmp_path / "out")
    assert all(name.startswith(("part-0", "_")) for name in os.listdir(tmp_path / "out"))
    text = pq.read_metadata(job.path(1)).metadata[b"resnet_fused"].decode()
    assert job.header.fingerprint["weights_sha256"] in text and '"top": "2"' in text
    assert pq.read_schema(job.path(0)).names == ["filename", "index", "label", "prob", "error"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_results_do_not_depend_on_units_and_batches(
    source: Path, tmp_path: Path, dtype: str
) -> None:
    """Breaks if where a batch or a unit begins changes a bit of a ResNet's results."""
    network = small(resnet_fused.Bottleneck).to(DTYPES[dtype])
    model = Predictor(network, preprocessing=Preprocessing(40, 33), dtype=dtype, top=1000)
    assert model.batch_invariant
    tables = []
    for unit, batch_size in ((100, 32), (1, 1), (5, 4)):
        out = tmp_path / f"{unit}"
        do(source, out, model, unit=unit, batch_size=batch_size)
        tables.append(rows(out))
    assert all(table == tables[0] for table in tables[1:])
    assert not dispatch.batch_invariant(), "the setting must be as before"


def test_batch_size_may_change_only_where_nothing_depends_on_it(
    source: Path, tmp_path: Path
) -> None:
    """Breaks if a job on plain PyTorch can be continued with other batches, whose bits may differ,
    or if one on own kernels cannot."""
    assert not MODEL.batch_invariant
    do(source, tmp_path / "plain")
    with pytest.raises(ValueError, match="batch_size: 2 there, 4 here"):
        do(source, tmp_path / "plain", resume=True, batch_size=4)
    do(source, tmp_path / "plain", resume=True, batch_size=None)
    own = Predictor(small(resnet_fused.BasicBlock), preprocessing=PREP)
    jobs.plan([str(source)], tmp_path / "own", own, batch_size=2)
    job = jobs.plan([str(source)], tmp_path / "own", own, batch_size=4, resume=True)
    assert job.header.batch_size == 4


def test_resume_makes_what_is_missing_and_nothing_else(source: Path, tmp_path: Path) -> None:
    """Breaks if complete parts are made again, or a cut one is believed."""
    job = do(source, tmp_path)
    before = contents(tmp_path)
    ages = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    job.path(1).unlink()
    job.path(2).write_bytes(before[job.path(2).name][:-9])
    again = jobs.plan([], tmp_path, MODEL, resume=True)
    assert list(again.missing()) == [1, 2] and list(again.missing(1, 2)) == [1]
    progress = local.run(again, MODEL)
    assert (progress.made, progress.kept) == (2, 1)
    assert (progress.images, progress.failed, progress.tally.images) == (8, 2, 5)
    assert contents(tmp_path) == before
    assert job.path(0).stat().st_mtime_ns == ages[job.path(0).name]
    job.path(0).write_bytes(b"")
    assert list(again.missing()) == [0]


def test_begin_with_resume_and_refuse_without(source: Path, tmp_path: Path) -> None:
    """Breaks if the same command cannot be given from the first time on, or a job is added to
    unasked."""
    do(source, tmp_path / "new" / "folder", resume=True)
    with pytest.raises(FileExistsError, match="holds a job already; go on with it by --resume"):
        do(source, tmp_path / "new" / "folder")
    with pytest.raises(ValueError, match="SOURCE must name at least one"):
        do([], tmp_path / "other", resume=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 1}, "top: 2 there, 1 here"),
        ({"labels": None}, "labels: .* there, none here"),
        ({"preprocessing": Preprocessing(9, 8)}, "preprocessing: resize 8 .* there, resize 9 "),
    ],
)
def test_another_fingerprint_is_refused(
    source: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Breaks if parts of one folder can come from different models or options."""
    job = do(source, tmp_path)
    before = contents(tmp_path)
    job.path(1).unlink()
    other = predictor(**options)
    with pytest.raises(ValueError, match=message):
        do(source, tmp_path, other, resume=True)
    with pytest.raises(ValueError, match=message):
        job.do(1, other)
    assert contents(tmp_path) == {k: v for k, v in before.items() if k != job.path(1).name}


def test_other_weights_and_units_are_refused(source: Path, tmp_path: Path) -> None:
    """Breaks if weights that were trained on are not noticed, or --unit is ignored."""
    do(source, tmp_path)
    with pytest.raises(ValueError, match="has units of 3 images, not 4"):
        do(source, tmp_path, resume=True, unit=4)
    other = predictor()
    with torch.no_grad():
        next(other.model.parameters())[1] = 1.0001
    with pytest.raises(ValueError, match="weights_sha256: .* there, .* here"):
        do(source, tmp_path, other, resume=True)


def test_other_images_are_refused_and_can_be_kept_to(tmp_path: Path) -> None:
    """Breaks if an image that came or went between two runs is passed over in silence, or makes
    the job impossible to finish."""
    source = photos(tmp_path / "photos", 7)
    out = tmp_path / "out"
    job = jobs.plan([str(source)], out, MODEL, unit=3)
    job.do(0, MODEL)
    gone = source / "006.png"
    data = gone.read_bytes()
    gone.unlink()
    with pytest.raises(ValueError, match=r"image 7 of the manifest, .*006.png, is no longer among"):
        do(source, out, resume=True, batch_size=None)
    gone.write_bytes(data)
    (source / "007.png").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"more than its 7 images, first .*007.png; .*leave SOURCE"
    ):
        do(source, out, resume=True, batch_size=None)
    (source / "000a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"image 2 was .*001.png and is now .*000a.png"):
        do(source, out, resume=True, batch_size=None)
    gone.unlink()
    do([], out, resume=True, batch_size=None)
    assert [row["error"] for row in rows(out)] == [None] * 6 + ["No such file or directory"]


def test_relative_names_mean_the_same_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a job resumed from another folder finds no image, or another one of that name."""
    photos(tmp_path / "photos", 4)
    photos(tmp_path / "photos" / "photos", 4)
    monkeypatch.chdir(tmp_path)
    job = jobs.plan(["photos/002.png", "photos/003.png"], tmp_path / "out", MODEL, unit=1)
    monkeypatch.chdir(tmp_path / "photos")
    with pytest.raises(
        ValueError, match=r"image 1 was .*/photos/002.png and is now .*photos/photo"
    ):
        jobs.plan(["photos/002.png"], tmp_path / "out", MODEL, resume=True)
    local.run(job, MODEL)
    found = [(row["filename"], row["error"]) for row in rows(tmp_path / "out")]
    assert found == [("photos/002.png", None), ("photos/003.png", None)]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Breaks if one foreign file name stops a job of millions, or its image is not found."""
    source = photos(tmp_path / "photos", 1)
    os.rename(os.fsencode(source / "000.png"), os.fsencode(source) + b"/caf\xe9.png")
    do(source, tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert row["error"] is None and row["filename"] == f"{source}/caf\\xe9.png"


def test_no_images_at_all(tmp_path: Path) -> None:
    """Breaks if an empty list divides by zero or leaves a job that cannot be opened."""
    (tmp_path / "none.txt").touch()
    job = do([f"@{tmp_path / 'none.txt'}"], tmp_path / "out")
    assert (job.header.images, job.header.units) == (0, 0)
    do([f"@{tmp_path / 'none.txt'}"], tmp_path / "out", resume=True)


def test_foreign_files_are_left_alone(source: Path, tmp_path: Path) -> None:
    """Breaks if a job deletes or replaces what it did not write."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / ".notes.tmp").write_text("mine")
    (out / "part-00000.parquet").write_text("mine")
    with pytest.raises(ValueError, match="part-00000.parquet but no manifest"):
        do(source, out)
    (out / "part-00000.parquet").unlink()
    job = do(source, out)
    other = do(source, tmp_path / "other", predictor(top=1))
    foreign = other.path(1).read_bytes()
    job.path(1).write_bytes(foreign)
    with pytest.raises(ValueError, match="part-00001.parquet is not of this job; move it away"):
        do(source, out, resume=True)
    assert job.path(1).read_bytes() == foreign
    job.path(1).write_bytes(job.path(2).read_bytes())
    with pytest.raises(ValueError, match="part-00001.parquet is not of this job"):
        do(source, out, resume=True)
    assert (out / "notes.txt").read_text() == (out / ".notes.tmp").read_text() == "mine"


def test_a_damaged_manifest_is_told(source: Path, tmp_path: Path) -> None:
    """Breaks if a manifest of another kind gives a traceback or is replaced."""
    do(source, tmp_path)
    path = tmp_path / manifest.NAME
    for damaged in (b"", b"text", path.read_bytes()[:-30], (tmp_path / "part-00000.parquet")):
        path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.read_bytes())
        with pytest.raises(ValueError, match="is no manifest that this version reads"):
            do(source, tmp_path, resume=True)


def test_stale_temporary_files_go_and_live_ones_stay(source: Path, tmp_path: Path) -> None:
    """Breaks if killed processes fill the folder up, or a living one's work is removed."""
    job = do(source, tmp_path)
    with files.appearing(job.path(0), replace=True) as file:
        live = Path(file.name)
        stem = live.name.replace(f".{os.getpid()}-", ".{}-")
        dead = tmp_path / stem.format(2**22 - 1)  # beyond the largest process id of most systems
        earlier = tmp_path / live.name.replace(files._life, "0123abcd")
        elsewhere = tmp_path / live.name.replace(files._host(), "another-machine")
        old = tmp_path / live.name.replace(files._host(), "a-third-one")
        for path in (dead, earlier, elsewhere, old):
            path.touch()
        os.utime(old, (time.time() - 2 * files.ABANDONED,) * 2)
        jobs.plan([], tmp_path, MODEL, resume=True)
        left = {path for path in tmp_path.iterdir() if path.name.startswith(".")}
        file.write(job.path(0).read_bytes())
    assert left == {live, elsewhere}
    assert list(job.missing()) == []


def test_a_full_disk_leaves_only_complete_parts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a write error leaves a half part or a temporary file, or harms what was there."""
    job = jobs.plan([str(source)], tmp_path, MODEL, unit=3)
    job.do(0, MODEL)
    before = contents(tmp_path)

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            job.do(1, MODEL)
    assert contents(tmp_path) == before
    job.do(1, MODEL)


def test_too_many_errors_leave_no_part(source: Path, tmp_path: Path) -> None:
    """Breaks if a stopped unit looks complete, or failures are counted per unit."""
    job = jobs.plan([str(source)], tmp_path, MODEL, unit=3)
    with pytest.raises(TooManyErrors, match="more than 1 images failed, the last .*004.png"):
        local.run(job, MODEL, max_errors=1)
    assert list(job.missing()) == [1, 2]
    assert local.run(job, MODEL, max_errors=1).failed == 2  # one of them in a kept part


def test_a_pickled_job_goes_on_elsewhere(source: Path, tmp_path: Path) -> None:
    """Breaks if an engine cannot send a job to its workers, or sends the model along with it."""
    job = do(source, tmp_path)
    job.path(1).unlink()
    sent = pickle.dumps(job)
    assert len(sent) < 5000
    other = predictor()
    part = pickle.loads(sent).do(1, other)
    assert part == job.part(1) == (job.path(1), 1, 3, 1)


def test_large_units_are_written_in_row_groups(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a unit larger than a row group loses rows at its borders."""
    do(source, tmp_path / "whole", unit=8)
    for size in (1, 3, 4, 8):
        monkeypatch.setattr("resnet_fused.jobs.parts.ROWS", size)
        job = do(source, tmp_path / f"{size}", unit=8)
        assert pq.read_metadata(job.path(0)).num_row_groups == -(-8 // size)
        assert rows(tmp_path / f"{size}") == rows(tmp_path / "whole")


def test_part_names_sort_as_units_do() -> None:
    """Breaks if a reader that sorts by name gets the rows of a large job in another order."""
    job = Job(Path("x"), replace(manifest.Header({}, 1, 1, "/"), images=200_000))
    names = [job.path(unit).name for unit in (0, 99_999, 100_000, 199_999)]
    assert names == sorted(names) and names[-1] == "part-199999.parquet"
    assert Job(Path("x"), replace(job.header, images=3)).path(2).name == "part-00002.parquet"


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Breaks if names (0.1 KB an image) or results (0.7 KB) are kept for longer than a unit.

    Peaks while the manifest is written and while the parts are made; the files are missing, because
    every name costs the same and a failure is the quickest result.
    """
    (tmp_path / "list.txt").write_text("".join(f"/no/such/file/{i:06}.png\n" for i in range(4500)))
    peaks: dict[int, int] = {}

    def show(progress: local.Progress) -> None:
        if progress.tally.images in (1500, 4500):
            peaks[progress.tally.images] = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()

    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        job = jobs.plan([f"@{tmp_path / 'list.txt'}"], tmp_path / "out", MODEL, unit=500)
        planned = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        local.run(job, MODEL, show=show)
    finally:
        tracemalloc.stop()
    assert planned < 800_000
    assert peaks[4500] < peaks[1500] + 300_000
    assert pa.total_allocated_bytes() < before + 1_000_000
