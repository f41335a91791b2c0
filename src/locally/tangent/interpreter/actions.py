"""What every operation does once it is frozen: the linear action of a unit, and the constant that it adds.

A value of the pass is one of four kinds. FIXED comes from parameters alone, GIVEN from other inputs too, LINEAR is an
affine function of the variable once the units are frozen, and FROZEN depends on the variable but is captured as a
constant: attention weights, standard deviations, comparisons. FROZEN values may scale LINEAR ones and select among
them; they may neither be added to them nor be the output, for then the system would not be linear in the variable
alone. Every operation without a rule makes its result FROZEN, so that whatever is unknown is either harmless or named.

In a product of two LINEAR values one is the gate and is captured: the one that went through a unit, bounded before
unbounded, non-negative before signed (squeeze and excitation, gated linear units, LSTM cells).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import vjp

from locally.tangent.interpreter.trace import Call

Look = Callable[[Any], Any]  # a node, or the name of something captured, to its tensor
Captured = Callable[[Look], Tensor]


class Kind(IntEnum):
    FIXED = 0
    GIVEN = 1
    FROZEN = 2
    LINEAR = 3


class NormMean(StrEnum):
    """What a normalisation that measures its input does with the mean: apply it to the probe, or hold the input's."""

    LINEAR = "linear"
    CAPTURED = "captured"


@dataclass(frozen=True)
class Value:
    """Kind of a node; how much of a gate it is; for FROZEN ones the call that froze it.

    `first` marks several outputs of which only the first is LINEAR: indices and statistics stand beside it.
    """

    kind: Kind
    gate: int = 0
    origin: str = ""
    first: bool = False


@dataclass
class Action:
    """Replay of one call.

    `linear(tangent, value)` is its linear part, from the tangents of its LINEAR arguments and from what was captured:
    the values of `operands`, and what `keep` computes in the pass under a name. `constant` is what the call adds: a
    tensor, or the name of a captured one where it depends on the example.
    """

    linear: Callable[[Look, Look], Any]
    constant: Tensor | str | None = None
    keep: dict[str, Captured] = field(default_factory=dict)
    operands: tuple[fx.Node, ...] = ()


# Units: what is zero at zero scales by h(z) / z, the others by (h(z) - h(0)) / z and add h(0).
PIECEWISE = {"relu", "leaky_relu", "_prelu_kernel", "hardtanh", "clamp", "clamp_min", "clamp_max", "threshold"} | {
    "hardshrink", "softshrink", "abs", "hardsigmoid",
}  # fmt: skip
SMOOTH = {"tanh", "gelu", "silu", "mish", "elu", "celu", "sigmoid", "softplus", "log_sigmoid_forward", "hardswish"} | {
    "erf", "sin", "cos", "exp", "expm1", "log1p", "atan", "asinh", "sinh", "pow", "square",
}  # fmt: skip
NON_NEGATIVE, SIGNED, UNIT = 3, 2, 1
GATES = {"sigmoid": NON_NEGATIVE, "hardsigmoid": NON_NEGATIVE, "exp": NON_NEGATIVE, "tanh": SIGNED, "erf": SIGNED}
CLAMPS = {"hardtanh", "clamp"}

