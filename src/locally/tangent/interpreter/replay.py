"""The frozen network: one pass that captures, and as many replays on other inputs as one likes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from locally.tangent.interpreter.actions import Action, Kind, NormMean, Rules, Value, looked
from locally.tangent.interpreter.trace import Call, plain_kernels, trace


@dataclass(frozen=True)
class Constant:
    """A place where the network adds something that the variable has no part in: a bias, a shift, h(0) of a unit.

    Attributes:
        path: of the submodule, "" for the module itself.
        operation: what adds it there.
        shape: of the value that it is added to, for one example, (1, ...).
    """

    path: str
    operation: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """One example's pass with every unit frozen, batched over examples with vmap."""

    variable: fx.Node
    others: tuple[fx.Node, ...]
    output: fx.Node
    calls: tuple[Call, ...]
    linear_calls: tuple[tuple[Call, Action, int | None], ...]  # with the place of the call's constant in `constants`
    fixed: dict[Any, Any]
    kept: tuple[Any, ...]  # nodes and names, in the order in which `capture` returns them
    makers: dict[Any, Any]
    constants: tuple[Constant, ...]

    def capture(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Output and state for examples (N, ...), each tensor with N rows."""
        with plain_kernels():
            return vmap(self._capture)(x, *others)

    def _capture(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        values: dict[Any, Any] = dict(self.fixed)
        values |= {n: v[None] for n, v in zip((self.variable, *self.others), (x, *others))}
        for call in self.calls:
            if call.node not in values:
                values[call.node] = run(call, values)
        state = [self.makers[key](values.__getitem__) if key in self.makers else values[key] for key in self.kept]
        return values[self.output][0], *state

    def replay(self, v: Tensor, state: Sequence[Tensor], scales: Sequence[Tensor | float] | None = None) -> Tensor:
        """F v + sum of scales[k] times the k-th constant, for one example: v (1, *in) to (1, *out)."""
        held: dict[Any, Any] = dict(zip(self.kept, state))
        value = lambda key: held[key] if key in held else self.fixed[key]
        tangents: dict[fx.Node, Any] = {self.variable: v}
        for call, action, place in self.linear_calls:
            out = action.linear(tangents.__getitem__, value)
            if scales is not None and place is not None:
                assert action.constant is not None
                constant = value(action.constant) if isinstance(action.constant, str) else action.constant
                out = out + scales[place] * constant
            tangents[call.node] = out
        return tangents[self.output]


class Replay(nn.Module):
    """F as a module, linear in its first input: (v, *state) to F v, each with N rows."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, v: Tensor, *state: Tensor) -> Tensor:
        return vmap(lambda one, *rest: self.program.replay(one[None], rest)[0])(v, *state)


def compile_program(
    module: nn.Module, inputs: tuple[Tensor, ...], norm_mean: NormMean, target: str | None = None
) -> Program:
    """Follow one example, (1, ...), and give every call its frozen action.

    Raises:
        ValueError: something on the way to the output has no linear action; names the submodule.
    """
    traced = trace(module, inputs, target)
    values: dict[Any, Any] = dict(traced.tensors) | dict(zip(traced.inputs, inputs))
    kinds = {node: Value(Kind.FIXED) for node in traced.tensors}
    kinds |= {node: Value(Kind.LINEAR if i == 0 else Kind.GIVEN) for i, node in enumerate(traced.inputs)}
    rules = Rules(kinds, values, norm_mean)
    actions: dict[fx.Node, Action] = {}
    refused: dict[fx.Node, str] = {}
    with torch.no_grad(), plain_kernels():
        for call in traced.calls:
            values[call.node] = run(call, values)
            try:
                kinds[call.node], action = rules.decide(call)
            except ValueError as error:  # counts only if the output needs it
                kinds[call.node], action = Value(Kind.LINEAR), None
                refused[call.node] = str(error)
            if action is not None:
                actions[call.node] = action
    if (end := kinds[traced.output]).kind is not Kind.LINEAR:
        cause = f"is captured as a constant at {end.origin}" if end.origin else "does not depend on its input"
        raise ValueError(f"module: its output {cause}; interpret up to a submodule before it (target=...)")

    needed, wanted = {traced.output}, []
    for call in reversed(traced.calls):
        if call.node not in needed or call.node not in kinds or kinds[call.node].kind is not Kind.LINEAR:
            continue
        if call.node in refused:
            raise ValueError(refused[call.node])
        action = actions[call.node]
        linear = {n for n in call.node.all_input_nodes if kinds[n].kind is Kind.LINEAR}
        needed |= linear - set(action.operands)
        wanted.append((call, action))
    return assemble(traced.inputs, traced.output, traced.calls, wanted[::-1], kinds, values)


def assemble(
    inputs: tuple[fx.Node, ...],
    output: fx.Node,
    calls: tuple[Call, ...],
    wanted: list[tuple[Call, Action]],
    kinds: dict[fx.Node, Value],
    values: dict[Any, Any],
) -> Program:
    linear_calls: list[tuple[Call, Action, int | None]] = []
    constants: list[Constant] = []
    makers: dict[Any, Any] = {}
    kept: dict[Any, None] = {}
    for call, action in wanted:
        makers |= action.keep
        kept |= dict.fromkeys(action.keep)
        kept |= dict.fromkeys(n for n in action.operands if kinds[n].kind is not Kind.FIXED)
        place = None
        if action.constant is not None:
            first = values[call.node][0] if kinds[call.node].first else values[call.node]
            place = len(constants)
            constants.append(Constant(call.path, call.name, tuple(first.shape)))
        linear_calls.append((call, action, place))
    fixed = {n: values[n] for n, kind in kinds.items() if kind.kind is Kind.FIXED}
    return Program(
        inputs[0], inputs[1:], output, calls, tuple(linear_calls), fixed, tuple(kept), makers, tuple(constants)
    )


def run(call: Call, values: dict[Any, Any]) -> Any:
    out = call.op(*looked(call.args, values.__getitem__), **looked(call.kwargs, values.__getitem__))
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, out)
