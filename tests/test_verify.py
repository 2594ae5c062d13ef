# SPDX-License-Identifier: BSD-3-Clause
"""fuse(model, verify=x): right models pass, wrong ones are named, and the model stays untouched."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_zoo
from fuse_spy import make
from fuse_zoo import Backbone, Basic, Bottle, Cifar, DataDependent, Net, image, randomise
from resnet_cases import small
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.fusion.units import is_planned
from resnet_fused.modules import Fused
from resnet_fused.report import report
from resnet_fused.verify import VerificationError, verify
from test_verify_defects import DTYPES, seed_defect, set_norms, stale_weights

one_thread = fuse_zoo.one_thread
NETS: dict[str, Callable[[], nn.Module]] = {
    "all patterns": make,
    "functional": lambda: randomise(Cifar()),
    "many outputs": lambda: randomise(Backbone()),
    "written with fused calls": small,
}


# Right models


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_right_models_pass(name: str, dtype: torch.dtype) -> None:
    """A false alarm: a bound that right arithmetic breaks, or a dtype mixed up with the judge's."""
    fused = fuse(NETS[name]().to(dtype), verify=image(2, 24).to(dtype))
    assert any(isinstance(m, Fused) for m in fused.modules())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("gamma", "variance"), [(0.0, 1e-12), (-1.0, 1e5), (1e3, 1e-12), (1e3, 1e5), (-1.0, 1e-12)]
)
def test_extreme_batchnorm_passes(gamma: float, variance: float, dtype: torch.dtype) -> None:
    """A false alarm where activations vanish, grow, or overflow float16."""
    for net in (make, NETS["functional"]):
        fuse(
            set_norms(net(), weight=gamma, running_var=variance).to(dtype), verify=image().to(dtype)
        )


def test_where_eager_is_wrong() -> None:
    """Eager taken as the judge: on AMX its bfloat16 is wrong where an output is one pixel wide."""
    model = randomise(Net(Basic(8, 8), Bottle(8, 32, 16, 2), Basic(16, 16, 2))).bfloat16()
    for seed in range(3):
        fuse(model, verify=image(1, 40, seed)[..., :9].bfloat16())


def test_special_values_pass() -> None:
    """NaN or infinity in the input taken for a defect."""
    for special in (float("nan"), float("inf")):
        x = image(2, 24)
        x[1, 2, 5, 6] = special
        for dtype in (torch.float32, torch.bfloat16):
            fuse(make().to(dtype), verify=x.to(dtype))


def test_every_call_is_verified_and_named() -> None:
    """A fused call that nobody looks at, or a table that names the wrong layers."""
    for model in (make(), small()):
        stages = verify(model, image(2, 24))
        fused = fuse(model)
        want = [row.name for row in report(fused) if row.fused]
        seen = [name for s in stages for name in s.name.split(", ")]
        assert [n for n in seen if n in want] == want and seen[-1] in ("fc", "linear")
        assert all(0 < s.error < s.bound and s.used <= 1 for s in stages)
        assert str(stages).count("\n") == len(stages) - 1 and "layer1.0.conv1" in str(stages)
        assert [s.op for s in verify(fused, image(2, 24))] == [s.op for s in stages]


# The model stays as it is


