# SPDX-License-Identifier: BSD-3-Clause
"""pool_linear through the suite of every op, and what is its own."""

from __future__ import annotations

from harness.suite import Suite


class TestPoolLinear(Suite):
    name = "pool_linear"
