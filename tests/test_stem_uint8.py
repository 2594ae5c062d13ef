# SPDX-License-Identifier: BSD-3-Clause
"""The stem on images of bytes: what they stand for, and the same bits as normalised beforehand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import resnet_fused
from harness.bounds import assert_within
from harness.case import DTYPES, Source
from harness.suite import PATHS, TILES, bits, products, tile_dtype
from harness.table import TABLE
from resnet_fused import ConvBN, InputNorm
from resnet_fused.input_norm import normalise
from resnet_fused.ops.conv_bn import flatten
from resnet_fused.ops.stem import _fits_cuda
from test_guard_pages import run

X = torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
MEANS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
NORM = InputNorm(*MEANS["imagenet"])
# N, C, H, W, filters, window; what each would break.
CASES = (
    (2, 3, 32, 30, 64, 7, "the usual stem"),
    (1, 1, 1, 1, 64, 7, "one pixel: the window is padding but for its middle"),
    (1, 2, 7, 7, 40, 7, "two channels, odd sizes, half a block of filters"),
    (5, 3, 37, 41, 64, 7, "an image left over for two threads"),
    (3, 4, 16, 1, 32, 3, "every channel in use, one pixel wide: torch's AMX bug"),
    (2, 3, 130, 36, 64, 5, "several strips of lines"),
    (1, 20, 9, 10, 16, 3, "more channels than a window's row holds"),
    (2, 3, 19, 18, 64, 9, "a window wider than a k-step"),
    (0, 3, 32, 32, 64, 7, "an empty batch"),
)


def norm_of(c: int) -> InputNorm:
    """Another mean and std for each channel."""
    return InputNorm([0.5 - 0.07 * i for i in range(c)], [0.2 + 0.03 * i for i in range(c)])


def bytes_of(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)


def conv_of(c: int, k: int, window: int, dtype: torch.dtype, **options: Any) -> ConvBN:
    return Source(dtype, **options).conv(c, k, window, stride=(2, 2))


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, force_path: Any) -> Iterator[str]:
    with force_path(request.param):
        yield request.param


@pytest.mark.parametrize("name", MEANS)
def test_within_the_derived_bound_of_the_usual_preset(name: str) -> None:
    """Breaks if a byte stands for anything but (v / 255 - mean) / std within its roundings.

    With a = v / (255 std), t = mean / std, e = a - t and u = 2**-24: scale, product, shift and sum
    are off by u (2 a + t + |e|) at most; the preset's quotient, mean, difference, std and quotient
    by u (a + t + 3 |e|). Terms of second order are below 2**-20 of these.
    """
    mean, std = MEANS[name]
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 3, 1, 256)
    m, s = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    got = normalise(x, InputNorm(mean, std).tensor(X), torch.float32)
    preset = x.float().div(255).sub_(m.float()).div_(s.float())
    a, t, u = x.double() / 255 / s, m / s, 2.0**-24 * (1 + 2.0**-20)
    own, other = 2 * a + t + (a - t).abs(), a + t + 3 * (a - t).abs()
    assert ((got - (a - t)).abs() <= u * own).all()
    assert ((got.double() - preset.double()).abs() <= u * (own + other)).all()
    for dtype in (torch.bfloat16, torch.float16):  # these may fall to the two sides of a middle
        whole = (y.to(dtype).view(torch.int16).int() for y in (got, preset))
        assert (next(whole) - next(whole)).abs().max() <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_as_normalised_beforehand(dtype: torch.dtype, path: str) -> None:
    """Breaks on a wrong border, channel, stride or rounding on any path."""
    for n, c, h, w, k, window, why in CASES:
        conv, norm, x = conv_of(c, k, window, dtype), norm_of(c), bytes_of(n, c, h, w)
        wide = bytes_of(n + 1, c + 2, h + 3, 2 * w)
        wide[1:, 1:-1, 2:-1, ::2] = x
        for view in (
            x,
            x.contiguous(memory_format=torch.channels_last),
            x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),  # NHWC, as decoders give it
            wide[1:, 1:-1, 2:-1, ::2],
        ):
            want = resnet_fused.stem(normalise(view, norm.tensor(x), dtype), conv)
            got = resnet_fused.stem(view, conv, norm)
            assert got.dtype == dtype and torch.equal(bits(got), bits(want)), why


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_bound_of_float64(dtype: torch.dtype, path: str) -> None:
    """Breaks if borders are padded with anything but zero behind the norm: black is -2.1 there."""
    conv = conv_of(3, 64, 7, dtype)
    for x in (bytes_of(2, 3, 21, 18), torch.zeros(1, 3, 9, 9, dtype=torch.uint8)):
        want = TABLE["stem"].exact(dtype, products(path), x, conv, NORM)
        assert_within(resnet_fused.stem(x, conv, NORM), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_integers(dtype: torch.dtype, path: str) -> None:
    """Breaks on a single dropped, repeated or misplaced product: the threshold is 0."""
    norm = InputNorm((0.0,) * 3, (1 / 255,) * 3)
    assert norm.tensor(X).tolist() == [[1.0] * 3, [0.0] * 3]
    conv = conv_of(3, 64, 7, dtype, integer=True)
    x = bytes_of(3, 3, 33, 34) % 4
    want = TABLE["stem"].exact(dtype, products(path), x.to(dtype), conv)
    assert want.peak <= 256
    assert torch.equal(resnet_fused.stem(x, conv, norm).double(), want.value)


def test_product_and_sum_are_rounded_each(path: str) -> None:
    """Breaks if a compiler makes one rounding of the two: the image would not be zero."""
    scale = torch.tensor(1 / 3)
    assert 129 * scale.double() != (129 * scale).double()
    std = 1 / (255 * float(scale))
    norm = InputNorm([float(129 * scale) * std], [std])
    assert norm.tensor(X).tolist() == [[float(scale)], [-float(129 * scale)]]
    x = torch.full((1, 1, 9, 9), 129, dtype=torch.uint8)
    conv = ConvBN(torch.ones(16, 1, 7, 7), stride=(2, 2), padding=(3, 3))
    got = resnet_fused.stem(x, conv, norm)
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_filter_or_a_norm(dtype: torch.dtype, path: str) -> None:
    """Breaks if NaN or infinity, or what overflows, is other than of images normalised before."""
    conv, x = conv_of(3, 64, 7, dtype), bytes_of(2, 3, 20, 23)
    weight = conv.weight.clone()
    weight[37, 2, 6, 6] = float("nan")
    got = resnet_fused.stem(x, conv._replace(weight=weight), NORM)
    others = [k for k in range(64) if k != 37]
    assert got[:, 37].isnan().all() and got[:, others].isfinite().all()
    if path in ("reference", "cuda"):
        return
    for value in (float("nan"), float("inf"), 3e38, 1e30):
        norm = NORM.tensor(X).clone()
        norm[1, 1] = value
        args = (*flatten(conv), "bf16x3" in path)
        want = torch.ops.resnet_fused.stem(normalise(x, norm, dtype), *args)
        got = torch.ops.resnet_fused.stem(x, *args, norm)
        assert torch.equal(got.nan_to_num(5, 6, 7), want.nan_to_num(5, 6, 7)), value


def test_threads_and_batch_do_not_matter(force_path: Any) -> None:
    """Breaks if how lines or images are divided changes a result, bit for bit."""
    threads, x = torch.get_num_threads(), bytes_of(5, 3, 37, 41)
    for name in TILES:
        conv = conv_of(3, 64, 7, tile_dtype(name))
        with force_path(name):
            want = resnet_fused.stem(x, conv, NORM)
            try:
                for count in (1, 3):
                    torch.set_num_threads(count)
                    assert torch.equal(resnet_fused.stem(x, conv, NORM), want), name
            finally:
                torch.set_num_threads(threads)
            alone = torch.cat([resnet_fused.stem(i, conv, NORM) for i in x.split(1)])
            assert torch.equal(alone, want), name


def test_batch_invariance_where_onednn_computes() -> None:
    """Breaks if pieces of a batch are cut from the wrong place where images go one by one."""
    conv, x = conv_of(3, 64, 7, torch.float16), bytes_of(5, 3, 20, 21)
    want = resnet_fused.stem(x, conv, NORM)
    resnet_fused.set_batch_invariant(True)
    try:
        got = resnet_fused.stem(x, conv, NORM)
        alone = torch.cat([resnet_fused.stem(i, conv, NORM) for i in x.split(1)])
    finally:
        resnet_fused.set_batch_invariant(False)
    assert torch.equal(got, alone)
    torch.testing.assert_close(got, want)


GUARDED = """
import sys
sys.path.insert(0, {here!r})
import torch
from conftest import _force_path
from harness.case import DTYPES, Source
from harness.guard import guarded
import resnet_fused
norm = resnet_fused.InputNorm((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
for path in ("auto", "onednn", "portable", "portable bf16x3", "auto bf16x3"):
    for dtype in DTYPES:
        conv = Source(dtype).conv(3, 64, 7, stride=(2, 2))
        for size in ((1, 3, 1, 1), (3, 3, 33, 35)):
            x = torch.randint(0, 256, size, dtype=torch.uint8)
            for form in (torch.contiguous_format, torch.channels_last):
                y = x.contiguous(memory_format=form)
                with _force_path(path):
                    for end in (True, False):
                        got = resnet_fused.stem(guarded(y, end), conv, norm)
                        assert torch.equal(got, resnet_fused.stem(y, conv, norm))
"""


def test_no_byte_too_many() -> None:
    """Breaks if a wide load reads beyond the image, or before it."""
    result = run(GUARDED)
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-1500:]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    """Breaks on a wrong fake kernel, schema or autograd registration."""
    for form in (torch.contiguous_format, torch.channels_last):
        conv = conv_of(3, 16, 7, dtype)
        grad = dtype == torch.bfloat16 and form == torch.channels_last
        tensors = [t.requires_grad_(grad) if isinstance(t, Tensor) else t for t in conv]
        args = (*flatten(ConvBN(*tensors)), False, NORM.tensor(X))
        x = bytes_of(2, 3, 12, 11).contiguous(memory_format=form)
        torch.library.opcheck(torch.ops.resnet_fused.stem.default, (x, *args))


def test_gradients_of_the_parameters() -> None:
    """Breaks if the backward forgets the norm, or asks for a gradient of bytes."""
    x, results = bytes_of(2, 3, 20, 21), []
    for image, norm in ((x, NORM), (normalise(x, NORM.tensor(X), torch.float32), None)):
        conv = conv_of(3, 16, 7, torch.float32)
        leaves = [t.requires_grad_() for t in conv if isinstance(t, Tensor)]
        y = resnet_fused.stem(image, conv, norm)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append([t.grad for t in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(weight: torch.dtype, cast: torch.dtype) -> None:
    """Breaks if bytes are rounded to one dtype on their way to another, or not to autocast's."""
    conv, x = conv_of(3, 16, 7, weight), bytes_of(2, 3, 20, 21)
    floats = torch.float64 if weight == torch.float64 else torch.float32
    with torch.autocast("cpu", cast):
        got = resnet_fused.stem(x, conv, NORM)
        want = resnet_fused.stem(normalise(x, NORM.tensor(X), floats), conv)
    assert got.dtype == want.dtype and torch.equal(got, want)


def test_compiles_and_exports() -> None:
    """Breaks if dynamo cannot see through the call, or the norm is lost on the way."""

    class Stem(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv_of(3, 16, 7, torch.float32)
            self.norm = norm_of(3)  # never used before: its tensor is made under the compiler

        def forward(self, x: Tensor) -> Tensor:
            return resnet_fused.stem(x, self.conv, self.norm)

    x = bytes_of(2, 3, 20, 21)
    want = Stem()(x)
    assert torch.equal(torch.compile(Stem(), fullgraph=True, backend="aot_eager")(x), want)
    assert torch.equal(torch.export.export(Stem(), (x,)).module()(x), want)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_meta_and_fake_tensors_leave_no_trace() -> None:
    """Breaks if a fake norm is kept for real calls, or fake bytes reach a kernel."""
    norm, conv, x = norm_of(3), conv_of(3, 16, 7, torch.bfloat16), bytes_of(2, 3, 20, 21)
    for name in ("cpu", "cuda"):
        with FakeTensorMode():
            fake = [
                torch.empty(t.shape, dtype=t.dtype, device=name) if isinstance(t, Tensor) else t
                for t in conv
            ]
            image = torch.empty(x.shape, dtype=x.dtype, device=name)
            got = resnet_fused.stem(image, ConvBN(*fake), norm)
            assert got.device.type == name and got.dtype == torch.bfloat16
    want = resnet_fused.stem(x, conv, norm)
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in conv]
    assert resnet_fused.stem(x.to("meta"), ConvBN(*meta), norm).shape == want.shape == got.shape
    assert torch.equal(want, resnet_fused.stem(normalise(x, norm.tensor(X), want.dtype), conv))


def test_a_norm_made_in_inference_mode_can_be_trained_with() -> None:
    """Breaks if the tensor of the first call is one that autograd refuses to save."""
    norm, conv, x = norm_of(3), conv_of(3, 16, 7, torch.float32), bytes_of(2, 3, 20, 21)
    with torch.inference_mode():
        resnet_fused.stem(x, conv, norm)
    conv.weight.requires_grad_()
    resnet_fused.stem(x, conv, norm).sum().backward()
    assert conv.weight.grad is not None


def test_an_input_norm_is_a_value() -> None:
    """Breaks if copies or pickles carry tensors along, or equal ones differ."""
    norm = InputNorm([0.5, 0.25], (1, 2))
    norm.tensor(X)
    again = pickle.loads(pickle.dumps(norm))
    assert again == norm == copy.deepcopy(norm) and hash(again) == hash(norm)
    assert again._tensors == {} and repr(norm) == "InputNorm(mean=(0.5, 0.25), std=(1.0, 2.0))"
    assert torch.equal(norm.tensor(X), torch.tensor([[1 / 255, 1 / 510], [-0.5, -0.125]]))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), (0.0,), "std must be above 0, got"),
        ((0.5,), (-1.0,), "std must be above 0, got"),
        ((0.5,), (float("nan"),), "std must be above 0, got"),
        ((0.5, 0.5), (1.0,), "one number per channel each, got 2 and 1"),
        ((), (), "one number per channel each, got 0 and 0"),
        (0.5, (1.0,), "mean must be one number per channel, got 0.5"),
        (("a",), (1.0,), "mean must be one number per channel, got"),
        ((float("inf"),), (1.0,), "must give finite"),
        ((0.5,), (1e-60,), "must give finite"),
        ((124, 117, 104), (58, 57, 57), "must be of values in .* divide mean and std by 255"),
    ],
)
def test_refused_norms(mean: Any, std: Any, message: str) -> None:
    """Breaks if a norm of which no image can come is accepted."""
    with pytest.raises(ValueError, match=message):
        InputNorm(mean, std)


