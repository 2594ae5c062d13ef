# SPDX-License-Identifier: BSD-3-Clause
"""Files that appear under their name as a whole or not at all, whatever happens."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]+)\.(?P<pid>\d+)-(?P<life>\w+)-\d+\.tmp")
ABANDONED = 24 * 3600  # seconds after which another machine's temporary file has no owner
BOOT = "/proc/sys/kernel/random/boot_id"  # Linux: other after every start
PROCESSES = "/proc/self/ns/pid"  # Linux: names the container, as far as process ids go

_life = os.urandom(4).hex()  # a restarted container may get its old process id again
_count = itertools.count()


@contextlib.contextmanager
def appearing(path: Path, replace: bool) -> Iterator[BinaryIO]:
    """Open a file that gets its name, durably, when the block ends well, and is removed otherwise.

    Args:
        path: the name; its folder exists.
        replace: take the name even if it exists by then.

    Raises:
        FileExistsError: the name exists, and ``replace`` is False.
        OSError: it cannot be written.
    """
    owner = f"{_host()}.{os.getpid()}-{_life}"
    temporary = path.with_name(f".{path.name}.{owner}-{next(_count)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (os.replace if replace else _take_name)(temporary, path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_stale(folder: Path) -> None:
    """Remove temporary files that nobody will finish: those of dead processes of this machine and
    container, and those of others that are older than a day.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            match = TEMPORARY.fullmatch(entry.name)
            if match is None:
                continue
            with contextlib.suppress(OSError):
                if match["host"] == _host():
                    gone = not _alive(int(match["pid"]), match["life"])
                else:
                    gone = time.time() - entry.stat().st_mtime > ABANDONED
                if gone:
                    os.unlink(entry.path)


def _take_name(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, fails where the name exists
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(str(path)) from None
        os.replace(temporary, path)


def _host() -> str:
    """Name the place where a process id means one process: containers may share a host's name."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError), open(BOOT, "rb") as file:
        digest.update(file.read())
    with contextlib.suppress(OSError):
        digest.update(os.fsencode(os.readlink(PROCESSES)))
    return re.sub(r"[^\w-]", "_", socket.gethostname()) + "-" + digest.hexdigest()[:16]


def _alive(pid: int, life: str) -> bool:
    if pid == os.getpid():
        return life == _life
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power failure, where the system offers that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
