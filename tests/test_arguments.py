# SPDX-License-Identifier: BSD-3-Clause
"""Wrong arguments are refused by a message that names them, on every path, and never crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import resnet_fused
from resnet_fused import ops
from resnet_fused.ops import ConvBN

HERE = str(Path(__file__).parent)
X = torch.ones(1, 8, 5, 5)
CONV = ConvBN(torch.ones(4, 8, 3, 3), None, *(torch.ones(4) for _ in range(4)), padding=(1, 1))
BARE = ConvBN(CONV.weight, CONV.bias, padding=(1, 1))
ONE = ConvBN(torch.ones(8, 8, 1, 1))
HUGE = 2**62

# What is wrong, the call, and what the message must name.
WRONG: list[tuple[str, Any, str]] = [
    ("x has 3 dimensions", lambda: ops.conv_bn_act(X[0], CONV), "x must have 4 dimensions"),
    ("wrong channels", lambda: ops.conv_bn_act(X[:, :7], CONV), "x must have 8 channels"),
    (
        "x too small",
        lambda: ops.conv_bn_act(X[..., :1], CONV._replace(padding=(1, 0))),
        "x must be large",
    ),
    (
        "x is empty",
        lambda: ops.conv_bn_act(X[:, :, :0], CONV._replace(padding=(0, 1))),
        "x must be large",
    ),
    (
        "integer x",
        lambda: ops.conv_bn_act(X.int(), CONV._replace(weight=CONV.weight.int())),
        "dtype|float",
    ),
    ("complex x", lambda: ops.conv_bn_act(X.to(torch.complex64), CONV), "dtype"),
    ("other dtype", lambda: ops.conv_bn_act(X.bfloat16(), CONV), "x must have conv.weight's dtype"),
    (
        "weight 3-d",
        lambda: ops.conv_bn_act(X, CONV._replace(weight=CONV.weight[0])),
        "weight must have 4",
    ),
    ("stride 0", lambda: ops.conv_bn_act(X, CONV._replace(stride=(0, 1))), "stride >= 1"),
    ("stride -1", lambda: ops.conv_bn_act(X, CONV._replace(stride=(1, -1))), "stride >= 1"),
    ("dilation 0", lambda: ops.conv_bn_act(X, CONV._replace(dilation=(1, 0))), "dilation >= 1"),
    ("padding -1", lambda: ops.conv_bn_act(X, CONV._replace(padding=(-1, 0))), "padding >= 0"),
    ("huge padding", lambda: ops.conv_bn_act(X, CONV._replace(padding=(HUGE, 0))), "padding|large"),
    ("huge stride", lambda: ops.conv_bn_act(X, CONV._replace(stride=(HUGE, HUGE))), "stride"),
    (
        "huge dilation",
        lambda: ops.conv_bn_act(X, CONV._replace(dilation=(HUGE, 1))),
        "dilation|large",
    ),
    ("groups 0", lambda: ops.conv_bn_act(X, CONV._replace(groups=0)), "groups must divide"),
    ("groups 3", lambda: ops.conv_bn_act(X, CONV._replace(groups=3)), "groups must divide"),
    (
        "bias shape",
        lambda: ops.conv_bn_act(X, CONV._replace(bias=torch.ones(5))),
        r"bias must have shape \[4\]",
    ),
    (
        "gamma shape",
        lambda: ops.conv_bn_act(X, CONV._replace(bn_weight=torch.ones(4, 1))),
        "bn_weight must have",
    ),
    (
        "mean shape",
        lambda: ops.conv_bn_act(X, CONV._replace(running_mean=torch.ones(1))),
        "running_mean must have",
    ),
    (
        "mean alone",
        lambda: ops.conv_bn_act(X, CONV._replace(running_var=None)),
        "must be given together",
    ),
    *(
        (
            f"{field} without statistics",
            lambda field=field: ops.conv_bn_act(X, BARE._replace(**{field: torch.ones(4)})),
            f"conv.{field} is a BatchNorm's and needs conv.running_mean",
        )
        for field in ("bn_weight", "bn_bias")
    ),
    (
        "integer var",
        lambda: ops.conv_bn_act(X, CONV._replace(running_var=torch.ones(4).int())),
        "running_var must",
    ),
    (
        "meta weight",
        lambda: ops.conv_bn_act(X, CONV._replace(weight=CONV.weight.to("meta"))),
        "weight must be on",
    ),
    (
        "meta gamma",
        lambda: ops.conv_bn_act(X, CONV._replace(bn_weight=torch.ones(4, device="meta"))),
        "bn_weight must be on",
    ),
    (
        "residual shape",
        lambda: ops.conv_bn_act(X, CONV, residual=X),
        "residual must have the output's shape",
    ),
    (
        "residual dtype",
        lambda: ops.conv_bn_act(X, ONE, residual=X.double()),
        "residual must have x's dtype",
    ),
    ("block cannot add", lambda: ops.basic_block(X, ONE, CONV), "to be added"),
    ("block chain", lambda: ops.basic_block(X, CONV, ONE), "must have 8 channels"),
    (
        "downsample shape",
        lambda: ops.basic_block(X, ONE, ONE, CONV),
        "must have the block's output shape",
    ),
    (
        "bottleneck stride",
        lambda: ops.bottleneck(X, ONE, ONE._replace(stride=(2, 2)), ONE),
        "to be added",
    ),
    ("stem", lambda: ops.stem(X[:, :3], CONV), "x must have 8 channels"),
    ("add shapes", lambda: ops.add_relu(X, X[:, :1]), "y must have x's shape"),
    ("add dtypes", lambda: ops.add_relu(X, X.bfloat16()), "y must have x's"),
    ("add integers", lambda: ops.add_relu(X.int(), X.int()), "x must"),
    ("pool 3-d", lambda: ops.pool_linear(X[0], torch.ones(2, 8)), r"x must be \[N, C, H, W\]"),
    ("pool empty map", lambda: ops.pool_linear(X[..., :0], torch.ones(2, 8)), "at least 1"),
    ("pool weight", lambda: ops.pool_linear(X, torch.ones(2, 7)), "weight must have shape"),
    (
        "pool bias",
        lambda: ops.pool_linear(X, torch.ones(2, 8), torch.ones(3)),
        r"bias must have shape \[2\]",
    ),
]


def outcomes() -> list[list[str]]:
    """For each wrong call: what was wrong, the error's type (or 'accepted') and its message."""
    results = []
    for what, call, _ in WRONG:
        try:
            call()
            results.append([what, "accepted", ""])
        except (ValueError, RuntimeError) as error:
            results.append([what, type(error).__name__, str(error)])
        except Exception as error:
            results.append([what, f"unexpected {type(error).__name__}", str(error)])
    return results


