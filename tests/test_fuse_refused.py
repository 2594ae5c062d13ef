# SPDX-License-Identifier: BSD-3-Clause
"""fuse() on code that a careless converter gets wrong: the same numbers, or a reason why not."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_zoo
from fuse_zoo import Basic, ConvNorm, conv3, image, randomise
from resnet_fused.fuse import fuse
from resnet_fused.report import Report, report

one_thread = fuse_zoo.one_thread

C = 4


class One(nn.Module):
    """conv, bn and relu, with the forward given; ``extra`` adds or replaces attributes."""

    def __init__(self, run: Callable[..., Any], **extra: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv3(C, C), nn.BatchNorm2d(C), nn.ReLU(inplace=True)
        for name, value in extra.items():
            setattr(self, name, value)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def tensors(y: Any) -> list[Tensor]:
    if isinstance(y, Tensor):
        return [y]
    return [t for v in (y.values() if isinstance(y, dict) else y) for t in tensors(v)]


def check(model: nn.Module, *xs: Tensor) -> Report:
    """Results and effect on the input are the unfused model's in float64; returns the report."""
    randomise(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing in")
        fused = fuse(model)
    for x in xs or (image(c=C),):
        exact_x, fused_x, eager_x = x.double(), x.clone(), x.clone()
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(exact_x)
            eager = model(eager_x)
            got = fused(fused_x)
        assert type(got) is type(eager)
        for want, y in zip(tensors(exact), tensors(got), strict=True):
            bound = 3e-6 * want.abs().max().item()
            torch.testing.assert_close(y.double(), want, rtol=0, atol=bound)
        torch.testing.assert_close(fused_x.double(), exact_x, rtol=0, atol=3e-6 * 8)
        assert [t.stride() for t in tensors(got)] == [t.stride() for t in tensors(eager)]
    return report(fused)


def two_branches(m: One, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.relu(m.bn(y)) + y


def two_norms(m: One, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.bn(y) + m.bn2(y)


def conv_returned_too(m: One, x: Tensor) -> Any:
    y = m.conv(x)
    return y, m.bn(y)


def relu_of_bn_dropped(m: One, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    m.relu(y)  # in place, the result is not used
    return y + 1


def functional_norm(m: One, x: Tensor) -> Tensor:
    bn = m.bn
    return F.relu(F.batch_norm(m.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias))


def straight(m: One, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(x)))


def changed_between(m: One, x: Tensor) -> Tensor:
    y = m.conv(x)
    x.mul_(2)
    return m.bn(y) + x


def into_the_input(m: One, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    x += y
    return F.relu(x)


def inplace_relu_of_input(m: One, x: Tensor) -> Tensor:
    """The shortcut sees the ReLU, because it works in place."""
    out = m.bn(m.conv(m.relu(x)))
    return m.relu(out + x)


def residual_changed(m: One, x: Tensor) -> Tensor:
    out = m.bn(m.conv(x)) + x
    x.zero_()
    return F.relu(out)


def scaled_add(m: One, x: Tensor) -> Tensor:
    return F.relu(torch.add(m.bn(m.conv(x)), x, alpha=0.5))


def twice_itself(m: One, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    return F.relu(y + y)


REFUSED: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "conv read twice (pytorch#104593)": (two_branches, {}, "its output is read 2 times"),
    "conv with two norms": (two_norms, {"bn2": nn.BatchNorm2d(C)}, "its output is read 2 times"),
    "conv returned too": (conv_returned_too, {}, "its output is read 2 times"),
    "functional norm": (functional_norm, {}, "BatchNorm is called as a function"),
    "input changed between": (changed_between, {}, "its input is changed in place"),
    "no statistics": (
        straight,
        {"bn": nn.BatchNorm2d(C, track_running_stats=False)},
        "'bn': BatchNorm without running statistics",
    ),
    "group norm": (straight, {"bn": nn.GroupNorm(2, C)}, "its output goes to GroupNorm"),
    "padding mode": (
        straight,
        {"conv": nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect")},
        "padding_mode is 'reflect', not 'zeros'",
    ),
    "padding in words": (
        straight,
        {"conv": nn.Conv2d(C, C, 3, padding="same")},
        "padding is 'same'",
    ),
    "transposed": (
        straight,
        {"conv": nn.ConvTranspose2d(C, C, 3, 2)},
        "ConvTranspose2d is not fused",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """A convolution is fused although something else needs what fusing does away with."""
    run, extra, reason = REFUSED[name]
    (row,) = check(One(run, **copy.deepcopy(extra)))
    assert not row.fused and row.path == "plain" and reason in row.reason, row


FUSED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "in-place relu whose result is dropped": (relu_of_bn_dropped, {}),
    "addition into the input": (into_the_input, {}),
    "in-place relu of the input": (inplace_relu_of_input, {}),
    "residual changed after the addition": (residual_changed, {}),
    "scaled addition": (scaled_add, {}),
    "added to itself": (twice_itself, {}),
    "relu6": (straight, {"relu": nn.ReLU6(inplace=True)}),
    "silu": (straight, {"relu": nn.SiLU(inplace=True)}),
    "no affine": (straight, {"bn": nn.BatchNorm2d(C, affine=False)}),
    "own eps": (straight, {"bn": nn.BatchNorm2d(C, eps=0.1)}),
    "dilation and groups": (straight, {"conv": nn.Conv2d(C, C, 3, 2, 2, 2, groups=2)}),
    "unused channel": (straight, {"conv": nn.Conv2d(C, 1, (1, 5)), "bn": nn.BatchNorm2d(1)}),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_in_part(name: str) -> None:
    """An in-place operation or unusual activation is swallowed, or changes what it should not."""
    run, extra = FUSED[name]
    (row,) = check(One(run, **copy.deepcopy(extra)))
    assert row.fused and row.pattern == "conv_bn_act", row


def test_conv_called_twice() -> None:
    """A shared convolution is given one BatchNorm for both its calls; nothing is folded into it."""

    def run(m: One, x: Tensor) -> Tensor:
        return m.relu(m.bn(m.conv(x))) + m.bn2(m.conv(x + 1))

    (row,) = check(One(run, bn2=nn.BatchNorm2d(C)))
    assert row.fused


def test_one_call_fused_the_other_not() -> None:
    """The report calls a convolution fused of which one call is not."""

    def run(m: One, x: Tensor) -> Tensor:
        return m.relu(m.bn(m.conv(x))) + m.conv(x + 1)

    (row,) = check(One(run))
    assert (
        not row.fused
        and row.reason == "another call of it: its output goes to add, not to a BatchNorm"
    )


def test_shared_block_and_shared_conv() -> None:
    """A module with two parents or two places gets the plan of one of them."""
    a, b, c = Basic(C, C), Basic(C, C), Basic(C, C)
    b.conv2 = a.conv2
    c.bn1, c.downsample = a.bn2, nn.Sequential(a.conv2, b.bn1)
    rows = check(nn.Sequential(a, b, nn.Sequential(a, c)))
    assert all(r.fused for r in rows) and [r.name for r in rows] == [
        "0.conv1", "0.conv2", "1.conv1", "2.1.conv1", "2.1.conv2",
    ]  # fmt: skip


def test_broadcast_and_promoted_residual() -> None:
    """The op's rule that shapes and dtypes agree turns working code into an error."""

    def run(m: One, x: Tensor) -> Tensor:
        return m.relu(m.bn(m.conv(x)) + m.scale)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv3(1, C), nn.BatchNorm2d(C)
            self.conv2, self.bn2 = conv3(C, C), nn.BatchNorm2d(C)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)

    scale = nn.Parameter(torch.randn(C, 1, 1))
    assert check(One(run, scale=scale))[0].fused
    assert all(r.fused for r in check(Plain(), image(c=1)))
    model = randomise(One(run, scale=scale)).to(torch.bfloat16)
    model.scale.data = model.scale.data.float()
    assert fuse(model)(image(c=C).bfloat16()).dtype == torch.float32

    def promoted(m: One, x: Tensor) -> Tensor:
        return m.relu(m.bn(m.conv(x)) + x.double())

    fused = fuse(randomise(One(promoted)))
    assert report(fused)[0].fused and fused(image(c=C)).dtype == torch.float64


def test_input_shapes_and_types_that_eager_takes() -> None:
    """A call that was not the one traced goes to the plan."""

    def run(m: One, x: Tensor, y: Any = None) -> Tensor:
        h = m.relu(m.bn(m.conv(x)))
        return h if y is None else h + y

    class Two(One):
        def forward(self, x: Tensor, y: Any = None) -> Any:
            return run(self, x, y)

    plain = randomise(Two(run))
    fused = fuse(plain)
    x = image(c=C)
    calls: tuple[Any, ...] = (((x,), {}), ((x, 1), {}), ((), {"x": x}), ((x,), {"y": x}))
    for args, kwargs in calls:
        torch.testing.assert_close(
            fused(*args, **kwargs), plain(*args, **kwargs), rtol=1e-4, atol=1e-5
        )
    with pytest.raises((RuntimeError, ValueError)):
        fused(x[0, 0, 0])


class ReturnsMany(nn.Module):
    """Nested outputs of several kinds."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = ConvNorm(C, 6, 3, 2), ConvNorm(6, C, 3), kind

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        z = self.b(y)
        return {
            "tuple": (y, z),
            "list": [y, (z, x)],
            "dict": {"y": y, "z": [z]},
            "ordered": OrderedDict([("y", y), ("z", z)]),
        }[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "ordered"])
def test_outputs(kind: str) -> None:
    """The kind of container is lost, or a member keeps another memory format."""
    assert all(r.fused for r in check(ReturnsMany(kind)))


UNREADABLE: dict[str, tuple[Callable[..., Any], str]] = {
    "value": (lambda m, x: straight(m, x) if x.sum() > 0 else x, "depends on the values"),
    "shape": (lambda m, x: straight(m, x) if x.shape[2] > 2 else x, "depends on the values"),
    "loop": (lambda m, x: [straight(m, y) for y in x], "loops over a tensor"),
    "type": (lambda m, x: straight(m, x) if isinstance(x, Tensor) else None, "asks for the type"),
    "outside tensor": (lambda m, x: straight(m, x) + torch.ones(1), "no attribute of the module"),
    "random": (lambda m, x: straight(m, x) * torch.rand(1).item(), "differs from call to call"),
    "writes": (lambda m, x: setattr(m, "seen", straight(m, x)) or m.seen, "sets the attribute"),
    "appends": (lambda m, x: m.log.append(1) or straight(m, x), "sets the attribute 'log'"),
    "swallows": (lambda m, x: guarded(m, x), "depends on the values"),
    "no_grad": (lambda m, x: torch.no_grad()(straight)(m, x), "changes the gradient"),
    "autocast": (lambda m, x: torch.autocast("cpu")(straight)(m, x), "changes the gradient"),
    "strides": (
        lambda m, x: (straight(m, x), straight(m, x).stride())[0],
        "memory layout (stride)",
    ),
}


def guarded(m: One, x: Tensor) -> Tensor:
    try:
        return straight(m, x) if x.max() > 0 else x
    except Exception:
        return x


@pytest.mark.filterwarnings("ignore:nothing in")
def test_reading_a_forward_draws_no_random_numbers() -> None:
    """Breaks if fuse() changes torch's random state, and with it whatever the user does next."""
    torch.manual_seed(0)
    want = torch.rand(3)
    model = One(UNREADABLE["random"][0])
    torch.manual_seed(0)
    fuse(model)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.filterwarnings("ignore:nothing in")
@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable(name: str) -> None:
    """A forward that does more than its graph says is replaced by the graph."""
    run, reason = UNREADABLE[name]
    model = randomise(One(run, log=[]))
    fused = fuse(model)
    (row,) = report(fused)
    assert not row.fused and reason in row.reason, row
    assert type(fused) is One and model.log == [] and not hasattr(model, "seen")
