# SPDX-License-Identifier: BSD-3-Clause
"""`resnet-fused check` and `info`: right ops pass, seeded wrong ones fail, whatever the mistake."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_fused
from resnet_fused import ops
from resnet_fused.bench import expected, op_cases, subjects
from resnet_fused.cli import check
from resnet_fused.cli.main import main
from resnet_fused.input_norm import InputNorm
from resnet_fused.ops import ConvBN

Op = Callable[..., Tensor]


@pytest.mark.parametrize("op", op_cases.NAMES)
def test_every_op_passes_with_one_line_per_dtype(
    op: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if an op is wrong here, or a bound is tighter than honest rounding."""
    assert main(["check", "--op", op]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if op in line]
    assert [line.split()[:3] for line in lines] == [["ok", op, d] for d in subjects.DTYPES]
    assert all("error" in line and "bound" in line for line in lines)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_bounds_hold_for_other_random_numbers(dtype: str, seed: int) -> None:
    """Breaks if the bounds are fitted to one seed."""
    lines = [check.check_op(op, dtype, "cpu", seed) for op in op_cases.NAMES]
    assert [str(line) for line in lines if not line.ok] == []


def _drop_last_channel(right: Op) -> Op:
    def wrong(x: Tensor, conv: ConvBN, **kwargs: Any) -> Tensor:
        weight = conv.weight.clone()
        weight[:, -1] = 0
        return right(x, conv._replace(weight=weight), **kwargs)

    return wrong


def _forget_eps(right: Op) -> Op:
    return lambda x, conv, **kwargs: right(x, conv._replace(eps=0.1), **kwargs)


def _relu_always(right: Op) -> Op:
    return lambda x, conv, residual=None, relu=True: right(x, conv, residual=residual)


