"""The backward of block k beside the forward of block k + 1, on two streams of one device."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

if TYPE_CHECKING:
    from locally.training.local_learning.isolation import LocalLearner


def overlapped_step(
    learner: "LocalLearner",
    x: Shaped[Tensor, "b *input"],
    y: Shaped[Tensor, "b *target"],
    after_block: Callable[[int], None] | None = None,
    amp: torch.dtype | None = None,
) -> Float[Tensor, " blocks"]:
    """The step of `LocalLearner.local_step` with even and odd blocks on two streams.

    The forward of block k + 1 is queued before the backward of block k, since queueing a backward keeps the thread
    busy: the other order would leave the second stream idle. On the CPU, where streams do nothing, this is the same
    computation in that other order.
    """
    backend = torch.cuda if x.is_cuda else torch.cpu
    main = backend.current_stream()
    lanes = [backend.Stream(), backend.Stream()]
    losses: list[Tensor] = []
    finished = main.record_event()

    def backward(k: int, h: Tensor) -> None:
        nonlocal finished
        lane = lanes[k % 2]
        with backend.stream(lane):
            losses.append(learner.run_backward(k, h, y, x, amp))
            lane.wait_event(finished)  # what finishes block k - 1 may read weights that a step of block k changes
            learner.finish_block(k, after_block)
            finished = lane.record_event()

    for lane in lanes:
        lane.wait_stream(main)
    waiting: tuple[int, Tensor] | None = None
    border = x
    for k in range(learner.plan.n_blocks):
        lane = lanes[k % 2]
        with backend.stream(lane):
            h = learner.run_block(k, border, amp)
        border = h.detach()
        ready = lane.record_event()
        if waiting is not None:
            backward(*waiting)
        waiting = k, h
        if k + 1 < learner.plan.n_blocks:
            following = lanes[(k + 1) % 2]
            following.wait_event(ready)
            _keep(border, following)
    assert waiting is not None
    backward(*waiting)
    for lane in lanes:
        main.wait_stream(lane)
    for loss in losses:
        _keep(loss, main)
    return torch.stack(losses)


def _keep(tensor: Tensor, stream: Any) -> None:
    """Tell the allocator that another stream than the one which made the tensor reads it."""
    if tensor.is_cuda:
        tensor.record_stream(stream)
