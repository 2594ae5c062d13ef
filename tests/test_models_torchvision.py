# SPDX-License-Identifier: BSD-3-Clause
"""Side by side with torchvision itself, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_cases import DEPTHS, WIDE, images, lively, relative, watch
from resnet_fused import models
from resnet_fused.models import categories
from resnet_fused.models.weights import resolve

torchvision = pytest.importorskip("torchvision")

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("resnet18", {"num_classes": 10}),
    ("resnet50", {"replace_stride_with_dilation": [False, True, True], "num_classes": 21}),
    ("resnext50_32x4d", {"zero_init_residual": True}),
    ("wide_resnet50_2", {}),
]


def theirs(name: str, **kwargs: Any) -> Any:
    return getattr(torchvision.models, name)(**kwargs)


@pytest.mark.parametrize("name", DEPTHS + WIDE)
def test_modules_and_attributes_are_equal(name: str) -> None:
    """A module with another name, order or setting: repr shows every one."""
    with torch.device("meta"):
        a, b = getattr(models, name)(), theirs(name)
    assert repr(a) == repr(b)
    for (m, x), (n, y) in zip(a.named_modules(), b.named_modules(), strict=True):
        assert m == n
        # repr leaves out what equals its default
        simple = [v for v in vars(y) if not v.startswith("_") and v != "forward"]
        for key in simple:
            assert getattr(x, key) == getattr(y, key) or key in ("downsample",), (m, key)


@pytest.mark.parametrize(("name", "kwargs"), FAMILIES)
def test_same_seed_same_weights_and_training_forward(name: str, kwargs: dict[str, Any]) -> None:
    """Random draws in another order, or a plain forward that differs in its last bit."""
    torch.manual_seed(11)
    a = getattr(models, name)(**kwargs)
    torch.manual_seed(11)
    b = theirs(name, **kwargs)
    for (m, s), (n, t) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert m == n and torch.equal(s, t)
    x = images(2, 3, 64, 64)
    assert torch.equal(a.train()(x), b.train()(x))


@pytest.mark.parametrize(("name", "kwargs"), FAMILIES)
def test_weights_go_both_ways_and_eval_agrees(name: str, kwargs: dict[str, Any]) -> None:
    """A state_dict that does not load into, or from, torchvision's network."""
    a, b = lively(getattr(models, name)(**kwargs)), theirs(name, **kwargs).eval()
    b.load_state_dict(a.state_dict())
    c = getattr(models, name)(**kwargs).eval()
    c.load_state_dict(b.state_dict())
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert relative(c(x), b(x)) < 1e-4


def test_feature_extractors_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detection and segmentation read features through these two tools."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.feature_extraction import create_feature_extractor

    a = lively(models.resnet50())
    b = theirs("resnet50").eval()
    b.load_state_dict(a.state_dict())
    x = images(1, 3, 64, 64)
    stages = {"layer1": "a", "layer4": "b"}
    calls = watch(monkeypatch)
    with torch.no_grad():
        for make in (IntermediateLayerGetter, create_feature_extractor):
            ours, want = make(a, stages)(x), make(b, stages)(x)
            for key in ("a", "b"):
                assert relative(ours[key], want[key]) < 1e-4
    assert calls == ["bottleneck"] * 16  # the first tool runs modules, the second traces them
    nodes = create_feature_extractor(a, ["layer2.0.bn3"])(x)
    assert nodes["layer2.0.bn3"].shape == (1, 512, 8, 8)


def test_frozen_batch_norm_fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own FrozenBatchNorm2d, as its detection models use it."""
    from torchvision.ops import FrozenBatchNorm2d

    a = lively(models.resnet18(norm_layer=FrozenBatchNorm2d))
    b = theirs("resnet18", norm_layer=FrozenBatchNorm2d).eval()
    b.load_state_dict(a.state_dict())
    x = images(1, 3, 64, 64)
    calls = watch(monkeypatch)
    assert relative(a(x), b(x)) < 1e-4
    assert len(calls) == 10


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's download cache, so that nothing is downloaded."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    "weights",
    [
        "DEFAULT",
        "IMAGENET1K_V1",
        "ResNet18_Weights.IMAGENET1K_V1",
        torchvision.models.ResNet18_Weights.DEFAULT,
    ],
    ids=str,
)
def test_names_and_enums_load_torchvisions_file(weights: Any, cache: Path) -> None:
    """A name that resolves to other weights, or a class count that does not follow from them."""
    state = lively(models.resnet18(), seed=4).state_dict()
    torch.save(state, cache / "resnet18-f37072fd.pth")
    model = models.resnet18(weights=weights)
    for (name, a), b in zip(model.state_dict().items(), state.values(), strict=True):
        assert torch.equal(a, b), name
    names = categories(weights, "resnet18")
    assert names is not None and len(names) == 1000 and names[0] == "tench"
    with pytest.raises(ValueError, match="num_classes must be 1000 .* got 10"):
        models.resnet18(weights=weights, num_classes=10)


def test_every_builder_finds_its_own_enum() -> None:
    """A builder whose name is not the one torchvision files its weights under."""
    for name in DEPTHS + WIDE:
        enum = torchvision.models.get_model_weights(name)
        assert resolve("DEFAULT", name) is enum.DEFAULT
        assert resolve(str(enum.DEFAULT), name) is enum.DEFAULT
        assert categories(str(enum.DEFAULT)) == categories(enum.DEFAULT)


def test_a_file_in_the_cache_cannot_run_code(cache: Path) -> None:
    """torchvision's loader unpickles anything, and checks the hash of downloads only."""
    torch.save({"conv1.weight": torch.ones(1), "x": Runs(cache)}, cache / "resnet18-f37072fd.pth")
    with pytest.raises(Exception, match="(?i)weights.only|unsupported"):
        models.resnet18(weights="DEFAULT")
    assert not (cache / "ran").exists()


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.folder / "ran",)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ("IMAGENET1K_V7", ValueError, "resnet18's .IMAGENET1K_V1, DEFAULT., got 'IMAGENET1K_V7'"),
        ("ResNet50_Weights.DEFAULT", ValueError, "one of resnet18's"),
        (torchvision.models.ResNet50_Weights.DEFAULT, TypeError, "must be of ResNet18_Weights"),
    ],
    ids=str,
)
def test_weights_of_another_model_are_refused_before_any_download(
    weights: Any, error: type[Exception], message: str, cache: Path
) -> None:
    """A hundred megabytes fetched for nothing."""
    with pytest.raises(error, match=message):
        models.resnet18(weights=weights)
    assert not list(cache.iterdir())
