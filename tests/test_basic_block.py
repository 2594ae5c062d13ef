# SPDX-License-Identifier: BSD-3-Clause
"""basic_block through the suite of every op, and what is its own."""

from __future__ import annotations

from harness.suite import Suite


class TestBasicBlock(Suite):
    name = "basic_block"
