# SPDX-License-Identifier: BSD-3-Clause
"""conv_bn_act through the suite of every op, and what is its own."""

from __future__ import annotations

from harness.suite import Suite


class TestConvBnAct(Suite):
    name = "conv_bn_act"
