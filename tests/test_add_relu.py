# SPDX-License-Identifier: BSD-3-Clause
"""add_relu through the suite of every op, and what is its own."""

from __future__ import annotations

from harness.suite import Suite


class TestAddRelu(Suite):
    name = "add_relu"
