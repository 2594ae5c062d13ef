# SPDX-License-Identifier: BSD-3-Clause
"""Kills a job at every place that matters, resumes it and compares bytes; run by test_jobs_killed.

This process only imports and forks, because a fork of one that has used torch's threads may hang.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from job_cases import contents, photos, predictor

from resnet_fused import jobs
from resnet_fused.jobs import local

WATCHED = (  # a kill before any call of these, in the order in which they come
    (os, "fsync"),
    (os, "link"),
    (os, "replace"),
    (os, "unlink"),
    (pq.ParquetWriter, "write_table"),
    (pq.ParquetWriter, "close"),
)


def forked(work: Callable[[], Any]) -> int:
    """Start ``work`` in a child; returns its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as problem:
            print(repr(problem), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def whole_job(source: Path, folder: Path, resume: bool = True) -> None:
    model = predictor()
    job = jobs.plan([str(source)], folder, model, unit=3, batch_size=2, resume=resume)
    local.run(job, model)


def die_before(nth: int) -> None:
    """Let this process be killed at its ``nth`` call of what is watched."""
    calls = 0

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, call)

    for owner, name in WATCHED:
        watch(owner, name)


def main(folder: Path) -> None:
    source = photos(folder / "photos", 8, broken=(1, 4))
    assert ended(forked(lambda: whole_job(source, folder / "quiet", resume=False))) == 0
    expected = contents(folder / "quiet")
    assert sorted(expected) == ["_manifest.parquet", *(f"part-0000{i}.parquet" for i in range(3))]

    def killed(target: Path, nth: int) -> bool:
        def work() -> None:
            die_before(nth)
            whole_job(source, target)

        code = ended(forked(work))
        assert code in (0, -signal.SIGKILL), code
        return code != 0

    places = 0
    left = 0
    while killed(target := folder / f"killed{places}", places + 1):
        left += any(name.endswith(".tmp") for name in os.listdir(target))
        assert ended(forked(lambda target=target: whole_job(source, target))) == 0
        assert contents(target) == expected, f"killed at place {places + 1}"
        places += 1
    assert contents(target) == expected
    assert places > 20 and left > 10, (places, left)

    lives = 0
    while killed(folder / "often", 8):  # far enough for one part, not for two
        lives += 1
    assert lives >= 3 and contents(folder / "often") == expected, lives

    for attempt in range(3):
        target = folder / f"together{attempt}"
        pids = [forked(lambda target=target: whole_job(source, target)) for _ in range(4)]
        assert [ended(pid) for pid in pids] == [0] * 4
        assert contents(target) == expected
    print(f"{places} places, {lives} lives")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
