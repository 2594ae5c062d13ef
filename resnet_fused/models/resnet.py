# SPDX-License-Identifier: BSD-3-Clause
"""ResNet with torchvision's arguments, attributes and state_dict keys, run through the fused ops.

In train mode, or where a child cannot be fused, it runs the same PyTorch calls as torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import ops
from resnet_fused.models import sites
from resnet_fused.models.blocks import BasicBlock, Bottleneck, Norm, conv1x1, conv3x3
from resnet_fused.models.weights import build, fix
from resnet_fused.modules import Fused, Site, conv_bn
from resnet_fused.uint8 import NAME, to_floats

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "conv1x1",
    "conv3x3",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


class ResNet(Fused, nn.Module):
    """A ResNet of four stages of residual blocks.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks in each of the four stages.
        num_classes: outputs of the last layer.
        zero_init_residual: start the last normalisation of every block at 0, which makes each block
            start as the identity.
        groups: groups of the blocks' 3x3 convolutions.
        width_per_group: base width of the blocks.
        replace_stride_with_dilation: for stages 2 to 4, whether to dilate instead of striding.
        norm_layer: makes a normalisation layer from a channel count; None is nn.BatchNorm2d.

    Raises:
        ValueError: ``replace_stride_with_dilation`` has not three elements, or a block refuses
            an argument.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        dilate = (
            (False,) * 3 if replace_stride_with_dilation is None else replace_stride_with_dilation
        )
        if len(dilate) != 3:
            raise ValueError(
                f"replace_stride_with_dilation must be None or three booleans, got {dilate}"
            )
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, 2, 3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        """One stage of ``blocks`` blocks; the first changes size and channels."""
        norm_layer = self._norm_layer
        outplanes = planes * block.expansion
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if stride != 1 or self.inplanes != outplanes:
            # Made before the block: the order decides which random numbers each weight gets.
            downsample = nn.Sequential(
                conv1x1(self.inplanes, outplanes, stride), norm_layer(outplanes)
            )
        shared = (self.groups, self.base_width)
        stage: list[nn.Module] = [
            block(self.inplanes, planes, stride, downsample, *shared, first_dilation, norm_layer)
        ]
        self.inplanes = outplanes
        stage += [
            block(outplanes, planes, 1, None, *shared, self.dilation, norm_layer)
            for _ in range(1, blocks)
        ]
        return nn.Sequential(*stage)

    def _initialise(self, zero_init_residual: bool) -> None:
        """He initialisation (fan out) of convolutions; normalisation layers start at 1 and 0."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                for tensor, value in ((m.weight, 1.0), (m.bias, 0.0)):
                    if tensor is not None:
                        nn.init.constant_(tensor, value)
        for m in self.modules() if zero_init_residual else ():
            if isinstance(m, (BasicBlock, Bottleneck)):
                last: Any = m.bn3 if isinstance(m, Bottleneck) else m.bn2
                if last.weight is not None:
                    nn.init.zeros_(last.weight)

    def fused_sites(self) -> tuple[Site, ...]:
        """The stem and the head; the blocks name their own."""
        return tuple(site for site in (self._stem_site(), self._head_site()) if site is not None)

    def _stem_site(self) -> Site | None:
        return sites.in_place(
            self, sites.STEM if sites.is_stem_pool(self.maxpool) else sites.STEM_CONV
        )

    def _head_site(self) -> Site | None:
        pool = self.avgpool
        if type(pool) is nn.AdaptiveAvgPool2d and pool.output_size not in (1, (1, 1)):
            return None
        return sites.in_place(self, sites.HEAD)

    def forward_features(self, x: Tensor) -> Tensor:
        """Everything before the global pool.

        Args:
            x: images, shape [N, C, H, W], C the channels of ``conv1`` (3).

        Returns:
            Feature map, shape [N, 512 * expansion, ceil(H / 32), ceil(W / 32)] without dilation.
        """
        x = self._stem(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return x

    def _stem(self, x: Tensor) -> Tensor:
        call = sites.call(self, "stem", x, self._look_at_stem)
        norm = self.__dict__.get(NAME)
        if call is not None and call[0] is sites.STEM:
            return ops.stem(x, call[1], norm)
        x = to_floats(self, norm, x)
        if call is None:
            y: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            return y
        conv = call[1]
        y = self.maxpool(ops.conv_bn_act(x, conv))
        return y

    def _look_at_stem(self, x: Tensor) -> tuple[Site, Any] | None:
        site = self._stem_site()
        if site is None or sites.why_plain(self, site, x) is not None:
            return None
        return site, conv_bn(self.conv1, self.bn1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Global pool and classifier.

        Args:
            x: feature map from ``forward_features``.
            pre_logits: stop before the classifier.

        Returns:
            Logits, shape [N, num_classes]; with ``pre_logits`` the pooled features,
            shape [N, 512 * expansion].
        """
        call = None if pre_logits else sites.call(self, "head", x, self._look_at_head)
        if call is not None:
            return ops.pool_linear(x, *call[1])
        x = torch.flatten(self.avgpool(x), 1)
        return x if pre_logits else self.fc(x)

    def _look_at_head(self, x: Tensor) -> tuple[Site, Any] | None:
        site = self._head_site()
        if site is None or sites.why_plain(self, site, x) is not None:
            return None
        return site, (self.fc.weight, self.fc.bias)

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: shape [N, C, H, W], the weights' dtype unless autocast is on, any layout; or uint8,
                see ``set_input_norm``.

        Returns:
            Logits, shape [N, num_classes].
        """
        return self._forward_impl(x)

    # From a call to the stem, which looks for the norm: see uint8.takes_bytes.
    _way_of_bytes = {f.__name__: f for f in (forward, _forward_impl, forward_features, _stem)}


def _resnet(
    name: str,
    block: type[BasicBlock | Bottleneck],
    layers: list[int],
    weights: Any,
    progress: bool,
    kwargs: dict[str, Any],
    **fixed: int,
) -> ResNet:
    """Make the network ``name`` with ``weights``; its name stands for the arguments ``fixed``."""
    if "pretrained" in kwargs:
        raise TypeError(
            "pretrained was replaced by weights: pass weights='IMAGENET1K_V1' for pretrained=True, "
            "nothing for pretrained=False"
        )
    for key, value in fixed.items():
        fix(kwargs, key, value)

    def make(**kwargs: Any) -> ResNet:
        return ResNet(block, layers, **kwargs)

    return build(make, name, weights, progress, kwargs)


def resnet18(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18 (11.7 million parameters).

    Args:
        weights: None for random ones; a .pth or .safetensors file; torchvision's weights or their
            name, such as "DEFAULT" or "IMAGENET1K_V2"; "hf-hub:org/name" or
            "hf-hub:org/name@revision" for timm's or transformers' on the Hugging Face Hub.
        progress: show the progress of a download.
        **kwargs: arguments of ``ResNet``.

    Raises:
        ValueError: the weights cannot be found or read, or have another number of classes than
            ``num_classes``.
        RuntimeError: the weights do not fit the network.
        ConnectionError: the Hub cannot be reached, and what is asked for is not in its cache.
    """
    return _resnet("resnet18", BasicBlock, [2, 2, 2, 2], weights, progress, kwargs)


