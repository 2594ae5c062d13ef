# SPDX-License-Identifier: BSD-3-Clause
"""Jobs that are killed, and several processes in one folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

HERE = Path(__file__).parent


def test_killed_anywhere_and_by_several(tmp_path: Path) -> None:
    """Breaks if a SIGKILL at any of the calls that make a manifest or a part visible, or between
    them, leaves something that a resumed job keeps, or if processes that share a folder harm each
    other: in the end every byte must be as in a run that nobody disturbed."""
    command = [sys.executable, str(HERE / "kill_jobs.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=HERE)
    assert done.returncode == 0, done.stdout + done.stderr
