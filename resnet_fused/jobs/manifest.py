# SPDX-License-Identifier: BSD-3-Clause
"""The manifest of a job: which images, in which units, predicted by what.

A Parquet file with one row group per unit, so that a unit is read without the others, and nothing
of the size of the job is ever in memory. Its name begins with ``_``, which readers of a folder of
Parquet files leave out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from resnet_fused.jobs import files
from resnet_fused.predict.sources import Found
from resnet_fused.predict.writer import METADATA

NAME = "_manifest.parquet"
FORMAT = "1"
LARGEST_UNIT = 10_000_000  # images; its names are in memory at once
# Names as the bytes they have on disk, because they need not be UTF-8.
SCHEMA = pa.schema([("filename", pa.binary()), ("error", pa.string())])


@dataclass(frozen=True)
class Header:
    """What a job is, but for its images.

    Args:
        fingerprint: what its results depend on, see ``Predictor.fingerprint``.
        unit: images per unit; the last may have fewer.
        batch_size: images per batch.
        root: the folder that relative names start from.
        images: how many there are; an error in a source counts as one.
        sha256: of ``fingerprint``, ``unit`` and the images' names; marks the parts.
        format: version of these files.
    """

    fingerprint: dict[str, str]
    unit: int
    batch_size: int
    root: str
    images: int = 0
    sha256: str = ""
    format: str = FORMAT

    @property
    def units(self) -> int:
        """How many units there are."""
        return -(-self.images // self.unit)

    def size(self, unit: int) -> int:
        """How many images a unit has."""
        return min(self.unit, self.images - unit * self.unit)


def write(folder: Path, header: Header, found: Iterable[Found]) -> Header:
    """Write the manifest image by image; it appears when it is complete.

    Args:
        folder: of the job; exists.
        header: without ``images`` and ``sha256``.
        found: the images.

    Returns:
        The complete header.

    Raises:
        FileExistsError: there is a manifest.
    """
    digest = hashlib.sha256(json.dumps([header.fingerprint, header.unit, FORMAT]).encode())
    images, relative = 0, False
    with (
        files.appearing(folder / NAME, replace=False) as file,
        pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer,
    ):
        for group in groups(found, header.unit):
            names = [os.fsencode(item.path) for item in group]
            errors = [item.error for item in group]
            # Without a size, pyarrow begins another row group after 1,048,576 rows.
            writer.write_table(pa.table([names, errors], schema=SCHEMA), row_group_size=len(group))
            digest.update(repr((names, errors)).encode())
            images += len(group)
            relative = relative or not all(os.path.isabs(item.path) for item in group)
        if relative:  # the same names are other images in another place
            digest.update(os.fsencode(header.root))
        complete = replace(header, images=images, sha256=digest.hexdigest())
        writer.add_key_value_metadata({METADATA: json.dumps(asdict(complete))})
    return complete


def groups(found: Iterable[Found], unit: int) -> Iterator[list[Found]]:
    """Divide images into units."""
    items = iter(found)
    while group := list(itertools.islice(items, unit)):
        yield group


class Manifest:
    """A manifest that exists.

    Raises:
        ValueError: the file is no manifest, or of another version.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / NAME
        try:
            self._file = pq.ParquetFile(path)
            self._reading = threading.Lock()  # the file object crashes in two threads at once
            text = (self._file.schema_arrow.metadata or {}).get(METADATA.encode())
            content = json.loads(text or self._file.metadata.metadata[METADATA.encode()])
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, not {FORMAT}")
            self.header = Header(**content)
            held = (self._file.metadata.num_row_groups, self._file.metadata.num_rows)
            if held != (self.header.units, self.header.images):
                raise ValueError(
                    f"it holds {held[1]:,} images in {held[0]:,} row groups, where its header has "
                    f"{self.header.images:,} in {self.header.units:,} units"
                )
        except (KeyError, TypeError, ValueError) as error:  # pyarrow's are ValueErrors
            raise ValueError(
                f"{path} is no manifest that this version reads ({error}); "
                "give another folder, or move the file away"
            ) from error

    def unit(self, number: int) -> list[Found]:
        """The images of one unit."""
        with self._reading:
            table = self._file.read_row_group(number)
        names, errors = table["filename"].to_pylist(), table["error"].to_pylist()
        return [Found(os.fsdecode(n), e) for n, e in zip(names, errors, strict=True)]

    def images(self) -> Iterator[Found]:
        """All images, one unit in memory at a time."""
        for number in range(self.header.units):
            yield from self.unit(number)


def first_difference(manifest: Manifest, found: Iterable[Found], root: str) -> str | None:
    """Say where images differ from those of a manifest; None if they are the same."""
    header = manifest.header
    for i, (old, new) in enumerate(itertools.zip_longest(manifest.images(), found)):
        if new is None:
            return f"image {i + 1} of the manifest, {old.path}, is no longer among the sources"
        if old is None:
            return f"the sources have more than its {header.images} images, first {new.path}"
        before, now = os.path.join(header.root, old.path), os.path.join(root, new.path)
        if old == new and before == now:
            continue
        if old.error == new.error and os.path.normpath(before) == os.path.normpath(now):
            return (
                f"image {i + 1}, {os.path.normpath(now)}, is spelt {new.path} now and was spelt "
                f"{old.path} from {header.root}, and results carry names as they are spelt; spell "
                "the sources as at the beginning"
            )
        return f"image {i + 1} was {_name(before, old)} and is now {_name(now, new)}"
    return None


def _name(path: str, item: Found) -> str:
    return path if item.error is None else f"{path} ({item.error})"