def resnet34(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34 (21.8 million parameters); see ``resnet18``."""
    return _resnet("resnet34", BasicBlock, [3, 4, 6, 3], weights, progress, kwargs)


def resnet50(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50, version 1.5 (25.6 million parameters); see ``resnet18``."""
    return _resnet("resnet50", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs)


def resnet101(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (44.5 million parameters); see ``resnet18``."""
    return _resnet("resnet101", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


def resnet152(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (60.2 million parameters); see ``resnet18``."""
    return _resnet("resnet152", Bottleneck, [3, 8, 36, 3], weights, progress, kwargs)


def resnext50_32x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50, 32 groups of 4 (25.0 million parameters); see ``resnet18``."""
    return _resnet(
        "resnext50_32x4d",
        Bottleneck,
        [3, 4, 6, 3],
        weights,
        progress,
        kwargs,
        groups=32,
        width_per_group=4,
    )


def resnext101_32x8d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 32 groups of 8 (88.8 million parameters); see ``resnet18``."""
    return _resnet(
        "resnext101_32x8d",
        Bottleneck,
        [3, 4, 23, 3],
        weights,
        progress,
        kwargs,
        groups=32,
        width_per_group=8,
    )


def resnext101_64x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 64 groups of 4 (83.5 million parameters); see ``resnet18``."""
    return _resnet(
        "resnext101_64x4d",
        Bottleneck,
        [3, 4, 23, 3],
        weights,
        progress,
        kwargs,
        groups=64,
        width_per_group=4,
    )


def wide_resnet50_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-50, 3x3 convolutions doubled (68.9 million parameters); see ``resnet18``."""
    return _resnet(
        "wide_resnet50_2", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs, width_per_group=128
    )


def wide_resnet101_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-101, 3x3 convolutions doubled (126.9 million parameters); see ``resnet18``."""
    return _resnet(
        "wide_resnet101_2",
        Bottleneck,
        [3, 4, 23, 3],
        weights,
        progress,
        kwargs,
        width_per_group=128,
    )