def _residual_after_relu(right: Op) -> Op:
    def wrong(x: Tensor, conv: ConvBN, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        y = right(x, conv, relu=relu)
        return y if residual is None else y + residual

    return wrong


def _swallow_nan(right: Op) -> Op:
    return lambda x, conv, **kwargs: right(x, conv, **kwargs).fill_(math.nan)


def _one_pixel(right: Op) -> Op:
    def wrong(x: Tensor, conv: ConvBN, **kwargs: Any) -> Tensor:
        y = right(x, conv, **kwargs).clone()
        y[-1, -1, -1, -1] += 0.2
        return y

    return wrong


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "mistake",
    [_drop_last_channel, _forget_eps, _relu_always, _residual_after_relu, _swallow_nan, _one_pixel],
)
def test_a_wrong_convolution_is_caught(
    mistake: Callable[[Op], Op],
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Breaks if the bound is loose enough for a real mistake, or the exit code hides it."""
    monkeypatch.setattr(ops, "conv_bn_act", mistake(ops.conv_bn_act))
    assert main(["check", "--op", "conv_bn_act", "--dtype", dtype]) == 1
    out = capsys.readouterr().out
    assert "FAIL  conv_bn_act" in out and "0 ok, 1 failed" in out


@pytest.mark.parametrize("op", [name for name in op_cases.NAMES if name != "conv_bn_act"])
def test_every_other_op_is_judged_too(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a case compares an op with itself: its results are 10 % too large here."""
    right = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    assert not check.check_op(op, "bf16", "cpu").ok


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mistake", ["no mean", "a grey level too many", "its border normalised"])
def test_bytes_are_judged(mistake: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a stem may read bytes wrongly: floating inputs are right in all of these."""
    right = ops.stem

    def wrong(x: Tensor, conv: ConvBN, norm: InputNorm | None = None) -> Tensor:
        if norm is None:
            return right(x, conv)
        if mistake == "no mean":
            return right(x, conv, InputNorm((0, 0, 0), norm.std))
        if mistake == "a grey level too many":
            return right(x.clamp(max=254) + 1, conv, norm)
        return right(F.pad(x, (3, 3, 3, 3)), conv._replace(padding=(0, 0)), norm)

    monkeypatch.setattr(ops, "stem", wrong)
    line = check.check_op("stem", dtype, "cpu")
    assert not line.ok and "bytes" in str(line)


def test_an_op_that_raises_is_a_failure_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if an exception ends the check instead of failing one line."""

    def broken(*args: Any) -> Tensor:
        raise RuntimeError("unknown instruction\nbacktrace")

    monkeypatch.setattr(ops, "stem", broken)
    line = check.check_op("stem", "fp32", "cpu")
    assert not line.ok and "RuntimeError: unknown instruction" in str(line)
    assert "backtrace" not in str(line)


def test_a_model_passes_and_names_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if a model's bound is tighter than its rounding, or a filter runs everything."""
    assert main(["check", "--model", "resnet18"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["ok", "resnet18", "fp32"],
        ["ok", "resnet18", "bf16"],
    ]
    assert lines[3:] == ["2 ok, 0 failed"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_on_a_wrong_op_fails(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the expected result runs through the op it judges."""
    right = ops.basic_block
    monkeypatch.setattr(ops, "basic_block", lambda x, *convs: right(x, *convs) * 1.1)
    model = subjects.make_model("resnet18")
    assert not check.check_model(model, "resnet18", dtype, "cpu").ok


def test_the_plain_model_calls_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the eager contender or the float64 expectation uses this package's ops."""
    model = subjects.make_model("resnet50", seed=4)
    net, x = subjects.plain(model), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        fused = model(x)
        for op in op_cases.NAMES:
            monkeypatch.setattr(ops, op, lambda *a, op=op, **k: pytest.fail(f"{op} was called"))
        eager = net(x)
    torch.testing.assert_close(eager, fused, rtol=1e-3, atol=1e-3)
    assert list(net.state_dict()) == list(model.state_dict())


def test_models_are_the_seeds_and_leave_the_generator_alone() -> None:
    """Breaks if two runs compare different weights, or making one changes the caller's numbers."""
    before = torch.random.get_rng_state()
    one, two, other = (subjects.make_model("resnet18", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key
    assert not torch.equal(one.fc.weight, other.fc.weight)
    assert not one.training and one.bn1.momentum == 0.1


def test_models_are_tame_at_depth() -> None:
    """Breaks if activations vanish or explode, which no trained network's do."""
    model = subjects.make_model("resnet101")
    with torch.inference_mode():
        features = model.forward_features(torch.randn(4, 3, 64, 64))
    assert 0.1 < features.std() < 10
    assert 0.05 < (features > 0).float().mean() < 0.95


def test_a_broken_eager_excuses_nothing() -> None:
    """Breaks if the bound grows with eager's error without end: eager bfloat16 can be garbage."""
    net = subjects.plain(subjects.make_model("resnet18"))
    fine = subjects.error_bound(0.01, net, torch.bfloat16)
    assert fine == pytest.approx(1.5 * 0.01 + 2**-8)
    broken = subjects.error_bound(math.inf, net, torch.bfloat16)
    assert fine < broken < 0.06


def test_errors_that_are_no_number_are_infinite() -> None:
    """Breaks if NaN compares as small, or a result of the wrong shape is broadcast."""
    right = torch.tensor([[1.0, -4.0]], dtype=torch.float64)
    assert subjects.relative_error(torch.tensor([[1.0, -4.2]]), right) == pytest.approx(0.05)
    assert subjects.relative_error(torch.tensor([[1.0, math.nan]]), right) == math.inf
    assert subjects.relative_error(torch.tensor([1.0, -4.0]), right) == math.inf
    known = subjects.Expectation((0, 1), right.repeat(2, 1))
    assert known.error(torch.zeros(1, 2)) == math.inf
    assert not check.Line("x", "fp32", math.nan, 1.0, "cpu").ok


def test_the_last_image_of_a_batch_is_compared_too() -> None:
    """Breaks if only the first image counts: kernels go wrong at the end of a batch."""
    net = subjects.plain(subjects.make_model("resnet18"))
    x = torch.randn(5, 3, 64, 64)
    known = subjects.expect(net, x)
    with torch.inference_mode():
        y = net(x).clone()
        assert known.error(y) < 1e-5
        y[-1, 0] += 1
        assert known.error(y) > 0.1


def test_gmacs_are_those_of_the_literature() -> None:
    """Breaks if operations are counted instead of multiply-accumulates."""
    assert subjects.gmacs("resnet50", 224) == pytest.approx(4.089, abs=0.001)
    assert subjects.gmacs("resnet18", 224) == pytest.approx(1.814, abs=0.001)


def test_expected_values_are_those_of_the_modules() -> None:
    """Breaks if the float64 formula of BatchNorm, residual or pooling is not PyTorch's own."""
    torch.manual_seed(3)
    conv = torch.nn.Conv2d(8, 12, 3, 2, 1, groups=2).double()
    bn = torch.nn.BatchNorm2d(12, eps=1e-3).double()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    torch.nn.init.normal_(bn.weight)
    torch.nn.init.normal_(bn.bias)
    x, residual = torch.randn(2, 8, 7, 9).double(), torch.randn(2, 12, 4, 5).double()
    u = expected.roundings(torch.float64, "cpu")
    got = expected.conv_bn_act(
        x, resnet_fused.modules.conv_bn(conv, bn), u=u, residual=residual, relu=False
    )
    torch.testing.assert_close(got.value, copy.deepcopy(bn).eval()(conv(x)) + residual)
    assert bool((got.variance > 0).all())


def test_info_prints_every_fact_and_json_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if a fact is left out of the readable form, or the JSON does not parse."""
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == str(torch.__version__) and facts["torch"] in text
    for name in facts:
        assert any(line.split()[:1] == [name] for line in text.splitlines()), name
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_check_refuses_a_device_that_is_not_there(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a missing device is a traceback."""
    assert main(["check", "--device", device]) == 1
    assert "--device" in capsys.readouterr().err
