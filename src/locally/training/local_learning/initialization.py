"""Fresh weights from a generator, for new networks and for copies that must not keep what they were copied with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def reinitialize(module: M, generator: torch.Generator | None = None) -> M:
    """Draw all weights anew, in place: convolutions from N(0, 2 / (k^2 c_out)), other modules by their own rule.

    The global random state stays as it was where a generator is given.

    Raises:
        TypeError: a submodule holds parameters and has no `reset_parameters`.
    """
    rules = {}
    for name, part in module.named_modules():
        rule = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if rule is None and next(part.parameters(recurse=False), None) is not None:
            where = f"{name} " if name else ""
            raise TypeError(
                f"{where}({type(part).__name__}) has parameters but no reset_parameters(): a fresh copy cannot be drawn"
            )
        rules[part] = rule
    with drawing_from(generator):
        for part, rule in rules.items():
            if rule is not None:
                rule()
            if isinstance(part, CONVOLUTIONS):
                fan_out = part.weight[0, 0].numel() * part.out_channels / part.groups
                nn.init.normal_(part.weight, std=(2 / fan_out) ** 0.5)
    return module


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Let modules, which know the global random state alone, draw from `generator`; None leaves them to that state."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield
