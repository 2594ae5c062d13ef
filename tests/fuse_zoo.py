# SPDX-License-Identifier: BSD-3-Clause
"""Small ResNets in the styles in which people write them, for the tests of fuse()."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: waking a second thread costs more than all the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights and BatchNorm statistics far from their initial values, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.dim() > 1 else 1
            p.copy_(torch.randn(p.shape, generator=g) * (2 / fan) ** 0.5 if fan > 1 else p)
            if p.dim() == 1:
                p.copy_(torch.rand(p.shape, generator=g) + 0.5)
        for name, b in model.named_buffers():
            if "mean" in name:
                b.copy_(torch.randn(b.shape, generator=g) * 0.2)
            elif "var" in name:
                b.copy_(torch.rand(b.shape, generator=g) + 0.5)
    return model.eval()


def tame(model: nn.Module) -> nn.Module:
    """Seeded weights under which activations neither vanish nor grow with depth."""
    randomise(model)
    with torch.no_grad():
        for name, m in model.named_modules():
            if hasattr(m, "running_var"):
                m.weight.fill_(0.2 if name.endswith(("bn2", "bn3")) else 1.0)
                m.bias.copy_(torch.linspace(-0.5, 0.5, len(m.bias)))
    return model


def image(n: int = 2, size: int = 20, seed: int = 1, c: int = 3) -> Tensor:
    """Seeded images, not square, since an exchange of height and width must show."""
    return torch.randn(n, c, size, size + 3, generator=torch.Generator().manual_seed(seed))


def conv3(i: int, o: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, stride, padding=1, bias=False)


class Basic(nn.Module):
    """torchvision's way: one inplace ReLU for all, ``+=``, downsample or None."""

    def __init__(self, i: int, o: int, stride: int = 1, norm: type = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(i, o, stride), norm(o)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv3(o, o), norm(o)
        self.downsample = None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), norm(o))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottle(nn.Module):
    """A bottleneck with conv biases, groups, clone of the identity and ``x += identity``."""

    def __init__(self, i: int, mid: int, o: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.batch_norm1 = nn.Conv2d(i, mid, 1), nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, 1, groups=groups)
        self.batch_norm2 = nn.BatchNorm2d(mid)
        self.conv3, self.batch_norm3 = nn.Conv2d(mid, o, 1), nn.BatchNorm2d(o)
        self.identity_downsample = None
        if stride != 1 or i != o:
            self.identity_downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride), nn.BatchNorm2d(o))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        identity = x.clone()
        x = self.relu(self.batch_norm1(self.conv1(x)))
        x = self.relu(self.batch_norm2(self.conv2(x)))
        x = self.batch_norm3(self.conv3(x))
        if self.identity_downsample is not None:
            identity = self.identity_downsample(identity)
        x += identity
        x = self.relu(x)
        return x


class Net(nn.Module):
    """Stem, stages of blocks, head; the blocks decide the style."""

    def __init__(self, *blocks: nn.Module, width: int = 16, stem: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)


class Cifar(nn.Module):
    """Functional ReLU, an empty nn.Sequential as identity, ``view`` after the pool, a loop."""

    class Block(nn.Module):
        def __init__(self, i: int, o: int, stride: int = 1) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv3(i, o, stride), nn.BatchNorm2d(o)
            self.conv2, self.bn2 = conv3(o, o), nn.BatchNorm2d(o)
            self.shortcut = nn.Sequential()
            if stride != 1 or i != o:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(i, o, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(o)
                )

        def forward(self, x: Tensor) -> Tensor:
            out = F.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            out += self.shortcut(x)
            out = F.relu(out)
            return out

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(3, 8), nn.BatchNorm2d(8)
        self.layers = nn.ModuleList([self.Block(8, 8), self.Block(8, 12, 2)])
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            out = layer(out)
        out = F.adaptive_avg_pool2d(out, 1)
        out = out.view(out.size(0), -1)
        return self.linear(out)


class D2l(nn.Sequential):
    """A whole network as one nn.Sequential; projections are bare 1x1 convolutions."""

    class Residual(nn.Module):
        def __init__(self, i: int, o: int, use_1x1conv: bool = False, strides: int = 1) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(i, o, kernel_size=3, padding=1, stride=strides)
            self.conv2 = nn.Conv2d(o, o, kernel_size=3, padding=1)
            self.conv3 = nn.Conv2d(i, o, kernel_size=1, stride=strides) if use_1x1conv else None
            self.bn1, self.bn2 = nn.BatchNorm2d(o), nn.BatchNorm2d(o)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            if self.conv3:
                x = self.conv3(x)
            y += x
            return F.relu(y)

    def __init__(self) -> None:
        b1 = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        b2 = nn.Sequential(self.Residual(8, 8), self.Residual(8, 16, True, 2))
        super().__init__(b1, b2, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(16, 10))


