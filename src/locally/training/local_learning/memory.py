"""How much a training step keeps for its backward passes: exact on any device, beside the allocator's peak on a GPU."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Shaped
from torch import Tensor

if TYPE_CHECKING:
    from locally.training.local_learning.isolation import LocalLearner


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one training step.

    Attributes:
        saved_peak: most bytes that autograd kept for backward passes at one time.
        block_peaks: the same for each block's part of the step.
        allocator_peak: most bytes that tensors held on the GPU at one time, parameters, gradients and workspace
            included; None on the CPU, whose allocator keeps no such count.
    """

    saved_peak: int
    block_peaks: tuple[int, ...]
    allocator_peak: int | None


class SavedTensors:
    """Context that counts the bytes of distinct storages which autograd keeps; parameters and buffers are left out.

    Attributes:
        alive, peak: bytes now, and at most since the start or the last `restart`.

    >>> a = torch.ones(1000, requires_grad=True)
    >>> with SavedTensors() as saved:
    ...     loss = a.exp().sum()  # exp keeps its result: 4000 bytes
    ...     loss.backward()
    >>> saved.peak, saved.alive
    (4000, 0)
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        self.alive = self.peak = 0
        self._ignored = {_storage(t) for t in ignore}
        self._holders: dict[int, int] = defaultdict(int)  # storage -> how many saved tensors hold it
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def restart(self) -> None:
        """Let the peak be what is alive now."""
        self.peak = self.alive

    def _pack(self, tensor: Tensor) -> "_Kept":
        return _Kept(self, tensor)

    def hold(self, storage: int, size: int) -> None:
        """Count one more saved tensor on this storage of `size` bytes."""
        if storage in self._ignored:
            return
        self._holders[storage] += 1
        if self._holders[storage] == 1:
            self.alive += size
            self.peak = max(self.peak, self.alive)

    def release(self, storage: int, size: int) -> None:
        """Count one less."""
        if storage in self._ignored:
            return
        self._holders[storage] -= 1
        if self._holders[storage] == 0:
            del self._holders[storage]
            self.alive -= size


class _Kept:
    """What stands in the graph for a saved tensor; it goes when autograd lets go of it."""

    def __init__(self, counter: SavedTensors, tensor: Tensor) -> None:
        self.counter, self.tensor = counter, tensor
        self.storage, self.size = _storage(tensor), tensor.untyped_storage().nbytes()
        counter.hold(self.storage, self.size)

    def __del__(self) -> None:
        self.counter.release(self.storage, self.size)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measure_memory(
    learner: "LocalLearner", x: Shaped[Tensor, "b *input"], y: Shaped[Tensor, "b *target"], *, overlap: bool = False
) -> MemoryReport:
    """Run one `local_step` and say what it kept. The network stays as it was, gradients and running statistics too."""
    x = x.clone()  # a slice of a larger set would count as the whole set
    state = [*learner.buffers(), *(p for p in learner.parameters() if not p.requires_grad)]
    before = [t.detach().clone() for t in state]
    gradients = [p.grad for p in learner.parameters()]
    for p in learner.parameters():
        p.grad = None
    counter = SavedTensors([*learner.parameters(), *learner.buffers()])
    peaks: list[int] = []

    def after_block(_: int) -> None:
        peaks.append(counter.peak)
        counter.restart()

    if x.is_cuda:
        torch.cuda.synchronize(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
    with counter:
        learner.local_step(x, y, after_block=after_block, overlap=overlap)
    allocated = torch.cuda.max_memory_allocated(x.device) if x.is_cuda else None
    for p, gradient in zip(learner.parameters(), gradients):
        p.grad = gradient
    with torch.no_grad():
        for tensor, old in zip(state, before):
            tensor.copy_(old)
    return MemoryReport(max(peaks), tuple(peaks), allocated)


def saved_peak(work: Callable[[], object], ignore: Iterable[Tensor] = ()) -> int:
    """Most bytes that autograd keeps at one time while `work` runs."""
    with SavedTensors(ignore) as counter:
        work()
    return counter.peak
