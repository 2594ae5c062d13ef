# SPDX-License-Identifier: BSD-3-Clause
"""``weights=``: every kind of file and object loads strictly, and no file can run code."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from resnet_cases import images, lively
from resnet_fused import models
from resnet_fused.models import categories

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """A trained-looking resnet18 of seven classes."""
    torch.manual_seed(2)
    return lively(models.resnet18(num_classes=7), seed=3).state_dict()


def assert_loaded(model: nn.Module, state: State) -> None:
    for (name, a), (other, b) in zip(model.state_dict().items(), state.items(), strict=True):
        assert name == other and torch.equal(a, b), name


FORMS = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "arch": "resnet18", "state_dict": s, "best": 71.5},
    "model": lambda s: {"model": s, "optimizer": {"lr": 0.1, "steps": [1, 2]}},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "DataParallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled in DataParallel": lambda s: {
        "state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}
    },
    "DataParallel compiled": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "parameters": lambda s: {
        k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()
    },
    "no counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("form", FORMS)
def test_files_by_torch_save(form: str, state: State, tmp_path: Path) -> None:
    """The ways training scripts save; the class count follows from the file."""
    path = tmp_path / ("weights.pth.tar" if form == "state_dict" else "weights")
    torch.save(FORMS[form](state), path)
    for weights in (path, str(path)):
        model = models.resnet18(weights=weights)
        assert model.fc.out_features == 7
        assert_loaded(model, state)
    assert categories(path) is None and categories(str(path)) is None


def test_safetensors_and_channels_last_weights(state: State, tmp_path: Path) -> None:
    """A .safetensors file, and weights whose strides are not the default ones."""
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "a.safetensors")
    assert_loaded(models.resnet18(weights=tmp_path / "a.safetensors"), state)
    model = models.resnet18(num_classes=7).to(memory_format=torch.channels_last)
    model.load_state_dict(state)
    torch.save(model.state_dict(), tmp_path / "b.pt")
    assert_loaded(models.resnet18(weights=tmp_path / "b.pt"), state)


def test_half_precision_files_load_into_float32(state: State, tmp_path: Path) -> None:
    """A file saved in bf16 to save space: the network stays float32 and runs."""
    small = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(small, tmp_path / "a.pth")
    model = models.resnet18(weights=tmp_path / "a.pth").eval()
    assert model.fc.weight.dtype == torch.float32
    assert model(images(1, 3, 32, 32)).isfinite().all()


def test_a_class_count_that_contradicts_the_file_is_refused(state: State, tmp_path: Path) -> None:
    """num_classes=10 with a file of 7 classes must not end in a shape error, or a random head."""
    torch.save(state, tmp_path / "a.pth")
    assert models.resnet18(weights=tmp_path / "a.pth", num_classes=7).fc.out_features == 7
    with pytest.raises(ValueError, match="num_classes must be 7 .* got 10"):
        models.resnet18(weights=tmp_path / "a.pth", num_classes=10)


def test_what_does_not_fit_is_listed_briefly(state: State, tmp_path: Path) -> None:
    """A random layer left behind in silence, or an error of a thousand keys."""
    wrong = {k: v for k, v in state.items() if not k.startswith("layer4")}
    wrong["conv1.weight"] = torch.ones(64, 1, 7, 7)
    wrong["head.scale"] = torch.ones(3)
    torch.save(wrong, tmp_path / "a.pth")
    with pytest.raises(RuntimeError) as caught:
        models.resnet18(weights=tmp_path / "a.pth")
    text = str(caught.value)
    missing = sum(k.startswith("layer4") for k in state) - sum(
        k.startswith("layer4") and "num_batches" in k for k in state
    )
    assert "a.pth do not fit this ResNet" in text
    assert f"{missing} missing: layer4.0.conv1.weight, layer4.0.bn1.weight" in text
    assert f"and {missing - 5} more" in text
    assert "1 unexpected: head.scale" in text
    assert "1 of another shape: conv1.weight [64, 1, 7, 7] instead of [64, 3, 7, 7]" in text
    assert len(text) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"head.scale": torch.ones(3)}, "1 unexpected: head.scale"),
        (lambda s: s | {"bn1.bias": torch.ones(3)}, "1 of another shape: bn1.bias .3. instead"),
        (lambda s: {k: v for k, v in s.items() if k != "bn1.bias"}, "1 missing: bn1.bias"),
        (
            lambda s: {f"module.{k}" if "fc" in k else k: v for k, v in s.items()},
            "2 missing: fc.weight, fc.bias\n  2 unexpected: module.fc.weight",
        ),
    ],
    ids=["unexpected", "shape", "missing", "some prefixed"],
)
def test_one_wrong_key_is_enough(change: Any, message: str, state: State, tmp_path: Path) -> None:
    """Loading is strict in each of its three ways, and only a prefix of every key is removed."""
    torch.save(change(state), tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match=message):
        models.resnet18(weights=tmp_path / "a.pth", num_classes=7)


def test_weights_of_another_depth_are_refused(state: State, tmp_path: Path) -> None:
    """resnet18's file in resnet50: many keys are equal in name, none may be loaded in silence."""
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match="(?s)missing: .*another shape: .*builder"):
        models.resnet50(weights=tmp_path / "a.pth")


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.folder / "ran",)


