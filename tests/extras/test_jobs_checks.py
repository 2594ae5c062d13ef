# SPDX-License-Identifier: BSD-3-Clause
"""Jobs: wrong arguments, files that contradict themselves, and whose temporary files may go."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from job_cases import photos, predictor  # noqa: E402

from resnet_fused import jobs  # noqa: E402
from resnet_fused.jobs import files, local, manifest, parts  # noqa: E402
from resnet_fused.jobs.manifest import Header, Manifest  # noqa: E402
from resnet_fused.predict.sources import Found  # noqa: E402
from resnet_fused.predict.writer import METADATA  # noqa: E402

MODEL = predictor()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("checks") / "photos", 5)


def test_a_unit_of_more_than_a_million_images(tmp_path: Path) -> None:
    """Breaks if a unit is cut where pyarrow begins another row group by itself, after 1,048,576
    rows: the images behind would be in no unit."""
    unit = 1_048_577
    found = [Found(f"{i}", None) for i in range(unit + 1)]
    header = manifest.write(tmp_path, Header({}, unit, 1, "/"), found)
    listed = Manifest(tmp_path)
    assert (header.units, header.size(0), header.size(1)) == (2, unit, 1)
    assert len(listed.unit(0)) == unit and listed.unit(1) == found[-1:]


def test_the_largest_unit(source: Path, tmp_path: Path) -> None:
    """Breaks if a unit is begun whose names do not fit into memory or a row group."""
    with pytest.raises(ValueError, match="unit must be at most 10,000,000 images .*, got 10,000,0"):
        jobs.plan([str(source)], tmp_path / "out", MODEL, unit=10_000_001)
    assert not (tmp_path / "out").exists()


def test_a_manifest_read_in_several_threads(tmp_path: Path) -> None:
    """Breaks if units that are done at the same time get each other's images, or crash pyarrow."""
    found = [Found(f"{i}") for i in range(600)]
    manifest.write(tmp_path, Header({}, 3, 1, "/"), found)
    listed = Manifest(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        units = list(pool.map(listed.unit, [*range(200)] * 5))
    assert [image for unit in units for image in unit] == found * 5


def test_the_same_names_in_another_place(source: Path, tmp_path: Path) -> None:
    """Breaks if a part is taken for one of other images whose relative names are equal."""
    names = [Found("a.png"), Found("/b.png")]
    ids = []
    for number, (root, found) in enumerate([("/x", names), ("/y", names), ("/y", names[1:])]):
        folder = tmp_path / str(number)
        folder.mkdir()
        ids.append(manifest.write(folder, Header({}, 2, 1, root), found).sha256)
    (tmp_path / "3").mkdir()
    assert len(set(ids)) == 3
    assert manifest.write(tmp_path / "3", Header({}, 2, 1, "/x"), names[1:]).sha256 == ids[2]


def test_weights_that_change_between_units(source: Path, tmp_path: Path) -> None:
    """Breaks if a part is written under the name of weights that it was not made with."""
    own = predictor()
    job = jobs.plan([str(source)], tmp_path / "out", own, unit=2)
    job.do(0, own)
    with torch.no_grad():
        own.model.scale.mul_(2)
    with pytest.raises(ValueError, match="begun with something else.*weights_sha256"):
        job.do(1, own)
    with torch.no_grad():
        own.model.scale.mul_(0.5)
    job.do(1, own)


def test_another_parquet_file_in_a_parts_place(source: Path, tmp_path: Path) -> None:
    """Breaks if a file that is none of ours is a traceback."""
    job = jobs.plan([str(source)], tmp_path / "out", MODEL, unit=2)
    job.path(0).write_bytes((job.folder / manifest.NAME).read_bytes())
    with pytest.raises(ValueError, match="is not of this job; move it away"):
        job.part(0)


@pytest.mark.parametrize("change", [{"images": 6}, {"unit": 1}])
def test_a_manifest_that_contradicts_itself(tmp_path: Path, change: dict[str, int]) -> None:
    """Breaks if units are read that are not those of the header."""
    header = manifest.write(tmp_path, Header({}, 2, 1, "/"), [Found(f"{i}") for i in range(5)])
    path = tmp_path / manifest.NAME
    table = pq.read_table(path)
    about = json.dumps(asdict(replace(header, **change)))
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table, row_group_size=2)
        writer.add_key_value_metadata({METADATA: about})
    with pytest.raises(ValueError, match="it holds 5 images in 3 row groups, where its header has"):
        Manifest(tmp_path)