def test_wrong_arguments() -> None:
    """Breaks if a wrong argument crashes, is accepted, or gets a message that does not help.

    In a process of its own, so that a crash is a failure and not the end of the test run.
    """
    import re

    for backend in ("auto", "reference"):
        code = (
            f"import sys; sys.path.insert(0, {HERE!r}); import json, resnet_fused, test_arguments\n"
            f"assert resnet_fused.info()['library']\n"
            f"with resnet_fused.backend({backend!r}): print(json.dumps(test_arguments.outcomes()))"
        )
        # Not from the repository root, whose source tree would hide the installed package.
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
        assert done.returncode == 0, f"{backend}: exit {done.returncode} {done.stderr[-800:]}"
        for (what, kind, message), (_, _, pattern) in zip(
            json.loads(done.stdout), WRONG, strict=True
        ):
            assert kind in ("ValueError", "RuntimeError"), f"{backend}, {what}: {kind} {message}"
            assert re.search(pattern, message), f"{backend}, {what}: {message}"


def test_geometry_beyond_any_network(force_path: Any) -> None:
    """Breaks where huge strides, paddings or dilations make scratch memory explode."""
    x, w = torch.randn(1, 16, 8, 8).bfloat16(), torch.randn(16, 16, 3, 3).bfloat16()
    geometries = (
        {"stride": (2**20, 2**20), "padding": (1, 1)},
        {"stride": (50, 40), "dilation": (45, 33), "padding": (90, 70)},
        {"stride": (33, 1), "padding": (33, 0)},
    )
    for geometry in geometries:
        conv = ConvBN(w, **geometry)
        for path in ("auto", "onednn", "portable"):
            with force_path(path):
                got = ops.conv_bn_act(x, conv, relu=False)
            with resnet_fused.backend("reference"):
                want = ops.conv_bn_act(x, conv, relu=False)
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.1)


def test_right_arguments_are_accepted() -> None:
    """The calls above are wrong in one thing only: without it they work."""
    assert ops.conv_bn_act(X, CONV).shape == (1, 4, 5, 5)
    assert ops.basic_block(X, ONE, ONE).shape == X.shape
    assert ops.bottleneck(X, ONE, ONE, CONV, CONV).shape == (1, 4, 5, 5)
    assert ops.stem(X, CONV).shape == (1, 4, 3, 3)
    assert ops.add_relu(X, X).shape == X.shape
    assert ops.pool_linear(X, torch.ones(2, 8)).shape == (1, 2)


def test_unknown_backend() -> None:
    import pytest

    with pytest.raises(ValueError, match="backend must be one of"), resnet_fused.backend("gpu"):
        pass
