# SPDX-License-Identifier: BSD-3-Clause
"""float32 as bf16x3: when it is allowed, how exact it is, and what it leaves to float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from harness.case import Source
from harness.suite import BF16X3
from resnet_cases import images, small
from resnet_fused import _extension, dispatch, ops

MKLDNN: Any = torch.backends.mkldnn


@pytest.fixture
def settings() -> Iterator[None]:
    """torch's precision settings, put back afterwards."""
    nodes = (torch.backends, MKLDNN, MKLDNN.conv, MKLDNN.matmul)
    before = [node.fp32_precision for node in nodes]
    yield
    for node, value in zip(nodes, before, strict=True):
        node.fp32_precision = value


def _set(node: Any, value: str) -> Callable[[], None]:
    return lambda: setattr(node, "fp32_precision", value)


CHANGES: tuple[tuple[Callable[[], None], bool], ...] = (
    (lambda: None, False),
    (lambda: torch.set_float32_matmul_precision("high"), True),
    (lambda: torch.set_float32_matmul_precision("highest"), False),
    (lambda: torch.set_float32_matmul_precision("medium"), True),
    (_set(MKLDNN.conv, "ieee"), False),  # what is said of convolutions counts more
    (_set(MKLDNN.conv, "tf32"), True),
    (lambda: torch.set_float32_matmul_precision("highest"), True),
    (_set(MKLDNN.conv, "none"), False),
    (_set(MKLDNN, "bf16"), True),
    (_set(MKLDNN, "none"), False),
    (_set(torch.backends, "tf32"), True),
    (_set(torch.backends, "ieee"), False),
)


@pytest.mark.parametrize("amx", [False, True])
def test_only_where_the_settings_and_the_cpu_allow_it(
    amx: bool, settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if anyone gets less than float32 who has not asked for it."""
    monkeypatch.setattr(_extension, "_amx", amx)
    for i, (change, allowed) in enumerate(CHANGES):
        change()
        assert dispatch.bf16x3() == (allowed and amx), i
        path = dispatch.choose("cpu", torch.float32)
        strict = "avx512" if _extension.avx512() else "onednn"
        assert path.name == ("amx" if allowed and amx else strict), i
        assert ("bf16x3" in path.reason) == (allowed and amx), i
        assert dispatch.choose("cuda", torch.float32).name != "amx"
        assert resnet_fused.info()["cpu_bf16x3"] == (allowed and amx)


def test_the_default_is_float32() -> None:
    """Breaks if plain use takes the fast way."""
    assert not dispatch.bf16x3()


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("path", BF16X3)
def test_a_network_keeps_five_digits(path: str, force_path: Any) -> None:
    """Breaks if a part of a product, or of a sum, is lost: bf16 alone is 100 times as far off."""
    size = 224 if path.startswith("auto") else 40
    model, x = resnet_fused.resnet50().eval(), images(1, 3, size, size)
    with torch.inference_mode():
        with resnet_fused.backend("reference"):
            exact = model.double()(x.double())
        model.float()
        strict = model(x)
        with force_path(path):
            got = model(x)
    assert relative_error(strict, exact) < 2e-6
    assert relative_error(got, exact) < 1e-5
    assert not torch.equal(got, strict), "it was not computed as bf16x3"


@pytest.mark.parametrize("path", BF16X3)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38])
@pytest.mark.parametrize("inner", [0, 1])
def test_an_image_that_does_not_split_is_left_to_float32(
    value: float, inner: int, path: str, force_path: Any
) -> None:
    """Breaks if infinity becomes NaN, bf16's overflow shows, or an image changes with another in
    its batch. 3.4e38 is finite in float32 and rounds to infinity in bfloat16.
    """
    s = Source(torch.float32)
    block = s.conv(64, 32), s.conv(32, 32, 3), s.conv(32, 64)
    stem = s.conv(3, 32, 7, stride=(2, 2))
    calls: tuple[tuple[Callable[[Tensor], Tensor], Tensor], ...] = (
        (lambda x: ops.conv_bn_act(x, block[0], relu=False), s.image(5, 64, 7, 6)),
        (lambda x: ops.bottleneck(x, *block), s.image(5, 64, 7, 6)),
        (lambda x: ops.stem(x, stem), s.image(5, 3, 20, 21)),
    )
    for call, x in calls:
        x[3, 1, 2 + inner, 3] = value
        x[3, 0, 2 + inner, 3] = 1e-3 if inner else value
        with force_path(path.replace("bf16x3", "float32")):
            strict = call(x[3:4])
        with force_path(path):
            got = call(x)
            alone = torch.cat([call(image) for image in x.split(1)])
        assert torch.equal(got.nan_to_num(7.0), alone.nan_to_num(7.0))
        assert torch.equal(got.isnan(), alone.isnan())
        torch.testing.assert_close(got[3:4], strict, rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(got[:3], call(x[:3])), "the others must stay on tiles"


@pytest.mark.parametrize("path", BF16X3)
def test_compiled_and_exported_code_keeps_it(path: str, force_path: Any) -> None:
    """Breaks if the setting breaks the graph, or is looked up again where it no longer holds."""
    model, x = small(resnet_fused.BasicBlock), images(2, 3, 32, 32)
    with torch.no_grad():
        strict = model(x)
        with force_path(path):
            want = model(x)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), want)
            exported = torch.export.export(model, (x,)).module()
            assert torch.equal(exported(x), want)
        if path.startswith("auto"):
            assert torch.equal(exported(x), want)
        assert not torch.equal(want, strict)


@pytest.mark.parametrize("path", BF16X3)
def test_gradients_are_float32s(path: str, force_path: Any) -> None:
    """Breaks if the setting reaches the backward, or its argument upsets autograd."""
    s = Source(torch.float32)
    x, conv = s.image(2, 32, 6, 6).requires_grad_(), s.conv(32, 32, 3)
    with force_path(path):
        (got,) = torch.autograd.grad(ops.conv_bn_act(x, conv, relu=False).sum(), x)
    (want,) = torch.autograd.grad(ops.conv_bn_act(x, conv, relu=False).sum(), x)
    assert torch.equal(got, want)


@pytest.mark.parametrize("path", BF16X3)
def test_verify_knows_it(path: str, force_path: Any) -> None:
    """Breaks if proof against float64 takes the user's own setting for a defect."""
    model, x = small(resnet_fused.Bottleneck), images(2, 3, 32, 32)
    with force_path(path):
        stages = resnet_fused.verify(model, x)
    assert {s.path for s in stages} >= {"amx"}
    assert max(s.used for s in stages) <= 1
