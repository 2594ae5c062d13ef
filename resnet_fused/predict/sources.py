# SPDX-License-Identifier: BSD-3-Clause
"""Which files a list of sources means: files, folders, globs, ``@list.txt`` and ``-``."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# What a folder is searched for; a file that is named itself is tried whatever its ending.
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".gif",
    ".webp",
    ".avif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".jp2",
)


class Found(NamedTuple):
    """A file to classify, or a source that gave none and why."""

    path: str
    error: str | None = None


def check(sources: Sequence[str]) -> None:
    """Refuse what is a mistake in the command, before any work is done.

    Raises:
        ValueError: no source, a list file that does not exist, or stdin named twice.
    """
    if not sources:
        raise ValueError("SOURCE must name at least one file, folder, glob, @list.txt or -")
    if list(sources).count("-") > 1:
        raise ValueError("SOURCE '-' (stdin) must be given at most once")
    if "-" in sources and sys.stdin is None:
        raise ValueError("SOURCE '-' is stdin, which is closed; give files, folders or @list.txt")
    for source in sources:
        path = source.removeprefix("@")
        if source != path and (os.path.isdir(path) or not os.path.exists(path)):
            raise ValueError(
                f"SOURCE {source!r} must be @ and a text file with one path per line, but there "
                f"is no file {path!r}; write ./{source} for a file whose name begins with @"
            )


def expand(sources: Sequence[str]) -> Iterator[Found]:
    """Find the files one by one, in the order of the sources and by name within each.

    A folder is searched through all its subfolders, links followed, for files with one of SUFFIXES;
    names that begin with a dot are left out. A line of a list or of stdin is a file or folder.

    Args:
        sources: as given on the command line, checked with ``check``.

    Returns:
        Files in order. A glob, folder or path that gives nothing yields one item with ``error``.
    """
    for source in sources:
        if source == "-":
            yield from _lines(sys.stdin)
        elif source.startswith("@"):
            # surrogateescape: a name that is not UTF-8 still names its file.
            with open(
                source[1:], encoding="utf-8-sig", errors="surrogateescape", newline="\n"
            ) as lines:
                yield from _lines(lines)
        elif glob.has_magic(source) and not os.path.lexists(source):
            matches = sorted(glob.iglob(source, recursive=True))
            folders = {os.path.normpath(match) for match in matches if os.path.isdir(match)}
            for match in matches:
                if not _inside(match, folders):
                    yield from _path(match)
            if not matches:
                yield Found(source, "no file matches this pattern")
        else:
            yield from _path(source)


def count(sources: Sequence[str]) -> int | None:
    """How many items ``expand`` will yield; None with stdin or a pipe, which are read only once."""
    once = any(s == "-" or (s[:1] == "@" and not os.path.isfile(s[1:])) for s in sources)
    return None if once else sum(1 for _ in expand(sources))


def _inside(path: str, folders: set[str]) -> bool:
    """Whether one of the folders, which are searched as a whole, holds the path (as of `**`)."""
    path = os.path.normpath(path)
    while path not in (os.curdir, parent := os.path.dirname(path) or os.curdir):
        if parent in folders:
            return True
        path = parent
    return False


def _lines(lines: Iterator[str]) -> Iterator[Found]:
    for line in lines:
        path = line.removesuffix("\n").removesuffix("\r")
        if path:
            yield from _path(path)


def _path(path: str) -> Iterator[Found]:
    if not os.path.isdir(path):
        yield Found(path)
        return
    empty = True
    for found in _walk(path, frozenset()):
        empty = False
        yield found
    if empty:
        yield Found(path, f"no image in this folder (looked for {' '.join(SUFFIXES)})")


def _walk(folder: str, above: frozenset[str]) -> Iterator[Found]:
    """Search ``folder``; ``above`` holds the real paths of its parents, so that link loops end."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        yield Found(folder, error.strerror or str(error))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            folder_too = entry.is_dir()
        except OSError as error:  # a link to itself, or to where nobody may look
            yield Found(entry.path, error.strerror or str(error))
            continue
        if folder_too:
            yield from _walk(entry.path, above | {real})
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            odd = os.path.exists(entry.path) and not entry.is_file()
            yield Found(entry.path, "is no regular file" if odd else None)