class Counting(Net):
    """Its forward leaves traces in attributes and buffers, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__(Basic(8, 8), width=8)
        self.calls, self.seen = 0, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x.shape)
        self.count += 1
        return super().forward(x) + 0 * torch.rand(())


def picture(model: nn.Module) -> list[Any]:
    """All that verify must leave alone, tensors by address, version and content."""
    result: list[Any] = [torch.get_rng_state().tolist()]
    for name, m in model.named_modules():
        result += [name, type(m), m.training, list(vars(m)), list(m._forward_hooks)]
        result += [(k, repr(v)) for k, v in vars(m).items() if isinstance(v, (int, list))]
        for k, t in (*m._parameters.items(), *m._buffers.items()):
            if t is None:
                continue
            grad = getattr(t, "grad", None)
            result += [(k, type(t), t.data_ptr(), t._version, t.tolist(), t.requires_grad)]
            result += [None if grad is None else (grad.data_ptr(), grad.tolist())]
    return result


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("mode", ["plain", "fused before", "train mode", "inference mode"])
def test_after_failure_nothing_has_changed(
    mode: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class, flag, buffer, hook, gradient, counter or random number that verify has touched."""
    model = randomise(Counting())
    model(image()).sum().backward()
    seen: list[Any] = []
    model.layer1[0].conv1.register_forward_hook(lambda m, a, y: seen.append(y))
    x = image(2, 24)
    if mode == "fused before":
        fuse(model, inplace=True)
    model.train(mode == "train mode")
    before, x_before = picture(model), x.clone()
    patch = monkeypatch.context()
    with patch as p, torch.inference_mode(mode == "inference mode"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed_defect(p, stale_weights, False)
        with pytest.raises(VerificationError):
            fuse(model, inplace, verify=x)
    assert picture(model) == before and torch.equal(x, x_before) and not seen
    verify(unfuse(model).eval(), x)
    assert picture(model)[0] == before[0] and model.calls == 1 and not seen


def test_after_success_only_classes_have_changed() -> None:
    """verify leaves something behind in the model that it fuses."""
    model, x = randomise(Counting()), image(2, 24)
    model(image()).sum().backward()
    plain = picture(model)
    verify(model, x)
    assert picture(model) == plain
    fused = fuse(model, inplace=True, verify=x)
    assert fused is model and any(is_planned(m) for m in model.modules())
    with_trial = [type(m) for m in fused.modules()]
    assert with_trial == [type(m) for m in fuse(model).modules()]
    # Reading its forward draws a random number, with or without verify.
    assert picture(unfuse(model))[1:] == plain[1:]
    copied = fuse(model, verify=x)
    assert copied is not model and picture(model)[1:] == plain[1:]


def test_contexts() -> None:
    """Inference tensors as parameters, or a comparison spoilt by the caller's modes."""
    x = image(2, 24)
    for context in (
        torch.inference_mode(),
        torch.no_grad(),
        torch.enable_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model = make()
        with context:
            given = x + 0  # an inference tensor in inference mode
            fused = fuse(model, inplace=True, verify=given)
        assert not any(p.is_inference() for p in fused.parameters())
        fused(x).sum().backward()
        assert model.conv1.weight.grad is not None


def test_train_mode_is_said() -> None:
    """Statistics updated by verify, or a user who believes that train mode was verified."""
    model = make().train()
    model.layer1.eval()
    flags = [m.training for m in model.modules()]
    statistics = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="Net is in train mode, .* verified as it will be in eval"):
        fuse(model, inplace=True, verify=image(2, 24))
    assert [m.training for m in model.modules()] == flags
    for name, t in model.state_dict().items():
        assert torch.equal(t, statistics[name]), name
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a new container has its flag set, and means nothing by it
        fuse(nn.Sequential(make().eval()), verify=image(2, 24))


# What is given


@pytest.mark.parametrize(
    ("x", "got"),
    [
        ([torch.ones(1)], "list"),
        ("x", "str"),
        ((), r"\(\)"),
        ((torch.ones(1), 2), r"\(Tensor, int\)"),
        ({"x": torch.ones(1)}, "dict"),
        (True, "bool"),
    ],
)
def test_wrong_type(x: Any, got: str) -> None:
    """A type that fails somewhere inside, or is taken for something else."""
    with pytest.raises(TypeError, match=f"verify must be a tensor or a tuple of tensors.* {got}$"):
        fuse(make(), verify=x)


@pytest.mark.parametrize(
    "x", [torch.ones(1, 4, 24, 24), image().bfloat16(), (image(), image())], ids=str
)
def test_input_that_the_model_does_not_take(x: Any) -> None:
    """The original's error taken for one of fusing."""
    with pytest.raises(ValueError, match="verify must be an input that Net takes; .* raised"):
        fuse(make(), verify=x)


class Float32Inside(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.layer1(self.bn1(self.conv1(x)).float())).flatten(1))


def test_no_float64() -> None:
    """A model that the judge cannot run passes unseen, or its error tells nothing."""
    model = randomise(Float32Inside(Basic(8, 8), width=8))
    with pytest.raises(VerificationError, match="does not run in float64: RuntimeError"):
        fuse(model, verify=image())


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Basic(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x=x) * x.shape[0]


def test_nothing_was_called_fused() -> None:
    """Silence where no fused call was looked at."""
    model = randomise(ByName())
    with pytest.warns(UserWarning, match="no fused call ran in ByName"):
        fuse(model, verify=image())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Basic(3, 3), Basic(3, 3)

    def forward(self, x: Tensor, y: Tensor, scale: Tensor) -> dict[str, Any]:
        x = self.a(x)
        return {"sum": x + self.b(y) * scale, "first": [x, 3], "most": x.argmax()}


def test_several_inputs_and_outputs() -> None:
    """A tuple of arguments or a structure of outputs that is not followed, an integer scaled."""
    model = randomise(TwoInputs())
    stages = verify(model, (image(), image(seed=2), torch.tensor(3)))
    assert [s.op for s in stages] == ["basic_block"] * 2
    fuse(randomise(DataDependent(Basic(8, 8), width=8)), verify=(image(),))


def test_weight_norm_is_left_running() -> None:
    """A hook of torch's own, without which the weight would be old, is taken away."""
    model = make()
    conv = nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    assert conv is model.layer1[0].conv1
    stages = verify(model, image())
    assert not any(re.search(r"layer1\.0\.conv1", s.name) for s in stages)
