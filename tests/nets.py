"""Networks that tests build by name (`tests/nets.py:resnet20`): CIFAR ResNets of akamaster's layout, and small ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights (option A of the paper)."""

    def __init__(self, planes_in, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(planes_in, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or planes_in != planes:
            self.shortcut = Shortcut(planes)

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Shortcut(nn.Module):
    """Every second pixel, channels padded with zeros."""

    def __init__(self, planes):
        super().__init__()
        self.planes = planes

    def forward(self, x):
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.planes // 4, self.planes // 4))


class ResNet(nn.Module):
    """ResNet for 32x32 images."""

    def __init__(self, blocks, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._layer(16, 16, blocks, 1)
        self.layer2 = self._layer(16, 32, blocks, 2)
        self.layer3 = self._layer(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)

    def _layer(self, planes_in, planes, blocks, stride):
        first = BasicBlock(planes_in, planes, stride)
        return nn.Sequential(first, *[BasicBlock(planes, planes) for _ in range(blocks - 1)])

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))


def resnet20(num_classes=10):
    """ResNet-20."""
    return ResNet(3, num_classes)


def resnet56(num_classes=10):
    """ResNet-56."""
    return ResNet(9, num_classes)


class Small(nn.Module):
    """A convolution, a normalization and a linear layer, for 8x8 images of one channel."""

    def __init__(self, num_classes=10, width=4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.linear(functional.relu(self.bn(self.conv(x))).mean((2, 3)))


def small(num_classes=10, width=4):
    """`Small`, with weights that depend on nothing."""
    torch.manual_seed(0)
    return Small(num_classes, width)


def needs_size(size):
    """A network whose builder has an argument without a default."""
    return nn.Linear(size, 2)


def broken():
    """A builder that raises."""
    raise RuntimeError("no such luck")
