# SPDX-License-Identifier: BSD-3-Clause
"""stem through the suite of every op, and what is its own."""

from __future__ import annotations

from harness.suite import Suite


class TestStem(Suite):
    name = "stem"