@pytest.mark.parametrize("how", ["torch.save", "legacy torch.save", "pickle", "whole module"])
def test_a_file_with_code_is_refused_and_not_run(how: str, state: State, tmp_path: Path) -> None:
    """Weights from the internet are data, never a program."""
    path = tmp_path / "evil.pth"
    evil = {**state, "extra": Runs(tmp_path)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(Runs(tmp_path), protocol=2))
    elif how == "whole module":
        torch.save(nn.Linear(2, 2), path)
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=how == "torch.save")
    with pytest.raises(ValueError, match="evil.pth must hold a state_dict of tensors") as caught:
        models.resnet18(weights=path)
    assert "torch.save(model.state_dict(), path)" in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_files_say_so(suffix: str, damage: str, state: State, tmp_path: Path) -> None:
    """A half-finished download, or a web page saved as weights, must be named as such."""
    path = tmp_path / f"w{suffix}"
    (torch.save if suffix == ".pth" else save_file)(dict(state), path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"<html>"}[damage])
    with pytest.raises(ValueError, match=f"w{suffix} must hold a state_dict .* damaged"):
        models.resnet18(weights=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "got list"),
        ({}, "got dict"),
        ({"epoch": 3, "weights": [1]}, r"no tensors: 'epoch' \(int\), 'weights' \(list\)"),
        ({"state_dict": {"a": 1}}, r"'a' \(int\)"),
    ],
)
def test_files_without_a_state_dict_say_so(content: Any, message: str, tmp_path: Path) -> None:
    """A checkpoint whose weights sit elsewhere: the error must show what was found."""
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        models.resnet18(weights=tmp_path / "a.pth")


@pytest.mark.parametrize("weights", ["nowhere.pth", "nowhere/x.safetensors", Path("nowhere"), "."])
def test_a_missing_file_is_named(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong path that is taken for the name of downloadable weights."""
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    error = ValueError if weights == "." else FileNotFoundError
    with pytest.raises(error, match=str(weights)):
        models.resnet18(weights=weights)


def test_a_name_without_torchvision_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import error from deep inside, for someone who has only torch."""
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    for weights in ("DEFAULT", "ResNet18_Weights.IMAGENET1K_V1"):
        with pytest.raises(ValueError, match=f"'{weights}' is no file, .* install torchvision"):
            models.resnet18(weights=weights)


@pytest.mark.parametrize("weights", [{"conv1.weight": torch.ones(1)}, True, 3, nn.Linear])
def test_other_objects_are_refused(weights: Any) -> None:
    """weights=True (the old pretrained) or a loaded state_dict: say what to do instead."""
    with pytest.raises(TypeError, match="weights must be None, a file, .* got"):
        models.resnet18(weights=weights)


class Source:
    """What torchvision's weights look like from outside."""

    def __init__(self, state: State, names: list[str] | None) -> None:
        self.state = state
        self.asked: list[dict[str, Any]] = []
        if names is not None:
            self.meta = {"categories": names}

    def get_state_dict(self, progress: bool, check_hash: bool) -> State:
        self.asked.append({"progress": progress, "check_hash": check_hash})
        return self.state


def test_objects_with_get_state_dict(state: State) -> None:
    """Any weights object works; a wrong class count is refused before it is asked to download."""
    names = list("abcdefg")
    source = Source(state, names)
    assert_loaded(models.resnet18(weights=source, progress=False), state)
    assert source.asked == [{"progress": False, "check_hash": True}]
    assert categories(source) == names
    with pytest.raises(ValueError, match="num_classes must be 7 .* got 8"):
        models.resnet18(weights=source, num_classes=8)
    assert len(source.asked) == 1
    bare = Source(state, None)
    assert_loaded(models.resnet18(weights=bare), state)
    assert categories(bare) is None and categories(None) is None
