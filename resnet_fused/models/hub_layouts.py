# SPDX-License-Identifier: BSD-3-Clause
"""How timm and transformers lay out a ResNet's repository on the Hugging Face Hub."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

Config = Mapping[str, Any]

# timm's values for what a config leaves out.
TIMM_DEFAULTS: Config = {
    "input_size": [3, 224, 224],
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
# Arguments of timm's models that change no output in eval mode, or no more than the keys tell.
HARMLESS = {"num_classes", "in_chans", "drop_rate", "drop_path_rate", "drop_block_rate"}
# transformers' configurations have no names.
DEPTHS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
WIDTHS = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}
# transformers' defaults for what a config leaves out; other values make another network.
TRANSFORMERS_DEFAULTS: Config = {
    "embedding_size": 64,
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
PROCESSORS = {"ConvNextImageProcessor", "ConvNextFeatureExtractor"}
WARPS_FROM = 384  # from this size on, ConvNext's processor ignores the aspect ratio
PILLOW = {2: "bilinear", 3: "bicubic"}
KEY = re.compile(
    r"resnet\.encoder\.stages\.(?P<stage>\d+)\.layers\.(?P<block>\d+)\."
    r"(?:layer\.(?P<conv>\d+)|shortcut)\.(?P<kind>convolution|normalization)\.(?P<rest>.+)"
)
HEADS = {
    "resnet.embedder.embedder.convolution.": "conv1.",
    "resnet.embedder.embedder.normalization.": "bn1.",
    "classifier.1.": "fc.",
}


class Interpolation(Enum):
    """Named as torchvision's."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


@dataclass(frozen=True)
class Preset:
    """Preprocessing, with the attributes of torchvision's presets."""

    resize_size: list[int]
    crop_size: list[int]
    interpolation: Interpolation
    mean: list[float]
    std: list[float]


def is_transformers(config: Config) -> bool:
    """Whether a ``config.json`` was written by transformers, not timm."""
    return "model_type" in config


def check(config: Config, model: str, name: str) -> None:
    """Refuse a repository that does not hold the network that ``model`` builds.

    Args:
        config: ``config.json``.
        model: builder, such as "resnet50".
        name: of the repository, for the message.

    Raises:
        ValueError: it holds another network, or one that no builder makes.
    """
    if is_transformers(config):
        found, odd = _transformers_network(config)
    else:
        found, odd = config.get("architecture"), _timm_changes(config)
    if not isinstance(found, str):
        raise ValueError(
            f"weights {name}: config.json must be timm's, with an 'architecture', or that of "
            f"transformers' ResNet, got the keys {', '.join(sorted(config)[:8])}"
        )
    if odd:
        raise ValueError(
            f"weights {name} are of a {found} with {odd}, which {model} cannot be; build the model "
            "with the library that wrote them and call resnet_fused.fuse on it"
        )
    if found != model:
        raise ValueError(
            f"weights {name} are of {found}, not {model}: choose that model; if resnet_fused has "
            "no builder of this name, build it with the library that wrote the weights and call "
            "resnet_fused.fuse on it"
        )


def labels(config: Config, name: str) -> list[str] | None:
    """Class names by index; None where the config has none.

    Raises:
        ValueError: the names are neither a list nor an object whose keys are 0 to their number.
    """
    key = "id2label" if is_transformers(config) else "label_names"
    named = config.get(key, _pretrained(config).get(key))
    if not named:
        return None
    if isinstance(named, Mapping) and set(named) == {str(i) for i in range(len(named))}:
        named = [named[str(i)] for i in range(len(named))]
    if not isinstance(named, list):
        raise ValueError(
            f"weights {name}: {key} in config.json must name every class from 0 on, "
            f"got {named!r:.60}; pass a file of names as labels"
        )
    return [str(label) for label in named]


