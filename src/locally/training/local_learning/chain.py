"""A network as a chain of stages and a head, made from a user's module and checked to compute the same."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from locally.checks import check_count

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.Flatten, nn.Dropout)


class Chain(nn.Module):
    """`head(stages[-1](... stages[0](x)))`. A gradient-isolated block is a run of stages; the last one has the head.

    Args:
        stages: modules that take one tensor and return one tensor.
        head: from the last stage's output to what the loss reads.
        names: what errors and cut points call the stages; default "0", "1", ...

    Raises:
        TypeError: a stage is no module.
        ValueError: no stage, names that are not one a stage and distinct, or one module used as two stages.
    """

    def __init__(self, stages: Sequence[nn.Module], head: nn.Module, names: Sequence[str] | None = None) -> None:
        super().__init__()
        names = [str(i) for i in range(len(stages))] if names is None else list(names)
        if not stages:
            raise ValueError("stages must hold at least one module, got none")
        for name, stage in (*zip(names, stages), ("head", head)):
            if not isinstance(stage, nn.Module):
                raise TypeError(f"stage {name} must be a torch.nn.Module, got {type(stage).__name__}")
        if len(names) != len(stages) or len(set(names)) != len(names):
            raise ValueError(f"names must be distinct and one a stage, got {names} for {len(stages)} stages")
        if len({id(stage) for stage in stages}) != len(stages):
            raise ValueError("stages holds one module twice: its parameters would be shared across blocks")
        self.stages = nn.ModuleList(stages)
        self.head = head
        self.names = names
        self._inside = [{f"{name}.{part}" for part, _ in s.named_modules() if part} for name, s in zip(names, stages)]

    def forward(self, x: Shaped[Tensor, "b *input"]) -> Shaped[Tensor, "..."]:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)

    @classmethod
    def of(cls, net: nn.Module, example: Shaped[Tensor, "b *input"]) -> "Chain":
        """The chain that `net` is: its children in order, nested `nn.Sequential`s opened.

        A stage starts at each child that holds parameters and is no normalisation; the last such child is the head,
        with the pooling in front of it. The modules stay the same objects, so training the chain trains `net`. That the
        chain computes what `net` does is checked on `example` with normalisation and dropout in evaluation mode.

        Raises:
            TypeError: some module returns something else than a tensor.
            ValueError: fewer than two children with parameters, or `net` is more than the chain of its children.
        """
        if isinstance(net, cls):
            return net
        parts = list(_parts(net))
        starts = [i for i, (_, part) in enumerate(parts) if _has_weights(part) and not isinstance(part, NORMS)]
        if len(starts) < 2:
            raise ValueError(
                f"net must have at least two parts with parameters, {type(net).__name__} has {len(starts)}"
            )
        split = starts[-1]
        while split - 1 > starts[-2] and isinstance(parts[split - 1][1], POOLS):
            split -= 1
        groups = [parts[a:b] for a, b in pairwise([0, *starts[1:-1], split])]
        stages = [group[0][1] if len(group) == 1 else nn.Sequential(*(part for _, part in group)) for group in groups]
        anchors = [next(name for name, part in group if _has_weights(part)) for group in groups]
        chain = cls(stages, nn.Sequential(*(part for _, part in parts[split:])), anchors)
        for inside, group, anchor in zip(chain._inside, groups, anchors):
            inside.clear()
            inside.update(f"{name}.{part}".rstrip(".") for name, m in group for part, _ in m.named_modules())
            inside.discard(anchor)
        chain._check_against(net, example)
        return chain

    def _check_against(self, net: nn.Module, example: Tensor) -> None:
        advice = "pass locally.training.local_learning.Chain(stages, head) instead"
        modes = {module: module.training for module in net.modules()}
        net.eval()
        try:
            with torch.no_grad():
                wanted = net(example.clone())
                try:
                    found = self(example.clone())
                except (RuntimeError, TypeError, AttributeError) as error:
                    raise ValueError(f"net is not the chain of its children ({error}): {advice}") from error
        finally:
            for module, training in modes.items():
                module.training = training
        if not isinstance(wanted, Tensor) or not isinstance(found, Tensor):
            raise TypeError(f"net must return a tensor, got {type(wanted).__name__}")
        if wanted.shape != found.shape or not torch.allclose(wanted, found, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ValueError(f"net is not the chain of its children: it computes something else; {advice}")

    def cut_points(self, cuts: int | Sequence[int | str]) -> tuple[int, ...]:
        """The stages with which blocks 1, 2, ... begin.

        Args:
            cuts: a number of blocks, as even as may be; or the first stage of each block but the first, by number or by
                the name of a module of the network that the chain was made of.

        Raises:
            TypeError: a cut is neither a number nor a name.
            ValueError: more blocks than stages, cuts that do not rise, or a cut inside a stage: it would split
                what is no chain, such as a residual block.
        """
        L = len(self.stages)
        if isinstance(cuts, int):
            check_count("cuts", cuts)
            if cuts > L:
                raise ValueError(f"cuts asks for {cuts} blocks, but the network has only {L} stages")
            return tuple(round(L * k / cuts) for k in range(1, cuts))
        found = tuple(self._stage_number(cut) for cut in cuts)
        if len(found) >= L:
            raise ValueError(f"cuts asks for {len(found) + 1} blocks, but the network has only {L} stages")
        if any(not 0 < cut < L for cut in found) or any(a >= b for a, b in pairwise(found)):
            raise ValueError(f"cuts must rise within 1 .. {L - 1}, got {list(cuts)}")
        return found

    def _stage_number(self, cut: int | str) -> int:
        if isinstance(cut, bool) or not isinstance(cut, int | str):
            raise TypeError(f"cuts must hold stage numbers or names, got {type(cut).__name__} {cut!r}")
        if isinstance(cut, int):
            return cut
        if cut in self.names:
            return self.names.index(cut)
        for number, (name, inside) in enumerate(zip(self.names, self._inside)):
            if cut in inside:
                kind = type(self.stages[number]).__name__
                raise ValueError(f"cut {cut!r} lies inside stage {number}, {name!r} ({kind}), and would split it")
        raise ValueError(f"cut {cut!r} names no stage; they are {', '.join(self.names)}")

    def check_disjoint(self, starts: Sequence[int]) -> None:
        """Refuse blocks that share a parameter: gradients of two local losses would meet in it."""
        owners: dict[Tensor, tuple[int, str]] = {}
        for block, (a, b) in enumerate(pairwise([0, *starts, len(self.stages)])):
            parts = dict(zip(self.names[a:b], self.stages[a:b]))
            if b == len(self.stages):
                parts["head"] = self.head
            for name, part in parts.items():
                for inner, parameter in part.named_parameters():
                    owner, other = owners.setdefault(parameter, (block, f"{name}.{inner}"))
                    if owner != block:
                        shared = f"{other} of block {owner} is {name}.{inner} of block {block}"
                        raise ValueError(f"net shares a parameter across blocks: {shared}")

    def shapes(self, example: Float[Tensor, "b *input"], starts: Iterable[int] = ()) -> list[tuple[int, ...]]:
        """Shape of each stage's output without the batch, by one pass in evaluation mode that leaves no trace.

        Raises:
            TypeError: a stage returns something else than a tensor.
            ValueError: a stage fails on what comes before it, or a stage that begins a block overwrites its input.
        """
        starts = set(starts)
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            return self._walk(example.clone(), starts)
        finally:
            for module, training in modes.items():
                module.training = training

    @torch.no_grad()
    def _walk(self, x: Tensor, starts: set[int]) -> list[tuple[int, ...]]:
        shapes = []
        for number, (name, stage) in enumerate(zip(self.names, self.stages)):
            version = x._version
            try:
                h = stage(x)
            except RuntimeError as error:
                raise ValueError(f"stage {number}, {name!r}, fails on an input of {tuple(x.shape)}: {error}") from error
            if not isinstance(h, Tensor):
                raise TypeError(f"stage {number}, {name!r}, must return a tensor, got {type(h).__name__}")
            if number in starts and x._version != version:
                raise ValueError(f"stage {number}, {name!r}, overwrites its input: not allowed where a block begins")
            shapes.append(tuple(h.shape[1:]))
            x = h
        return shapes


def _parts(net: nn.Module, prefix: str = "") -> Iterable[tuple[str, nn.Module]]:
    for name, child in net._modules.items():  # named_children() leaves out a module's second use
        if child is None:
            continue
        if isinstance(child, nn.Sequential):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
