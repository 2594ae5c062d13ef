# SPDX-License-Identifier: BSD-3-Clause
"""``hf-hub:org/name@revision``: found, downloaded, read, or refused in one line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
from hub_server import COMMIT, OLDER, Hub, cached, timm_files
from torch import Tensor

from resnet_cases import images, lively
from resnet_fused import models
from resnet_fused.cli.main import main
from resnet_fused.cli.predict import announce
from resnet_fused.models import categories, resnet18
from resnet_fused.models.weights import resolve
from resnet_fused.predict.predictor import Predictor
from resnet_fused.predict.preprocess import Preprocessing, preprocessing_of

constants = pytest.importorskip("huggingface_hub.constants")
State = dict[str, Tensor]
NAME = "hf-hub:lab/net"


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(2)
    return lively(resnet18(num_classes=7), seed=3).state_dict()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the client's, which is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, which the client now takes for the Hub."""
    with hub_server.serve() as served:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield served


def equal(model: torch.nn.Module, state: State) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_offline_from_the_cache(cache: Path, state: State) -> None:
    """A name whose files are in the cache needs no network: weights, classes, preprocessing."""
    cached(cache, "lab/net", timm_files(state))
    model = resnet18(weights=NAME)
    assert model.fc.out_features == 7 and equal(model, state)
    weights = resolve(NAME, "resnet18")
    assert str(weights) == f"{NAME}@{COMMIT}"
    assert categories(weights) == categories(NAME) == [f"class {i}" for i in range(7)]
    prep = preprocessing_of(weights)
    assert (prep.resize, prep.crop, prep.interpolation) == (33, 32, "bicubic")  # floor(32 / 0.95)
    assert (prep.mean, prep.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert f"from {NAME}@{COMMIT}" in str(prep)


def test_download_is_of_one_commit_and_happens_once(
    hub: Hub, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch that moves between two files, a second download of the same, versions of torch in
    the request's headers."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    hub.repos["lab/net"] = {COMMIT: timm_files(state), OLDER: timm_files(state)}
    source = resolve(NAME, "resnet18")
    hub.names["main"] = OLDER
    assert equal(resnet18(weights=source, progress=False), state)
    files = {path.partition("/resolve/")[2] for _, path in hub.asked}
    assert files == {"main/config.json", f"{COMMIT}/model.safetensors"}
    before = len(hub.asked)
    assert equal(resnet18(weights=f"{NAME}@{COMMIT}", progress=False), state)
    assert len(hub.asked) == before  # all of it is in the cache
    assert hub.agents and not any("torch/" in agent for agent in hub.agents)


def test_revision(hub: Hub, state: State) -> None:
    """A tag chooses its own weights."""
    older = {k: v + 1 for k, v in state.items()}
    hub.repos["lab/net"] = {COMMIT: timm_files(state), OLDER: timm_files(older)}
    assert equal(resnet18(weights=f"{NAME}@v1", progress=False), older)


def test_pickled_weights_where_there_are_no_safetensors(
    hub: Hub, state: State, tmp_path: Path
) -> None:
    """Older repositories have only pytorch_model.bin; one with an object in it must not run it."""
    files = timm_files(state)
    del files["model.safetensors"]
    content = io.BytesIO()
    torch.save(state, content)
    hub.repos["lab/net"] = {COMMIT: {**files, "pytorch_model.bin": content.getvalue()}}
    assert equal(resnet18(weights=NAME, progress=False), state)
    bad = io.BytesIO()
    torch.save({"fc.weight": Path("code")}, bad)
    hub.repos["lab/bad"] = {COMMIT: {**files, "pytorch_model.bin": bad.getvalue()}}
    with pytest.raises(ValueError, match=r"pytorch_model\.bin must hold .* objects are never"):
        resnet18(weights="hf-hub:lab/bad", progress=False)
    hub.repos["lab/none"] = {COMMIT: files}
    with pytest.raises(ValueError, match="lab/none@.* must have one of the files model.safetens"):
        resnet18(weights="hf-hub:lab/none", progress=False)


def without(*keys: str) -> dict[str, Any]:
    return dict.fromkeys(keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet18d"}, "are of resnet18d, not resnet18: .*fuse"),
        ({"global_pool": "max"}, "of a resnet18 with global_pool=max"),
        ({"model_args": {"act_layer": "silu"}}, "of a resnet18 with act_layer=silu"),
        (without("architecture"), "config.json must be timm's"),
        ({"model_args": 3}, "not what timm or transformers write"),
        ({"label_names": ["a", "b"]}, "name 2 classes .* last layer of 7; pass the path"),
    ],
)
def test_repository_of_another_network(
    changes: dict[str, Any], message: str, cache: Path, state: State
) -> None:
    """Weights that would load and give wrong answers, or an error about keys."""
    cached(cache, "lab/net", timm_files(state, **changes))
    with pytest.raises(ValueError, match=message):
        resnet18(weights=NAME)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_mode": "squash"}, "centre crop .* got crop_mode squash"),
        ({"input_size": [3, 32, 40]}, r"square .* input_size \[3, 32, 40\]"),
        ({"interpolation": "lanczos"}, "must be bilinear or bicubic, got lanczos"),
        ({"crop_pct": "x"}, "not what timm or transformers write"),
        ({"crop_pct": 2.0}, "crop must be from 1 to resize"),
    ],
)
def test_preprocessing_that_predict_does_not_have(
    changes: dict[str, Any], message: str, cache: Path, state: State
) -> None:
    """Images prepared in another way than the weights want, in silence."""
    cached(cache, "lab/net", timm_files(state, pretrained_cfg=changes))
    weights = resolve(NAME, "resnet18")
    with pytest.raises(ValueError, match=message):
        preprocessing_of(weights, resize=40)
    own = {
        "resize": 40,
        "crop": 33,
        "interpolation": "bilinear",
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
    }
    assert preprocessing_of(weights, **own) == Preprocessing(**own, origin="as given")


