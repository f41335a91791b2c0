"""CIFAR-100 as bytes, and networks trained on its batches until a loss is not finite."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Examples = tuple[Tensor, Tensor]


def read_cifar100(path: Path) -> Examples:
    """Images (n, 3, 32, 32) in bytes and the 100 fine labels, from a file of the binary version of the data set.

    Raises:
        ValueError: the file does not consist of records of 3074 bytes.
    """
    records = np.fromfile(path, dtype=np.uint8)
    if not records.size or records.size % 3074:
        raise ValueError(f"{path} must hold records of 3074 bytes, got {records.size} bytes")
    table = torch.from_numpy(records.reshape(-1, 3074))
    return table[:, 2:].reshape(-1, 3, 32, 32), table[:, 1].long()


def normalised(images: UInt8[Tensor, "n 3 32 32"]) -> Float[Tensor, "n 3 32 32"]:
    """By the mean and standard deviation of each colour over the training images."""
    mean = torch.tensor([0.507, 0.487, 0.441]).view(3, 1, 1)
    std = torch.tensor([0.267, 0.256, 0.276]).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def largest_rate(
    make: Callable[[], nn.Module],
    method: str,
    train: Examples,
    size: int,
    *,
    rates: Sequence[float],
    epochs: int,
    seed: int,
    device: str = "cpu",
) -> float:
    """The largest of the ascending rates after which training accuracy is above twice chance; NaN if none is."""
    best = math.nan
    classes = int(train[1].max()) + 1
    for rate in rates:
        torch.manual_seed(seed)
        model = make().to(device)
        survived = train_epochs(model, optimizer_of(method, model, rate), train, size, epochs, seed)
        if survived and accuracy(model, train) > 2 / classes:
            best = rate
        elif not math.isnan(best):
            break  # past the edge
    return best


def optimizer_of(method: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    if method == "SGD":
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=5e-4)


def train_epochs(
    model: nn.Module, optimizer: torch.optim.Optimizer, train: Examples, size: int, epochs: int, seed: int
) -> bool:
    """Whether all losses were finite; stops at the first that is not."""
    model.train()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for inputs, targets in batches(train, size, device_of(model), generator):
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), targets)
            if not loss.isfinite():
                return False
            loss.backward()
            optimizer.step()
    return True


def batches(
    data: Examples, size: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Iterator[Examples]:
    """Batches as floating-point images on a device, in random order if there is a generator."""
    inputs, targets = data
    order = torch.arange(len(targets)) if generator is None else torch.randperm(len(targets), generator=generator)
    for rows in order.split(size):
        yield normalised(inputs[rows]).to(device), targets[rows].to(device)


def accuracy(model: nn.Module, data: Examples) -> float:
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(X).argmax(1) == y).sum()) for X, y in batches(data, 512, device_of(model)))
    return hits / len(data[1])


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