class ConvNorm(nn.Module):
    """The helper that many repositories have: convolution, BatchNorm, activation or none."""

    def __init__(self, i: int, o: int, k: int, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, stride, k // 2, bias=False)
        self.norm = nn.BatchNorm2d(o)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class HelperBlock(nn.Module):
    """A bottleneck made of helpers; the projection is a helper, the identity an nn.Identity."""

    def __init__(self, i: int, mid: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            ConvNorm(i, mid, 1), ConvNorm(mid, mid, 3, stride), ConvNorm(mid, o, 1, act=False)
        )
        plain = stride == 1 and i == o
        self.shortcut = nn.Identity() if plain else ConvNorm(i, o, 1, stride, act=False)
        self.activation = nn.ReLU()

    def forward(self, hidden_state: Tensor) -> Tensor:
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        return self.activation(hidden_state)


class TimmBlock(nn.Module):
    """nn.Identity between everything, several activations, a projection behind an average pool."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(i, o, stride), nn.BatchNorm2d(o)
        self.drop_block, self.act1, self.aa = nn.Identity(), nn.ReLU(inplace=True), nn.Identity()
        self.conv2, self.bn2 = conv3(o, o), nn.BatchNorm2d(o)
        self.se = self.drop_path = None
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False),
                nn.Conv2d(i, o, 1, bias=False),
                nn.BatchNorm2d(o),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act2(x)
        return x


class SqueezeBlock(nn.Module):
    """Squeeze-and-excitation between BatchNorm and addition, which stays as it is."""

    class Squeeze(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Sequential(
                nn.Linear(c, 2), nn.ReLU(inplace=True), nn.Linear(2, c), nn.Sigmoid()
            )

        def forward(self, x: Tensor) -> Tensor:
            b, c, _, _ = x.size()
            y = self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1)
            return x * y.expand_as(x)

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(c, c), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = conv3(c, c), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.se = self.Squeeze(c)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        out += x
        return self.relu(out)


class PreAct(nn.Module):
    """BatchNorm and ReLU before the convolution."""

    def __init__(self, c: int, inplace: bool = False) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c), conv3(c, c)
        self.bn2, self.conv2 = nn.BatchNorm2d(c), conv3(c, c)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=self.inplace)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out), inplace=self.inplace))
        return out + x


class AddBlock(nn.Module):
    """A basic block whose addition and ReLUs are spelt in the way ``style`` says."""

    STYLES = ("torch.add", "add_", "swapped", "method", "into identity", "relu_", "torch.relu")

    def __init__(self, c: int, style: str) -> None:
        super().__init__()
        self.a, self.na, self.b, self.nb = (
            conv3(c, c),
            nn.BatchNorm2d(c),
            conv3(c, c),
            nn.BatchNorm2d(c),
        )
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        style = self.style
        h = self.na(self.a(x))
        h = torch.relu(h) if style == "torch.relu" else h.relu_() if style == "relu_" else h.relu()
        h = self.nb(self.b(h))
        if style == "torch.add":
            h = torch.add(h, x)
        elif style == "add_":
            h.add_(x)
        elif style == "swapped":
            h = x + h
        elif style == "method":
            h = x.add(h)
        elif style == "into identity":
            identity = x.clone()
            identity += h
            h = identity
        else:
            h = h + x
        return torch.relu_(h) if style == "relu_" else F.relu(h)


class DataDependent(Net):
    """A top-level forward that no graph can hold, around blocks that one can."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        if x.shape[0] > 3 or x.abs().max().item() < 0:
            x = x * 2
        x = self.layer1(x)
        return self.fc(self.avgpool(x).flatten(1))


class Backbone(nn.Module):
    """Returns every stage's features, one of them through ``view``, which minds the format."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, 2)
        self.stages = nn.ModuleList([Basic(8, 8), Basic(8, 16, 2)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        out = {"stem": x}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            out[f"stage{i}"] = x
        out["flat"] = x.view(x.shape[0], -1)
        return out