def test_names_of_classes_that_are_no_use(
    cache: Path, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that cannot be had, although the user has names; which commit was taken."""
    cached(cache, "lab/net", timm_files(state, label_names={"0": "a", "5": "b"}))
    resnet18(weights=NAME)
    with pytest.raises(ValueError, match="must name every class .* pass a file of names as labels"):
        Predictor("resnet18", NAME)
    names = [f"class {i}" for i in range(state["fc.weight"].shape[0])]
    predictor = Predictor("resnet18", NAME, labels=names)
    assert predictor.labels == names and predictor.weights == str(resolve(NAME, "resnet18"))
    announce(predictor)
    assert f"weights {predictor.weights}, fp32" in capsys.readouterr().err


def test_what_a_config_leaves_out_is_timms_default(cache: Path, state: State) -> None:
    """Our own default (bilinear) for a repository that relies on timm's (bicubic)."""
    cached(cache, "lab/net", timm_files(state, pretrained_cfg={"crop_pct": None}))
    prep = preprocessing_of(resolve(NAME, "resnet18"))
    assert (prep.resize, prep.crop, prep.interpolation) == (256, 224, "bicubic")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("hf-hub:lab/absent", ValueError, "no such repository on the Hub, or it is private"),
        ("hf-hub:lab/closed", ValueError, "is gated; ask for access"),
        ("hf-hub:lab/net@v9", ValueError, "no branch, tag or commit 'v9'"),
        ("hf-hub:lab/empty", ValueError, "must be a repository of timm or transformers"),
        ("hf-hub:lab/html", ValueError, "config.json must be JSON"),
        ("hf-hub:lab/list", ValueError, "config.json must hold an object"),
        ("hf-hub:net", ValueError, "weights must be hf-hub:org/name or .*got 'hf-hub:net'"),
        ("hf-hub:lab/net@", ValueError, "weights must be hf-hub:org/name"),
        ("hf-hub:lab/net/more", ValueError, "weights must be hf-hub:org/name"),
        ("hf-hub:lab/n t", ValueError, "weights must be hf-hub:org/name"),
    ],
)
def test_names_that_lead_nowhere(
    name: str, error: type[Exception], message: str, hub: Hub, state: State
) -> None:
    """One line that says which part of the name is wrong, not a page of HTTP."""
    hub.repos["lab/net"] = {COMMIT: timm_files(state)}
    hub.repos["lab/empty"] = {COMMIT: {}}
    hub.repos["lab/html"] = {COMMIT: {"config.json": b"<html>"}}
    hub.repos["lab/list"] = {COMMIT: {"config.json": b"[1]"}}
    hub.gated.add("lab/closed")
    with pytest.raises(error, match=message) as caught:
        resnet18(weights=name, progress=False)
    assert "\n" not in str(caught.value)


def test_offline_and_not_in_the_cache(cache: Path, state: State) -> None:
    """HF_HUB_OFFLINE=1 is honoured, for a repository and for one file of it."""
    with pytest.raises(ConnectionError, match="config.json is not in the cache, and HF_HUB_OFF"):
        resnet18(weights=NAME)
    files = timm_files(state)
    del files["model.safetensors"]
    cached(cache, "lab/net", files)
    with pytest.raises(ConnectionError, match="model.safetensors is not in the cache, and HF_H"):
        resnet18(weights=NAME)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra's name instead of a ModuleNotFoundError."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"need huggingface_hub: pip install 'resnet_fused\[hub\]"):
        resnet18(weights=NAME)


