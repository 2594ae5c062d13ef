# SPDX-License-Identifier: BSD-3-Clause
"""The two residual blocks, with torchvision's arguments, attributes and keys.

Children stay plain nn.Conv2d and nn.BatchNorm2d; the forward hands their live tensors to one op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from resnet_fused import ops
from resnet_fused.models import sites
from resnet_fused.modules import Fused, Site, conv_bn

Norm = Callable[..., nn.Module]


def conv3x3(
    in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """A 3x3 convolution without bias whose padding keeps the size at stride 1."""
    return nn.Conv2d(
        in_planes, out_planes, 3, stride, dilation, groups=groups, bias=False, dilation=dilation
    )


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class Block(Fused, nn.Module):
    """What the two residual blocks share: the choice between the fused op and plain PyTorch."""

    expansion: int
    _sites: tuple[Site, Site]  # without and with a projection
    downsample: nn.Module | None

    def _site(self) -> Site | None:
        """The fused call that fits the children as they are now; None if none does."""
        down = self.downsample
        if type(down) is nn.Sequential and len(down) != 2:
            return None
        return sites.in_place(self, self._sites[int(down is not None)])

    def fused_sites(self) -> tuple[Site, ...]:
        """The block as one call."""
        site = self._site()
        return () if site is None else (site,)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block.

        Args:
            x: shape [N, inplanes, H, W].

        Returns:
            Shape [N, planes * expansion, ceil(H / stride), ceil(W / stride)].
        """
        call = sites.call(self, "block", x, self._look)
        return self._plain(x) if call is None else self._fused(x, *call[1])

    def _look(self, x: Tensor) -> tuple[Site, Any] | None:
        site = self._site()
        if site is None or sites.why_plain(self, site, x) is not None:
            return None
        down = self.downsample
        # By name: a Sequential copies its children to find one by number.
        project = None if down is None else conv_bn(down._modules["0"], down._modules["1"])
        return site, (*self._convs(), project)

    def _plain(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _convs(self) -> tuple[ops.ConvBN, ...]:
        raise NotImplementedError

    def _fused(self, x: Tensor, *convs: Any) -> Tensor:
        raise NotImplementedError


class BasicBlock(Block):
    """The residual block of ResNet-18 and 34: two 3x3 convolutions.

    Args:
        inplanes: input channels.
        planes: output channels.
        stride: stride of the first convolution.
        downsample: projection of the shortcut; None is the identity.
        groups: must be 1.
        base_width: must be 64.
        dilation: must be 1.
        norm_layer: makes a normalisation layer from a channel count; None is nn.BatchNorm2d.

    Raises:
        ValueError: ``groups`` or ``base_width`` is not as above.
        NotImplementedError: ``dilation`` is above 1.
    """

    expansion = 1
    _sites = (sites.BASIC, sites.BASIC_DOWN)

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock needs groups=1 and base_width=64, got {groups} and {base_width}; "
                "use Bottleneck for grouped or wide blocks"
            )
        if dilation > 1:
            raise NotImplementedError(
                f"BasicBlock needs dilation=1, got {dilation}; use Bottleneck for dilated networks"
            )
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def _plain(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        y: Tensor = self.relu(out)
        return y

    def _convs(self) -> tuple[ops.ConvBN, ...]:
        return conv_bn(self.conv1, self.bn1), conv_bn(self.conv2, self.bn2)

    def _fused(self, x: Tensor, *convs: Any) -> Tensor:
        return ops.basic_block(x, *convs)


class Bottleneck(Block):
    """The residual block of ResNet-50 and deeper: 1x1, 3x3 (with the stride) and 1x1 convolution.

    Args:
        inplanes: input channels.
        planes: a quarter of the output channels.
        stride: stride of the 3x3 convolution.
        downsample: projection of the shortcut; None is the identity.
        groups: groups of the 3x3 convolution.
        base_width: the 3x3 convolution has ``int(planes * base_width / 64) * groups`` channels.
        dilation: dilation of the 3x3 convolution.
        norm_layer: makes a normalisation layer from a channel count; None is nn.BatchNorm2d.
    """

    expansion = 4
    _sites = (sites.BOTTLENECK, sites.BOTTLENECK_DOWN)

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def _plain(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        y: Tensor = self.relu(out)
        return y

    def _convs(self) -> tuple[ops.ConvBN, ...]:
        return (
            conv_bn(self.conv1, self.bn1),
            conv_bn(self.conv2, self.bn2),
            conv_bn(self.conv3, self.bn3),
        )

    def _fused(self, x: Tensor, *convs: Any) -> Tensor:
        return ops.bottleneck(x, *convs)
