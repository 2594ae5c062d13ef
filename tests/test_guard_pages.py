# SPDX-License-Identifier: BSD-3-Clause
"""No op touches a byte outside its arguments: forbidden pages lie right before or behind each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)

RUN_ALL = """
import sys
sys.path.insert(0, {here!r})
import torch
from torch import Tensor
from conftest import _force_path
from harness.case import DTYPES
from harness.guard import guarded
from harness.suite import BF16X3, make, map_tensors
from harness.table import TABLE

count = 0
for path in ("auto", "onednn", "portable", *BF16X3):
    for op in TABLE.values():
        for dtype in DTYPES[:1] if path in BF16X3 else DTYPES:
            for case in op.cases:
                if case.slow:
                    continue
                inputs = make(op, case, dtype)
                with _force_path(path):
                    want = op.call(*inputs[0], **inputs[1])
                    for end in (True, False):
                        args, kwargs = map_tensors(lambda t: guarded(t, end), inputs)
                        print(op.name, case.name, dtype, path, end, file=sys.stderr, flush=True)
                        assert torch.equal(op.call(*args, **kwargs), want)
                        count += 1
print(count)
"""

OVERREAD = """
import sys
sys.path.insert(0, {here!r})
import ctypes, torch
from harness.guard import guarded
t = guarded(torch.ones(5), {end})
ctypes.string_at(t.data_ptr() + ({end} and 20 or -1), 1)
"""


def run(code: str, **values: object) -> subprocess.CompletedProcess[str]:
    program = code.format(here=HERE, **values)
    # Not from the repository root, whose source tree would hide the installed package.
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE)


def test_every_op_stays_inside_its_arguments() -> None:
    """Breaks on a read or write of one byte too many; stderr's last line names the case."""
    result = run(RUN_ALL)
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-1500:]}"
    assert int(result.stdout) > 500


@pytest.mark.parametrize("end", [True, False])
def test_a_byte_too_many_is_fatal(end: bool) -> None:
    """The guard itself works: otherwise the test above proves nothing."""
    assert run(OVERREAD, end=end).returncode == -11