def test_predict_by_name(
    cache: Path, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command takes classes and preprocessing from the repository, and says in one line which
    model to choose where the default is another."""
    from PIL import Image

    cached(cache, "lab/net", timm_files(state))
    Image.new("RGB", (50, 40), (200, 100, 50)).save(tmp_path / "a.png")
    command = ["predict", str(tmp_path / "a.png"), "--weights", NAME]
    assert main(command) == 1
    assert "are of resnet18, not resnet50: choose that model" in capsys.readouterr().err
    assert main([*command, "--model", "resnet18", "--top", "1"]) == 0
    out, err = capsys.readouterr()
    assert ",class " in out and "bicubic, antialias), centre crop 32, mean 0.5,0.4,0.3, std" in err
    assert f"from {NAME}@{COMMIT}" in err and "7 names" in err


def test_repository_of_transformers(cache: Path, state: State) -> None:
    """transformers' ResNets compute what ours do, under other keys; Microsoft's are among them."""
    transformers = pytest.importorskip("transformers")
    for layer_type, widths, name in (
        ("basic", [64, 128, 256, 512], "resnet18"),
        ("bottleneck", [256, 512, 1024, 2048], "resnet50"),
    ):
        depths = [2, 2, 2, 2] if layer_type == "basic" else [3, 4, 6, 3]
        config = transformers.ResNetConfig(
            layer_type=layer_type, depths=depths, hidden_sizes=widths, num_labels=5
        )
        theirs = lively(transformers.ResNetForImageClassification(config)).eval()
        folder = cache / f"models--lab--{name}"
        snapshot = folder / "snapshots" / COMMIT
        theirs.save_pretrained(snapshot)
        processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875)
        processor.save_pretrained(snapshot)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        source = resolve(f"hf-hub:lab/{name}", name)
        ours = getattr(models, name)(weights=source).eval()
        x = images(2, 3, 32, 32)
        with torch.inference_mode():
            torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-4)
        prep = preprocessing_of(source)
        assert (prep.resize, prep.crop, prep.interpolation) == (36, 32, "bicubic")
        assert categories(source) == [f"LABEL_{i}" for i in range(5)]


def test_timm_writes_what_we_read(cache: Path) -> None:
    """A repository written by timm itself, and the transform that timm makes of it."""
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    model = lively(timm.create_model("resnet18", num_classes=5)).eval()
    folder = cache / "models--lab--net"
    save_for_hf(model, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    source = resolve(NAME, "resnet18")
    ours = resnet18(weights=source).eval()
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    prep = preprocessing_of(source)
    assert (prep.resize, prep.crop) == (theirs.transforms[0].size, theirs.transforms[1].size[0])
    assert theirs.transforms[0].interpolation.value == prep.interpolation
    assert categories(source) is None


TRANSFORMERS = {
    "model_type": "resnet",
    "layer_type": "basic",
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [64, 128, 256, 512],
}
CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}}


@pytest.mark.parametrize(
    ("config", "processor", "message"),
    [
        ({"model_type": "vit"}, {}, "are of vit, not resnet18"),
        ({"depths": [1, 1, 1, 1]}, {}, r"are of ResNet of \[1, 1, 1, 1\] basic blocks"),
        ({"downsample_in_first_stage": True}, {}, "with downsample_in_first_stage=True"),
        ({"hidden_act": "gelu"}, {}, "with hidden_act=gelu"),
        ({}, {"size": 384}, "shortest edge below 384, got ConvNextImageProcessor of size 384"),
        ({}, {"do_normalize": False}, "with all its steps"),
        ({}, {"image_processor_type": "ViTImageProcessor"}, "got ViTImageProcessor of size 224"),
        ({}, {"resample": 1}, "must be bilinear or bicubic"),
    ],
)
def test_transformers_that_we_cannot_be(
    config: dict[str, Any], processor: dict[str, Any], message: str, cache: Path
) -> None:
    """A network or a preprocessing that differs from ours where no key tells."""
    files = {
        "config.json": json.dumps({**TRANSFORMERS, **config}).encode(),
        "preprocessor_config.json": json.dumps({**CONVNEXT, **processor}).encode(),
    }
    cached(cache, "lab/net", files)
    with pytest.raises(ValueError, match=message):
        preprocessing_of(resolve(NAME, "resnet18"))