CONV, ERRORS = ConvBN(torch.ones(8, 3, 3, 3)), (ValueError, TypeError, RuntimeError)


@pytest.mark.parametrize(
    ("x", "conv", "norm", "message"),
    [
        (X, CONV, None, "x is uint8, and nothing says how to normalise it: .*set_input_norm"),
        (X, CONV, ((0.5,) * 3, (0.5,) * 3), "norm must be an InputNorm, got tuple"),
        (X.char(), CONV, NORM, "x must have conv.weight's dtype torch.float32, got torch.int8"),
        (X[:, :2], CONV, NORM, "x must have|norm must have shape"),
        (X, CONV, norm_of(2), r"norm must have shape \[2, 3\]|x must have 2 channels"),
        (X[0], CONV, NORM, "4 dimensions"),
        (X.permute(0, 2, 3, 1), CONV, NORM, "channels|norm must have shape"),
        (X, CONV._replace(weight=torch.ones(8, 2, 3, 3)), NORM, "x must have 2 channels"),
        (X[..., :1], CONV, NORM, "x must be large enough"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_refused_calls(x: Tensor, conv: ConvBN, norm: Any, message: str, backend: str) -> None:
    """Breaks if a call that means nothing gives a result, or an error that does not say why."""
    with resnet_fused.backend(backend), pytest.raises(ERRORS, match=message):
        resnet_fused.stem(x, conv, norm)


@pytest.mark.parametrize(
    ("x", "norm", "message"),
    [
        (X, None, "x must be uint8 if norm is given, and only then"),
        (X.float(), torch.ones(2, 3), "x must be uint8 if norm is given, and only then"),
        (X, torch.ones(3, 2), r"norm must have shape \[2, 3\]"),
        (X, torch.ones(2, 3).double(), "norm must be float32"),
    ],
)
def test_refused_by_the_op(x: Tensor, norm: Any, message: str) -> None:
    """Breaks if the op itself reads a norm as what it is not."""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.resnet_fused.stem(x, *flatten(CONV), False, norm)


def test_what_the_cuda_kernel_takes() -> None:
    """Breaks if Python and csrc/kernels/stem.h differ on which stems read bytes on a GPU."""
    usual = conv_of(3, 64, 7, torch.float32)
    assert _fits_cuda(usual) and _fits_cuda(conv_of(4, 128, 7, torch.float32))
    for conv in (
        conv_of(3, 64, 3, torch.float32),
        conv_of(3, 60, 7, torch.float32),
        conv_of(3, 136, 7, torch.float32),
        conv_of(5, 64, 7, torch.float32),
        usual._replace(stride=(1, 1)),
        usual._replace(padding=(2, 3)),
        usual._replace(dilation=(1, 2)),
    ):
        assert not _fits_cuda(conv)
