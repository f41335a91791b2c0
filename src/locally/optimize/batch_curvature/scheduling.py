"""A learning-rate scheduler that follows the batch size.

Source: arXiv 2006.09092: linear for SGD, square root for adaptive optimizers, or the measured curvature's own ratio.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from locally.checks import check_choice, check_count
from locally.optimize.batch_curvature.report import CurvatureReport
from locally.optimize.batch_curvature.rules import RULES, scale_learning_rate


class BatchSizeLR(LRScheduler):
    """Multiplies the learning rates of an optimizer whenever the batch size changes.

    It multiplies what it finds, so it may be chained with any other scheduler.

    Args:
        optimizer: whose learning rates suit `batch_size`.
        batch_size: B >= 1 at the start; the whole batch under gradient accumulation or data parallelism.
        rule: "sgd" (in proportion), "adam" (square root); default by the kind of optimizer.
        report: a measured curvature; SGD then follows its largest stable learning rate, linear up to the knee only.

    Raises:
        ValueError: an unknown rule, or a report together with the rule of adaptive optimizers.

    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = torch.optim.Adam([w], lr=1e-3)
    >>> scheduler = BatchSizeLR(optimizer, 32)
    >>> optimizer.step(); scheduler.step(128); scheduler.get_last_lr()
    [0.002]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        *,
        rule: str | None = None,
        report: CurvatureReport | None = None,
    ) -> None:
        check_count("batch_size", batch_size)
        if rule is None:
            rule = "adam" if any("betas" in g or "alpha" in g for g in optimizer.param_groups) else "sgd"
        check_choice("rule", rule, RULES)
        if report is not None and rule != "sgd":
            raise ValueError('report holds the limits of SGD: rule must be "sgd" with it')
        self.batch_size, self.rule = batch_size, rule
        self._factor: Callable[[int, int], float] = lambda old, new: scale_learning_rate(1.0, old, new, optimizer=rule)
        if report is not None:
            self._factor = lambda old, new: report.scale_learning_rate(1.0, old, new)
        self._previous = batch_size
        super().__init__(optimizer)

    def step(self, batch_size: int | None = None) -> None:
        """After the optimizer's step: the size of the batches from now on; None leaves it."""
        if batch_size is not None:
            check_count("batch_size", batch_size)
            self._factor(self.batch_size, batch_size)  # refuses what the report cannot answer, before anything moves
        self._previous, self.batch_size = self.batch_size, batch_size or self.batch_size
        super().step()

    def get_lr(self) -> list[float | torch.Tensor]:
        factor = 1.0 if self._previous == self.batch_size else self._factor(self._previous, self.batch_size)
        return [group["lr"] * factor for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer and the report, which are whoever resumes to give."""
        return {key: value for key, value in super().state_dict().items() if key != "_factor"}