def test_a_part_that_lacks_rows_is_made_again(source: Path, tmp_path: Path) -> None:
    """Breaks if a part with the right metadata and too few images is taken for complete."""
    job = jobs.plan([str(source)], tmp_path, MODEL, unit=3)
    local.run(job, MODEL)
    whole = job.path(0).read_bytes()
    table = pq.read_table(job.path(0))
    about = pq.read_metadata(job.path(0)).metadata[b"resnet_fused"]
    with pq.ParquetWriter(job.path(0), table.schema) as writer:
        writer.write_table(table.slice(0, 2))
        writer.add_key_value_metadata({"resnet_fused": about.decode()})
    with pytest.raises(parts.Damaged, match="2 rows for 3 images"):
        parts.read(job.path(0), job.header, 0)
    assert list(job.missing()) == [0]
    local.run(job, MODEL)
    assert job.path(0).read_bytes() == whole


def test_whose_temporary_files_go(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a process in a container of the same name, where process ids mean others, loses the
    part it is writing; or if one that is known to be alive does after a day."""
    boot = tmp_path / "boot_id"
    boot.write_text("one")
    monkeypatch.setattr(files, "BOOT", str(boot))
    hosts = {files._host()}
    boot.write_text("two")
    hosts.add(files._host())
    monkeypatch.setattr(files, "PROCESSES", str(tmp_path / "link"))
    (tmp_path / "link").symlink_to("pid:[1]")
    hosts.add(files._host())
    (tmp_path / "link").unlink()
    boot.unlink()
    assert files.TEMPORARY.fullmatch(f".x.{files._host()}.1-ab-0.tmp")
    hosts.add(files._host())
    assert len(hosts) == 4, "each has another host's name"

    folder = tmp_path / "out"
    folder.mkdir()
    here, there = files._host(), (hosts - {files._host()}).pop()
    dead = 2**22 - 1  # beyond the largest process id of most systems
    kept = [f".x.{here}.{os.getppid()}-ab-0.tmp", f".x.{there}.{dead}-ab-0.tmp"]
    gone = [f".x.{here}.{dead}-ab-0.tmp", f".x.{there}.{dead}-ab-1.tmp"]
    for name in (*kept, *gone):
        (folder / name).touch()
    for name in (kept[0], gone[1]):
        os.utime(folder / name, (time.time() - 2 * files.ABANDONED,) * 2)
    files.remove_stale(folder)
    assert sorted(os.listdir(folder)) == sorted(kept)


def test_wrong_arguments(source: Path, tmp_path: Path) -> None:
    """Breaks if a name is taken for a list of its letters, or 0 for "not given"."""
    for given in (str(source), source):
        with pytest.raises(TypeError, match="must be a list of sources, got .* alone; give .'/.*'"):
            jobs.plan(given, tmp_path / "out", MODEL)  # type: ignore[arg-type]
    for name in ("unit", "batch_size"):
        for value in (0, -1):
            with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {value}"):
                jobs.plan([str(source)], tmp_path / "out", MODEL, **{name: value})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_another_spelling_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a resumed job is refused because an image "was X and is now X"."""
    source = photos(tmp_path / "photos", 2)
    monkeypatch.chdir(tmp_path)
    job = jobs.plan(["photos"], tmp_path / "out", MODEL)
    for spelt in (str(source), "./photos"):
        with pytest.raises(ValueError, match="spell the sources as at the beginning") as refused:
            jobs.plan([spelt], tmp_path / "out", MODEL, resume=True)
        text = str(refused.value)
        assert f"is spelt {spelt}/000.png now and was spelt photos/000.png from {tmp_path}" in text
    assert jobs.plan(["photos"], tmp_path / "out", MODEL, resume=True).header == job.header
