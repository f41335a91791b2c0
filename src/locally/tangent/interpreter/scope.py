"""The paper's own protocol: layers that work on a batch of two halves, the network's input and a probe.

On the first half a `LinearScope` does what its module does; on the second it applies the linear action captured from
the first. One pass of [x; v] through the converted network gives [N(x); F v + r].
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locally.checks import check_choice
from locally.tangent.interpreter.actions import LINEAR_IN, NormMean
from locally.tangent.interpreter.replay import Program, compile_program
from locally.tangent.interpreter.trace import trace
from locally.tangent.linearization import check_inputs, refuse_random_modules


class LinearScope(nn.Module):
    """A module, unit or network, for batches [x; v] of two halves of equal size: returns [module(x); F_x v + r_x].

    Args:
        module: takes one tensor (N, ...) and returns one.
        norm_mean: see `LinearInterpreter`.
        biases: whether the second half gets r; `biases(network, False)` switches all scopes of a network.

    Raises:
        ValueError: on call, for a batch of odd size, a module in training mode, or one without a linear action.

    >>> scope = LinearScope(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    >>> x = torch.rand(2, 3)
    >>> y, again = scope(torch.cat([x, x])).chunk(2)
    >>> torch.allclose(y, again)
    True
    """

    def __init__(self, module: nn.Module, *, norm_mean: NormMean | str = NormMean.LINEAR, biases: bool = True) -> None:
        check_choice("norm_mean", norm_mean, tuple(NormMean))
        super().__init__()
        self.module, self.norm_mean, self.biases = module, NormMean(norm_mean), biases
        self._key: Any = None
        self._program: Program | None = None

    def forward(self, batch: Float[Tensor, "two_n ..."]) -> Float[Tensor, "two_n ..."]:
        if len(batch) == 0 or len(batch) % 2:
            raise ValueError(f"batch must hold two halves of equal size, got {len(batch)} examples")
        refuse_random_modules(self.module)
        x, v = batch.chunk(2)
        program = self._frozen(x)
        scales = [1.0] * len(program.constants) if self.biases else None
        with torch.no_grad():
            _, *state = program.capture(x)
        replay = lambda one, *rest: program.replay(one[None], rest, scales)[0]
        return torch.cat([self.module(x.clone()), torch.func.vmap(replay)(v, *state)])

    def _frozen(self, x: Tensor) -> Program:
        """The program depends on shapes and weights alone, so it serves until one of them changes."""
        weights = [(w.data_ptr(), w._version) for w in (*self.module.parameters(), *self.module.buffers())]
        key = (x.shape[1:], x.dtype, x.device, weights)
        if self._program is None or self._key != key:
            self._program = compile_program(self.module, (x[:1].detach(),), self.norm_mean)
            self._key = key
        return self._program


def convert(
    module: nn.Module,
    example: Float[Tensor, "n ..."],
    *,
    norm_mean: NormMean | str = NormMean.LINEAR,
    rtol: float = 1e-4,
) -> nn.Module:
    """A copy of a network for batches [x; v], with a `LinearScope` around whatever is not linear by itself.

    Where a submodule calls a function such as `F.relu` in its own `forward`, the scope goes around the submodule.

    Args:
        example: inputs (N, ...) to follow and to check the copy on.

    Raises:
        ValueError: the network cannot be followed; names the submodule.
        RuntimeError: the copy mixes the halves, so that it differs from `LinearScope(module)` by more than rtol.
    """
    (example,) = check_inputs(example)
    refuse_random_modules(module)
    traced = trace(module, (example[:1],))
    around: set[str] = set()
    for call in traced.calls:
        # parameters take part in it, or it is not linear in all that it is given
        own = any(n in traced.tensors for n in call.node.all_input_nodes)
        if own or (call.name not in LINEAR_IN and call.name != "getitem"):
            around.add(enclosing(call.path, traced.single))
    twin = copy.deepcopy(module)
    outermost = [p for p in around if not any(p != q and within(p, q) for q in around)]
    for path in outermost:
        scope = LinearScope(twin.get_submodule(path), norm_mean=norm_mean)
        if path == "":
            twin = scope
        else:
            parent, _, name = path.rpartition(".")
            setattr(twin.get_submodule(parent), name, scope)
    with torch.no_grad():
        halves = torch.cat([example, -example / 2])
        expected = LinearScope(module, norm_mean=norm_mean)(halves)
        error, size = float((twin(halves) - expected).norm()), max(float(expected.norm()), 1e-30)
    if not error <= rtol * size:
        raise RuntimeError(
            f"the converted network differs from LinearScope(module) by {error / size:.3g} relative: it mixes the "
            "halves of the batch outside of its submodules; use LinearScope(module)"
        )
    return twin


@contextmanager
def biases(network: nn.Module, on: bool) -> Iterator[nn.Module]:
    """Within, the second half of every scope in `network` goes with or without r."""
    scopes = [m for m in network.modules() if isinstance(m, LinearScope)]
    before = [s.biases for s in scopes]
    try:
        for scope in scopes:
            scope.biases = on
        yield network
    finally:
        for scope, was in zip(scopes, before):
            scope.biases = was


def within(path: str, outer: str) -> bool:
    return outer == "" or path == outer or path.startswith(f"{outer}.")


def enclosing(path: str, single: frozenset[str]) -> str:
    """The innermost submodule around `path` that takes one tensor and returns one."""
    while path and path not in single:
        path = path.rpartition(".")[0]
    return path
