# SPDX-License-Identifier: BSD-3-Clause
"""Fused networks against float64: as near as eager, NaN in its place, the same bits each time."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fuse_zoo
from fuse_spy import make
from fuse_zoo import Backbone, Basic, Bottle, Cifar, D2l, HelperBlock, Net, image, randomise
from resnet_cases import small
from resnet_fused.fuse import fuse
from resnet_fused.fusion.units import is_planned

one_thread = fuse_zoo.one_thread
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
NETS: dict[str, Callable[[], nn.Module]] = {
    "all patterns": make,
    "functional": lambda: randomise(Cifar()),
    "bare projections": lambda: randomise(D2l()),
    "native": small,
}
# A rounding of the logits themselves and, in float32, the chance in sums of a few hundred products.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def images(n: int = 8) -> Tensor:
    return image(n, 24)


def error(y: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of the exact result."""
    scale = exact.norm().clamp_min(1e-300)
    return ((y.double() - exact).norm() / scale).item()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def peak(model: nn.Module, x: Tensor) -> float:
    """The largest magnitude that any layer of a float64 model gives."""
    most = [0.0]

    def look(m: nn.Module, args: Any, y: Any) -> None:
        most.append(float(y.abs().max()))

    handles = [m.register_forward_hook(look) for m in model.modules() if not m._modules]
    model(x)
    for handle in handles:
        handle.remove()
    return max(most)


def plain(model: nn.Module) -> nn.Module:
    """A copy whose modules are all called; a native one steps aside for the hooks."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if not m._modules:
            m.register_forward_hook(lambda m, args, y: None)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_at_most_half_as_much_error_again_as_eager(name: str, dtype: torch.dtype) -> None:
    """Breaks where folding loses digits, underflows or overflows with extreme statistics.

    Each combination is put into the first, a middle or the last BatchNorm, since in all of them
    activations would leave every dtype. Where those of a float16 model do so all the same, there is
    nothing to compare; that is at most one in three.
    """
    x, compared, total = images().to(dtype), 0, 0
    for variance in (1e-12, 1.0, 1e5):
        for gamma in (0.0, -1.0, 1.0, 1e3):
            for at in (0, 0.5, -1) if name != "native" else (0.5,):
                model = NETS[name]()
                found = norms(model)
                norm = found[int(at * len(found))]
                norm.running_var.fill_(variance)
                norm.weight.data.fill_(gamma)
                model = model.to(dtype)
                eager, judge = plain(model), plain(model).double()
                with torch.no_grad():
                    exact, theirs, mine = judge(x.double()), eager(x), fuse(model)(x)
                    total += 1
                    if peak(judge, x.double()) > torch.finfo(dtype).max / 8:
                        continue
                compared += 1
                case = f"variance {variance}, gamma {gamma}, norm {at}"
                assert mine.dtype == theirs.dtype == dtype, case
                bound = 1.5 * error(theirs, exact) + FLOOR[dtype]
                assert error(mine, exact) <= bound, (case, error(mine, exact), bound)
    assert compared == total if dtype != torch.float16 else compared >= 2 * total / 3


FEATURES: dict[str, Callable[[], nn.Module]] = {
    "blocks": lambda: nn.Sequential(
        *(Basic(3, 17, 2), Basic(17, 17)), *(Bottle(17, 9, 40), HelperBlock(40, 5, 40))
    ),
    "stages": Backbone,
    "network": lambda: Net(Basic(8, 8), Bottle(8, 4, 16, 2)),
}


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_special_values_as_in_float64(name: str, dtype: torch.dtype, special: float) -> None:
    """Breaks where NaN or infinity is lost, or leaks through padded channels as in eager on AMX.

    3, 9, 17 and 40 channels are no multiple of what a tile takes at a time.
    """
    model = randomise(FEATURES[name]()).to(dtype)
    x = image(2, 33).to(dtype)
    for at in ((0, 0), (16, 20), (32, 35)):
        x[1, 1, at[0], at[1]] = special
        with torch.no_grad():
            want = pytree.tree_leaves(copy.deepcopy(model).double()(x.double()))
            got = pytree.tree_leaves(fuse(model)(x))
        for y, exact in zip(got, want, strict=True):
            assert torch.equal(y.isnan(), exact.isnan())
            assert torch.equal(y.isinf(), exact.isinf())
            assert not exact[0].isnan().any() and not exact[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_the_same_bits_each_time(name: str, dtype: torch.dtype) -> None:
    """Breaks if a result depends on memory that was not written, or on who came first."""
    model, x = fuse(NETS[name]().to(dtype)), images(5).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            first = model(x)
            for size in (1, 3, 5):
                model(images(size).to(dtype))  # other memory, other shapes in between
                del_me = torch.full((size * 4099,), NAN)
                assert torch.equal(model(x), first)
                del del_me
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_eight_threads_share_a_fused_model(name: str, dtype: torch.dtype) -> None:
    """Breaks if threads race for a plan, for packed weights or for scratch memory.

    An unpickled model has neither plans nor packed weights: all eight threads make them.
    """
    model = fuse(NETS[name]().to(dtype))
    inputs = [image(1 + i % 3, 20 + i, seed=i).to(dtype) for i in range(8)]
    with torch.inference_mode():
        want = [model(x) for x in inputs]
    for _ in range(3):
        shared = pickle.loads(pickle.dumps(model)) if name != "native" else copy.deepcopy(model)
        assert name == "native" or any(is_planned(m) for m in shared.modules())

        def forward(x: Tensor, shared: nn.Module = shared) -> list[Tensor]:
            with torch.inference_mode():
                return [shared(x) for _ in range(2)]

        with ThreadPoolExecutor(8) as pool:
            for got, expected in zip(pool.map(forward, inputs), want, strict=True):
                assert all(torch.equal(y, expected) for y in got)