def timm_preset(config: Config, name: str) -> Preset:
    """Preprocessing as timm makes it of ``pretrained_cfg``: that of training size, not test size.

    Raises:
        ValueError: no centre crop of a square, or another number of channels than three.
    """
    given = {key: value for key, value in _pretrained(config).items() if value is not None}
    cfg = {**TIMM_DEFAULTS, **given}
    channels, height, width = cfg["input_size"]
    if cfg["crop_mode"] != "center" or channels != 3 or height != width:
        raise ValueError(
            f"the preprocessing of weights {name} must be a centre crop to a square of 3 channels, "
            f"got crop_mode {cfg['crop_mode']}, input_size {cfg['input_size']}; prepare the images "
            "yourself and call the model"
        )
    return Preset(
        resize_size=[math.floor(height / cfg["crop_pct"])],
        crop_size=[height],
        interpolation=_interpolation(cfg["interpolation"], name),
        mean=list(cfg["mean"]),
        std=list(cfg["std"]),
    )


def transformers_preset(processor: Config, name: str) -> Preset:
    """Preprocessing as a ConvNext processor does it, which is what transformers' ResNets use.

    Raises:
        ValueError: another processor, one that leaves out a step, or a size that it warps to.
    """
    kind = str(processor.get("image_processor_type", processor.get("feature_extractor_type")))
    steps = [processor.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize")]
    size = processor.get("size", WARPS_FROM)
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", WARPS_FROM)
    scale = processor.get("rescale_factor", 1 / 255)
    plain = (
        kind.removesuffix("Fast").removesuffix("Pil") in PROCESSORS
        and all(steps)
        and math.isclose(scale, 1 / 255)
    )
    if not plain or size >= WARPS_FROM:
        raise ValueError(
            f"the preprocessing of weights {name} must be that of ConvNextImageProcessor with all "
            f"its steps and a shortest edge below {WARPS_FROM}, got {kind} of size {size}; prepare "
            "the images yourself and call the model"
        )
    return Preset(
        resize_size=[int(size / processor.get("crop_pct", 0.875))],
        crop_size=[size],
        interpolation=_interpolation(PILLOW.get(processor.get("resample", 3), "other"), name),
        mean=list(processor.get("image_mean", [0.5, 0.5, 0.5])),
        std=list(processor.get("image_std", [0.5, 0.5, 0.5])),
    )


def torchvision_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of transformers' ResNet; one that is not among them stays as it is."""
    return {_torchvision_key(key): tensor for key, tensor in state.items()}


def _torchvision_key(key: str) -> str:
    for theirs, ours in HEADS.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    found = KEY.fullmatch(key)
    if found is None:
        return key
    convolution = found["kind"] == "convolution"
    if found["conv"] is None:
        layer = "downsample.0" if convolution else "downsample.1"
    else:
        layer = ("conv" if convolution else "bn") + str(int(found["conv"]) + 1)
    return f"layer{int(found['stage']) + 1}.{found['block']}.{layer}.{found['rest']}"


def _pretrained(config: Config) -> Config:
    cfg: Config = config.get("pretrained_cfg", config)  # timm's old files have one level
    return cfg


def _timm_changes(config: Config) -> str:
    """What makes the network differ from the one its architecture names; "" for nothing."""
    args = [("global_pool", config.get("global_pool", "avg"))]
    args += (config.get("model_args") or {}).items()
    return ", ".join(
        f"{key}={value}"
        for key, value in args
        if key not in HARMLESS and (key, value) != ("global_pool", "avg")
    )


def _transformers_network(config: Config) -> tuple[str | None, str]:
    """The builder's name, and what differs from it; None for another kind of model."""
    if config["model_type"] != "resnet":
        return str(config["model_type"]), ""
    block = config.get("layer_type", "bottleneck")
    depths = config.get("depths", [3, 4, 6, 3])
    name = DEPTHS.get((block, tuple(depths)), f"ResNet of {depths} {block} blocks")
    wanted = {**TRANSFORMERS_DEFAULTS, "hidden_sizes": WIDTHS.get(block)}
    given = {key: config.get(key, value) for key, value in wanted.items()}
    return name, ", ".join(f"{k}={v}" for k, v in given.items() if v != wanted[k])


def _interpolation(value: str, name: str) -> Interpolation:
    try:
        return Interpolation(value)
    except ValueError:
        raise ValueError(
            f"the interpolation of weights {name} must be bilinear or bicubic, got {value}; "
            "prepare the images yourself and call the model"
        ) from None
