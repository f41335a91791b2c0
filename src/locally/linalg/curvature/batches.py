"""The data of a curvature operator: (inputs, targets) batches that can be gone through repeatedly, in one order."""

from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)

Inputs = Tensor | tuple[Tensor, ...] | list[Tensor] | dict[str, Tensor]
Batch = tuple[Inputs, Tensor]
Data = Batch | Iterable[Batch]


class Batches:
    """One pass after the other over the same micro-batches.

    Args:
        data: one batch as a tuple (inputs, targets), or any re-iterable of batches: a list, a DataLoader.
        device: where the batches must lie.

    Raises:
        TypeError: a one-shot iterator, or something that is not a batch.
        ValueError: no data, a shuffling loader, sizes that do not fit, the wrong device.
    """

    def __init__(self, data: Data, device: torch.device) -> None:
        if isinstance(data, Iterator):
            raise TypeError("data is an iterator, which can be read only once: pass a list of its batches")
        if isinstance(data, DataLoader) and isinstance(data.sampler, RANDOM):
            raise ValueError("data shuffles, so that every product would sum in another order: load with shuffle=False")
        self._batches: Iterable[Batch] = [data] if isinstance(data, tuple) and len(data) == 2 else data  # type: ignore
        self._device = device
        self._examples: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        """All batches; refuses an empty pass and one that differs in size from the first."""
        examples = 0
        for index, batch in enumerate(self._batches):
            examples += self._check(index, batch)
            yield batch[0], batch[1]
        if not examples:
            raise ValueError("data holds no batches: the list is empty, or the loader's data set is")
        if self._examples not in (None, examples):
            raise RuntimeError(f"data held {self._examples} examples in an earlier pass and {examples} in this one")
        self._examples = examples

    def micro(self, chunk: int | None) -> Iterator[Batch]:
        """All batches in slices of at most `chunk` examples; None leaves them whole."""
        for inputs, targets in self:
            n = len(targets)
            if chunk is None or n <= chunk:
                yield inputs, targets
                continue
            for start in range(0, n, chunk):
                part = itemgetter(slice(start, start + chunk))
                yield take(inputs, part), part(targets)

    def first(self, most: int) -> Batch:
        """Up to `most` examples of the first batch."""
        inputs, targets = next(iter(self))
        return take(inputs, lambda t: t[:most]), targets[:most]

    def _check(self, index: int, batch: Any) -> int:
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise TypeError(
                f"batch {index} of data must be a pair (inputs, targets) with a tensor of targets, got "
                f"{type(batch).__name__}; several batches go into a list"
            )
        inputs, targets = batch
        tensors = [*parts(inputs), targets]
        sizes = {len(t) if t.ndim else 0 for t in tensors}
        if len(sizes) != 1:
            raise ValueError(f"batch {index} of data: inputs and targets differ in length, {sorted(sizes)}")
        if sizes == {0}:
            raise ValueError(f"batch {index} of data holds no examples")
        wrong = [str(t.device) for t in tensors if t.device != self._device]
        if wrong:
            raise ValueError(f"batch {index} of data lies on {wrong[0]}, the model's parameters on {self._device}")
        return sizes.pop()


def parts(inputs: Inputs) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values() if isinstance(inputs, dict) else inputs)


def take(inputs: Inputs, pick: Callable[[Tensor], Tensor]) -> Inputs:
    """`pick` of every tensor."""
    if isinstance(inputs, Tensor):
        return pick(inputs)
    if isinstance(inputs, dict):
        return {name: pick(t) for name, t in inputs.items()}
    return tuple(pick(t) for t in inputs)
