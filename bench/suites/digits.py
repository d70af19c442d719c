"""Train a small convolutional network on scikit-learn's digits, in seconds: `python digits.py FOLDER`.

Leaves FOLDER/model.pt (TorchScript), train.npz and test.npz (images float32 [n, 1, 32, 32] and labels). The digits are
scaled up from 8×8, so that the network has something to chew on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn


def network(width: int = 32) -> nn.Sequential:
    """Four convolutions with batch normalization and one linear layer; 10 classes."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, width, 1), *block(width, 2 * width, 2), *block(2 * width, 4 * width, 2), *block(4 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 [1797, 1, 32, 32], mean 0 and deviation 1, and labels int64 [1797]."""
    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images.reshape(-1, 1, 8, 8).astype(np.float32)) / 16
    large = nn.functional.interpolate(small, size=(32, 32), mode="bilinear")
    return (large - large.mean()) / large.std(), torch.from_numpy(labels.astype(np.int64))


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int = 6) -> nn.Sequential:
    """A trained network in eval mode."""
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    return net.eval()


def main() -> None:
    """Train, and leave model and data in the folder that the command line names."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "example")
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    fit, held_out = order[:1000], order[1000:]
    net = train(images[fit], labels[fit])
    with torch.inference_mode():
        accuracy = (net(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    torch.jit.save(torch.jit.trace(net, images[:1]), folder / "model.pt")
    for name, part in (("train", fit), ("test", held_out)):
        np.savez_compressed(folder / f"{name}.npz", images=images[part].numpy(), labels=labels[part].numpy())
    print(f"trained: {accuracy:.2%} on {len(held_out)} held-out digits; {folder}/model.pt, train.npz, test.npz")


if __name__ == "__main__":
    main()