# Operations that are linear in one tensor, the first argument, whatever the others are.
STRUCTURAL = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "squeeze"),
    *("unsqueeze", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk"),
    *("narrow", "positive", "neg"),
    *("copy", "clone", "alias", "detach", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy"),
    *("flip", "roll", "repeat", "repeat_interleave", "index", "index_select", "gather", "tril", "triu", "diagonal"),
    *("sum", "mean", "cumsum", "trace", "unfold", "im2col", "col2im", "unfold_copy"),
    *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d"),
    *("_upsample_nearest_exact2d", "upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa"),
    *("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "grid_sampler_2d", "grid_sampler_3d"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "max_unpool2d"),
}  # fmt: skip

# Groups of arguments in which an operation is linear together while the other arguments are held.
LINEAR_IN: dict[str, tuple[tuple[int, ...], ...]] = {
    **dict.fromkeys(STRUCTURAL, ((0,),)),
    **dict.fromkeys(("add", "sub", "rsub", "select_scatter", "slice_scatter", "lerp"), ((0, 1),)),
    **dict.fromkeys(("mul", "mm", "bmm", "mv", "dot", "matmul"), ((0,), (1,))),
    **dict.fromkeys(("addmm", "baddbmm"), ((0, 1), (0, 2))),
    **dict.fromkeys(("constant_pad_nd", "masked_fill", "index_put", "_unsafe_index_put"), ((0, 2),)),
    **dict.fromkeys(("cat", "stack", "div"), ((0,),)),
    "where": ((1, 2),),
    "convolution": ((0, 2), (1, 2)),
}
# A gate stays a gate through these when everything else in them is fixed.
KEEPS_GATE = STRUCTURAL | {"mul", "div", "add", "sub", "rsub"}

# Operations that take nothing but shape and type from their tensor.
SHAPE_ONLY = {f"{name}_like" for name in ("zeros", "ones", "full", "empty")} | {
    "new_zeros", "new_ones", "new_full", "new_empty", "fill", "zero",
}  # fmt: skip

POOLS = {
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
    "fractional_max_pool2d": 2,
    "fractional_max_pool3d": 3,
}
EVAL_NORM = "_native_batch_norm_legit_no_training"
BATCH_NORMS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit", EVAL_NORM}
OTHER_NORMS = {"native_layer_norm", "native_group_norm", "_fused_rms_norm"}


@dataclass(frozen=True)
class Rules:
    """Gives each call its action and its result a kind; `values` and `kinds` are those of one example's pass."""

    kinds: dict[fx.Node, Value]
    values: dict[fx.Node, Any]
    norm_mean: NormMean

    def decide(self, call: Call) -> tuple[Value, Action | None]:
        """Raises ValueError, naming the submodule, when a captured value would be added to the system."""
        nodes = call.node.all_input_nodes
        if call.name in SHAPE_ONLY:
            nodes = nodes_in(call.args[1:])
        highest = max((self.kinds[n].kind for n in nodes), default=Kind.FIXED)
        if highest < Kind.LINEAR:
            frozen = [self.kinds[n].origin for n in nodes if self.kinds[n].origin]
            return Value(highest, origin=frozen[0] if frozen else ""), None
        if call.name == "getitem":
            return self._output(call)
        action, gate = self._action(call)
        if action is None:
            return Value(Kind.FROZEN, origin=f"{call.name} at {call.where}"), None
        several = isinstance(self.values[call.node], tuple | list) and call.name not in STRUCTURAL
        return Value(Kind.LINEAR, gate, first=several), action

    def _is_real(self, call: Call) -> bool:
        """Integers and truth values do not vary with the input as a linear system does."""
        value = self.values[call.node]
        first = value[0] if isinstance(value, tuple | list) else value
        return isinstance(first, Tensor) and first.is_floating_point()

    def _output(self, call: Call) -> tuple[Value, Action | None]:
        """One of several outputs: the values themselves, or the indices and statistics beside them."""
        many, i = call.args
        source = self.kinds[many]
        if i and source.first:
            return Value(Kind.FROZEN, origin=f"{many} at {call.where}"), None
        return Value(Kind.LINEAR, source.gate), Action(
            lambda tangent, _: tangent(many) if source.first else tangent(many)[i]
        )

    def _action(self, call: Call) -> tuple[Action | None, int]:
        name = call.name
        if call.kwargs.get("rounding_mode") or not self._is_real(call):
            return None, 0
        if name in LINEAR_IN:
            return self._affine(call)
        if (name in PIECEWISE or name in SMOOTH) and self._is_unit(call):
            return self._unit(call), self._gate_of(call)
        if name in POOLS:
            return self._pool(call, POOLS[name]), 0
        if name in ("max", "min", "amax", "amin", "maximum", "minimum"):
            return self._extreme(call), 0
        if name in BATCH_NORMS or name in OTHER_NORMS:
            return self._norm(call), 0
        if name == "glu":
            return self._glu(call), 0
        return None, 0

    # Linear operations -----------------------------------------------------------------------------------------------

    def _affine(self, call: Call) -> tuple[Action | None, int]:
        chosen = self._group(call)
        if chosen is None:
            twice = call.name == "mul" and call.args[0] is call.args[1]
            return (self._unit(call), 0) if twice else (None, 0)
        group = [n for i in chosen for n in nodes_in(call.args[i] if i < len(call.args) else None)]
        variable = [n for n in group if self.kinds[n].kind is Kind.LINEAR]
        for n in group:
            if self.kinds[n].kind is Kind.FROZEN:
                raise ValueError(
                    f"module: {call.where} adds a value with no linear action, {self.kinds[n].origin}, to the rest: it "
                    f"can only be captured as a factor; interpret up to a submodule before it (target=...)"
                )
        operands = tuple(n for n in call.node.all_input_nodes if n not in group)

        def linear(tangent: Look, value: Look) -> Any:
            varied = lambda n: tangent(n) if n in variable else torch.zeros_like(self.values[n])
            return call.op(*filled(call.args, chosen, varied, value), **looked(call.kwargs, value))

        def constant(value: Look) -> Tensor:
            if call.name == "convolution":
                return value(call.args[2]).reshape(1, -1, *[1] * (self.values[call.node].ndim - 2))
            varied = lambda n: torch.zeros_like(self.values[n]) if n in variable else value(n)
            return call.op(*filled(call.args, chosen, varied, value, scalars=True), **looked(call.kwargs, value))

        action = Action(linear, operands=operands)
        additive = [n for n in group if n not in variable]
        if additive or any(number(call.args[i]) for i in chosen if i < len(call.args)):
            if all(self.kinds[n].kind is Kind.FIXED for n in [*additive, *operands]):
                action.constant = constant(self.values.__getitem__)
            else:
                action.constant = f"{call.node} constant"
                action.keep = {action.constant: constant}
        others = [n for n in call.node.all_input_nodes if n not in variable]
        alone = len(variable) == 1 and all(self.kinds[n].kind is Kind.FIXED for n in others)
        gate = self.kinds[variable[0]].gate if alone and call.name in KEEPS_GATE else 0
        return action, gate

    def _group(self, call: Call) -> tuple[int, ...] | None:
        """The arguments that vary together; LINEAR ones outside of them are gates."""
        places = [i for i, a in enumerate(call.args) if any(self._linear(n) for n in nodes_in(a))]
        found = [g for g in LINEAR_IN[call.name] if set(places) & set(g)]
        if not found:
            return None
        rank = lambda g: max((self._rank(call.args[i]) for i in places if i in g), default=0)
        outside = lambda g: [i for i in places if i not in g]
        best = max(found, key=lambda g: -len(outside(g)) * 10 - rank(g))
        gates = outside(best)
        if not gates or call.name == "div":
            return best
        return best if all(self._rank(call.args[i]) > rank(best) for i in gates) else None

    def _linear(self, node: fx.Node) -> bool:
        return self.kinds[node].kind is Kind.LINEAR

    def _rank(self, argument: Any) -> int:
        return max((self.kinds[n].gate for n in nodes_in(argument)), default=0)

    # Units -----------------------------------------------------------------------------------------------------------

    def _is_unit(self, call: Call) -> bool:
        if call.name == "pow":
            return isinstance(call.args[1], int | float) and call.args[1] >= 1
        return call.name == "_prelu_kernel" or not any(nodes_in(a) for a in call.args[1:])

    def _gate_of(self, call: Call) -> int:
        if call.name not in CLAMPS:
            return GATES.get(call.name, UNIT)
        low, high = (-1, 1) if len(call.args) == 1 else (*call.args[1:3], None)[:2]
        if low is None or high is None:
            return UNIT
        return NON_NEGATIVE if low >= 0 else SIGNED

    def _unit(self, call: Call) -> Action:
        z = call.args[0]

        def h(u: Tensor, value: Look) -> Tensor:
            if call.name == "mish":  # its derivative as one operation cannot be batched
                return u * torch.tanh(torch.nn.functional.softplus(u))
            args = (u, u) if call.name == "mul" else (u, *looked(call.args[1:], value))
            out = call.op(*args, **looked(call.kwargs, value))
            return out[0] if isinstance(out, tuple) else out

        constant = None
        if call.name != "_prelu_kernel":  # its slopes are tensors, and it is zero at zero
            at_zero = h(self.values[z].new_zeros(()), self.values.__getitem__)
            constant = at_zero if bool(at_zero != 0) else None
        mask = f"{call.node} mask"

        def slope(value: Look) -> Tensor:
            u = value(z)
            if call.name == "relu":
                return u > 0
            rise = h(u, value) if constant is None else h(u, value) - constant
            # Close to zero the difference has lost its digits, and the slope half way is right to second order.
            near = u == 0 if call.name in PIECEWISE else u.abs() < torch.finfo(u.dtype).eps ** (1 / 3)
            half_way = vjp(lambda v: h(v, value), u / 2)[1](torch.ones_like(u))[0]
            return torch.where(near, half_way, rise / torch.where(u == 0, 1, u))

        operands = tuple(n for n in call.node.all_input_nodes if n is not z)
        return Action(lambda tangent, value: tangent(z) * value(mask), constant, {mask: slope}, operands)

    def _glu(self, call: Call) -> Action:
        z, dim = call.args[0], call.args[1] if len(call.args) > 1 else -1
        gate = f"{call.node} gate"
        keep = {gate: lambda value: torch.sigmoid(value(z).chunk(2, dim)[1])}
        return Action(lambda tangent, value: tangent(z).chunk(2, dim)[0] * value(gate), keep=keep)

    # Selections ------------------------------------------------------------------------------------------------------

    def _pool(self, call: Call, axes: int) -> Action:
        z = call.args[0]
        indices = f"{call.node} indices"

        def linear(tangent: Look, value: Look) -> Tensor:
            at = value(indices)
            return tangent(z).flatten(-axes).gather(-1, at.flatten(-axes)).unflatten(-1, at.shape[-axes:])

        return Action(linear, keep={indices: lambda value: value(call.node)[1]})

    def _extreme(self, call: Call) -> Action | None:
        """Maxima and minima take the entry that the pass took; equal entries of a reduction share."""
        if len(nodes_in(call.args)) == 2:
            return self._larger(call)
        z = call.args[0]
        if isinstance(self.values[call.node], tuple):
            return self._chosen(call)
        dims = call.args[1] if len(call.args) > 1 and call.args[1] else list(range(self.values[z].ndim))
        keepdim = len(call.args) > 2 and call.args[2]
        reduce = torch.amax if call.name in ("max", "amax") else torch.amin
        share = f"{call.node} share"

        def shares(value: Look) -> Tensor:
            best = value(z) == reduce(value(z), dims, True)
            return best / best.sum(dims, keepdim=True)

        return Action(
            lambda tangent, value: (tangent(z) * value(share)).sum(dims, keepdim=keepdim), keep={share: shares}
        )

    def _chosen(self, call: Call) -> Action:
        z, dim, keepdim = call.args[0], call.args[1], len(call.args) > 2 and call.args[2]
        index = f"{call.node} index"

        def chosen(value: Look) -> Tensor:
            at = value(call.node)[1]
            return at if keepdim else at.unsqueeze(dim)

        def linear(tangent: Look, value: Look) -> Tensor:
            out = tangent(z).gather(dim, value(index))
            return out if keepdim else out.squeeze(dim)

        return Action(linear, keep={index: chosen})

    def _larger(self, call: Call) -> Action | None:
        a, b = call.args[:2]
        if any(self.kinds[n].kind is Kind.FROZEN for n in (a, b)):
            return None
        first, added = f"{call.node} first", f"{call.node} constant"

        def is_first(value: Look) -> Tensor:
            return value(a) >= value(b) if call.name in ("max", "maximum") else value(a) <= value(b)

        def linear(tangent: Look, value: Look) -> Tensor:
            sides = [tangent(n) if self._linear(n) else torch.zeros_like(self.values[n]) for n in (a, b)]
            return torch.where(value(first), sides[0], sides[1])

        def constant(value: Look) -> Tensor:
            sides = [torch.zeros_like(value(n)) if self._linear(n) else value(n) for n in (a, b)]
            return torch.where(is_first(value), sides[0], sides[1])

        if self._linear(a) and self._linear(b):
            return Action(linear, keep={first: is_first})
        return Action(linear, added, {first: is_first, added: constant})

    # Normalisations --------------------------------------------------------------------------------------------------

    def _norm(self, call: Call) -> Action | None:
        name, args, shape = call.name, call.args, self.values[call.args[0]].shape
        channels = lambda w: w.reshape(-1, *[1] * (len(shape) - 2))
        centred, split, fit = True, shape, channels
        if name == "native_layer_norm":
            weight, bias, eps = args[2:5]
            axes, fit = tuple(range(len(shape) - len(args[1]), len(shape))), lambda w: w
        elif name == "_fused_rms_norm":
            weight, bias, eps, centred = args[2], None, args[3], False
            axes, fit = tuple(range(len(shape) - len(args[1]), len(shape))), lambda w: w
        elif name == "native_group_norm":
            weight, bias, groups, eps = args[1], args[2], args[6], args[7]
            axes, split = (2,), torch.Size((shape[0], groups, prod(shape[1:]) // groups))
        elif name == EVAL_NORM or not args[-3]:
            return self._running_norm(call, channels)
        else:  # instance norm: examples stand beside each other as channels
            weight, bias, eps = args[1], args[2], args[-1]
            axes = (0, *range(2, len(shape)))
        if any(self.kinds[n].kind is not Kind.FIXED for n in (weight, bias) if n is not None):
            return None
        scale = 1 if weight is None else fit(self.values[weight])
        shift = None if bias is None else fit(self.values[bias])
        z, inverse, added = args[0], f"{call.node} rstd", f"{call.node} constant"
        holds_mean = centred and self.norm_mean is NormMean.CAPTURED
        floor = torch.finfo(self.values[z].dtype).eps if eps is None else eps

        def rstd(value: Look) -> Tensor:
            u = value(z).reshape(split)
            power = u.var(axes, correction=0, keepdim=True) if centred else u.square().mean(axes, keepdim=True)
            return (power + floor).rsqrt()

        def linear(tangent: Look, value: Look) -> Tensor:
            u = tangent(z).reshape(split)
            if centred and not holds_mean:
                u = u - u.mean(axes, keepdim=True)
            return (u * value(inverse)).reshape(shape) * scale

        def constant(value: Look) -> Tensor:
            mean = value(z).reshape(split).mean(axes, keepdim=True)
            out = (-mean * rstd(value)).expand(split).reshape(shape) * scale
            return out if shift is None else out + shift

        if holds_mean:
            return Action(linear, added, {inverse: rstd, added: constant})
        return Action(linear, shift, {inverse: rstd})

    def _running_norm(self, call: Call, channels: Callable[[Tensor], Tensor]) -> Action:
        z, weight, bias, mean, variance = call.args[:5]
        own = self.values.__getitem__
        scale = (own(variance) + call.args[-1]).rsqrt() * (1 if weight is None else own(weight))
        shift = (0 if bias is None else own(bias)) - own(mean) * scale
        scale, shift = channels(scale), channels(shift)
        return Action(lambda tangent, _: tangent(z) * scale, shift)


def nodes_in(argument: Any) -> list[fx.Node]:
    if isinstance(argument, fx.Node):
        return [argument]
    if isinstance(argument, Sequence) and not isinstance(argument, str):
        return [n for a in argument for n in nodes_in(a)]
    return []


def number(argument: Any) -> bool:
    return isinstance(argument, int | float) and not isinstance(argument, bool) and argument != 0


def looked(argument: Any, look: Look) -> Any:
    """An argument with the nodes in it replaced by their tensors."""
    return fx.node.map_arg(argument, look)


def filled(args: tuple[Any, ...], group: tuple[int, ...], held: Look, look: Look, scalars: bool = False) -> list[Any]:
    """Arguments in `group` by `held`, the others by `look`; numbers in the group count as zero unless `scalars`."""
    out = []
    for i, a in enumerate(args):
        if i not in group:
            out.append(looked(a, look))
        elif number(a) and not scalars:
            out.append(0)
        else:
            out.append(looked(a, held))
    return out
