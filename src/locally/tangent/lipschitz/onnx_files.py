"""ONNX files as networks: the operators that the bounds know, read with the `onnx` package."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locally.checks import check_finite
from locally.tangent.lipschitz.activations import Activation, gelu, gelu_tanh, leaky_relu, relu, sigmoid, softplus, tanh
from locally.tangent.lipschitz.by_hand import ByHand, Part, Ref, Spread, Squared, unknown
from locally.tangent.lipschitz.layers import Builder, add_max_pool
from locally.tangent.lipschitz.network import Network
from locally.tangent.lipschitz.operations import Convolution, Dense, Diagonal, normalisation


def read_onnx(path: str | Path, device: torch.device | str = "cpu") -> Network:
    """The graph of an ONNX file with one input and one output, in double precision; pass it where a model is asked for.

    Raises:
        ImportError: the `onnx` package is missing.
        ValueError: the file is not an ONNX model, has several inputs, or holds an operator that is not supported; the
            message names the operator and its node.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("read_onnx needs the onnx package: pip install 'locally[onnx]'") from error
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except FileNotFoundError:
        raise
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise ValueError(f"path: {path} is not a valid ONNX model: {str(error).splitlines()[0]}") from error
    return Graph(model.graph, torch.device(device)).network()


Value = int | Tensor | Squared | Spread
WIDE = (1, 11)  # single and double precision, in ONNX's numbering
ROOTS = {"Sqrt": 0.5, "Reciprocal": -1.0}


class Graph:
    """One ONNX graph on its way into nodes; `values` maps names to node indices, constants and unfinished squares."""

    def __init__(self, graph: Any, device: torch.device) -> None:
        from onnx import numpy_helper

        self.graph, self.device = graph, device
        self.to_array = numpy_helper.to_array
        self.values: dict[str, Value] = {t.name: self._tensor(t) for t in graph.initializer}
        inputs = [i for i in graph.input if i.name not in self.values]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise ValueError(
                f"path: the model needs one input and one output, it has {len(inputs)} and {len(graph.output)}"
            )
        sizes = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
        if len(sizes) < 2 or not all(sizes[1:]):
            raise ValueError(f"path: input {inputs[0].name} must have fixed sizes after the batch, got {sizes}")
        self.builder = Builder(tuple(sizes[1:]), device)
        self.by_hand = ByHand(self.builder)
        self.values[inputs[0].name] = 0

    def network(self) -> Network:
        for node in self.graph.node:
            where = f"{node.op_type} ({node.name or node.output[0]})"
            attributes = {a.name: self._attribute(a) for a in node.attribute}
            operands = [self.values.get(name) if name else None for name in node.input]
            try:
                self.values[node.output[0]] = self._node(node.op_type, operands, attributes, where)
            except RuntimeError as error:
                raise ValueError(f"path: {where} does not fit its input: {error}") from error
        out = self.values[self.graph.output[0].name]
        if isinstance(out, Squared | Spread):
            raise unknown(out.where)
        if not isinstance(out, int):
            raise ValueError("path: the output does not depend on the input")
        return self.builder.finish(out)

    def _tensor(self, proto: Any) -> Tensor:
        array = np.array(self.to_array(proto))
        if np.issubdtype(array.dtype, np.floating):
            array = array.astype(np.float64)
            check_finite(f"path: {proto.name}", array)
        return torch.from_numpy(array).to(self.device)

    def _attribute(self, attribute: Any) -> Any:
        import onnx

        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            return self._tensor(value)
        return value.decode() if isinstance(value, bytes) else value

    def _node(self, kind: str, operands: list[Any], at: dict[str, Any], where: str) -> Value:
        b = self.builder
        if kind == "Constant":
            return at["value"]
        x = operands[0]
        if kind in ("Add", "Sub", "Mul", "Div"):
            return self._arithmetic(kind, x, operands[1], where)
        if kind == "Concat":
            if not all(isinstance(o, int) for o in operands):
                raise ValueError(f"path: {where} joins constants, which is not supported")
            return b.concatenate(operands, at["axis"], where)
        if kind in ("Pow", "Sqrt", "Reciprocal") or isinstance(x, Squared | Spread):
            return self._by_hand(kind, x, operands, at, where)
        if not isinstance(x, int) or any(isinstance(o, int | Squared | Spread) for o in operands[1:]):
            raise ValueError(f"path: {where} is not supported: it must act on one value that depends on the input")
        activations: dict[str, Callable[[], Activation]] = {
            "Relu": relu,
            "Tanh": tanh,
            "Sigmoid": sigmoid,
            "Softplus": softplus,
            "LeakyRelu": lambda: leaky_relu(at.get("alpha", 0.01)),
        }
        if kind in activations:
            return b.activation(activations[kind](), x, where)
        if kind == "Gelu":
            return b.activation(gelu_tanh() if at.get("approximate", "none") == "tanh" else gelu(), x, where)
        if kind in ("Identity", "Dropout") or (kind == "Cast" and at["to"] in WIDE):
            return x
        if kind == "Neg":
            return b.affine(Diagonal(b.like.new_tensor(-1.0), None), x, where)
        if kind in ("Gemm", "MatMul"):
            return self._product(kind, x, operands, at, where)
        if kind in ("Conv", "ConvTranspose"):
            return self._convolution(kind, x, operands, at, where)
        if kind == "BatchNormalization":
            scale, shift, mean, variance = operands[1:5]
            epsilon = at.get("epsilon", 1e-5)
            return b.affine(normalisation(mean, variance, scale, shift, epsilon, len(b.nodes[x].shape)), x, where)
        if kind in ("LayerNormalization", "RMSNormalization"):
            return self._normalisation(kind, x, operands, at, where)
        return self._shape_or_pool(kind, x, operands, at, where)

    def _normalisation(self, kind: str, x: int, operands: list[Any], at: dict[str, Any], where: str) -> int:
        shape = self.builder.nodes[x].shape
        axis = at.get("axis", -1)
        first = axis - 1 if axis > 0 else axis + len(shape)
        if axis == 0 or first < 0:
            raise ValueError(f"path: {where} normalises over the batch, which is not supported")
        bias = operands[2] if len(operands) > 2 else None
        centred = kind == "LayerNormalization"
        return self.builder.normalise(
            shape[first:], at.get("epsilon", 1e-5), operands[1], bias, x, where, centred=centred
        )

    def _by_hand(self, kind: str, x: Any, operands: list[Any], at: dict[str, Any], where: str) -> Value:
        """Squares and what becomes of them."""
        if isinstance(x, Tensor):
            return x.pow(ROOTS[kind] if kind in ROOTS else operands[1])
        if kind == "Cast" and at["to"] in WIDE:
            return x
        if kind in ("ReduceMean", "ReduceSum") and isinstance(x, Squared):
            keep = bool(at.get("keepdims", 1))
            return self.by_hand.reduce(x, reduced(operands, at), keep, total=kind == "ReduceSum", where=where)
        if kind == "Pow" or kind in ROOTS:
            part: Part = Ref(x) if isinstance(x, int) else x
            return unwrapped(self.by_hand.power(part, ROOTS[kind] if kind in ROOTS else operands[1], where))
        raise unknown(where)

    def _arithmetic(self, kind: str, left: Any, right: Any, where: str) -> Value:
        b = self.builder
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return getattr(torch, kind.lower())(left, right)
        one, other = (Ref(a) if isinstance(a, int) else a for a in (left, right))
        if (found := self.by_hand.arithmetic(kind.lower(), one, other, where)) is not None:
            return unwrapped(found)
        if isinstance(left, int) and isinstance(right, int):
            if kind not in ("Add", "Sub") or b.nodes[left].shape != b.nodes[right].shape:
                raise ValueError(f"path: {where} of two values that depend on the input is not supported")
            return b.sum((left, right), (1.0, 1.0 if kind == "Add" else -1.0), where)
        x, constant = (left, right) if isinstance(left, int) else (right, left)
        shape = b.nodes[x].shape
        if constant.ndim > len(shape):
            if constant.shape[0] != 1:
                raise ValueError(f"path: {where} has a constant with a batch dimension")
            constant = constant[0]
        if torch.broadcast_shapes(constant.shape, shape) != torch.Size(shape):
            raise ValueError(f"path: {where} broadcasts its input, which is not supported")
        if kind == "Div":
            if x is right:
                raise ValueError(f"path: {where} divides by a value that depends on the input: not supported")
            return b.affine(Diagonal(1 / constant, None), x, where)
        if kind == "Mul":
            return b.affine(Diagonal(constant, None), x, where)
        if kind == "Sub" and x is right:
            return b.affine(Diagonal(b.like.new_tensor(-1.0), constant), x, where)
        return b.affine(Diagonal(None, -constant if kind == "Sub" else constant), x, where)

    def _product(self, kind: str, x: int, operands: list[Any], at: dict[str, Any], where: str) -> int:
        weight = operands[1]
        if weight.ndim != 2 or at.get("transA", 0):
            raise ValueError(f"path: {where} is supported for a constant matrix on the right only")
        weight = weight if at.get("transB", 0) else weight.T
        bias = operands[2] if len(operands) > 2 else None
        if bias is not None:
            bias = (at.get("beta", 1.0) * bias).expand(1, len(weight))[0] if bias.ndim else bias.expand(len(weight))
        return self.builder.affine(Dense((at.get("alpha", 1.0) * weight).contiguous(), bias), x, where)

    def _convolution(self, kind: str, x: int, operands: list[Any], at: dict[str, Any], where: str) -> int:
        weight = operands[1]
        n = weight.ndim - 2
        if at.get("auto_pad", "NOTSET") != "NOTSET":
            raise ValueError(f"path: {where} pads automatically, which is not supported")
        ones = [1] * n
        begin, end = self._pads(at, n)
        extra = None
        if kind == "ConvTranspose":
            if begin != end or "output_shape" in at:
                raise ValueError(f"path: {where} has uneven padding or a set output shape, which is not supported")
            extra = list(at.get("output_padding", [0] * n))
        elif begin != end:
            x = self._pad(x, begin, end, where)
            begin = [0] * n
        op = Convolution(
            weight,
            operands[2] if len(operands) > 2 else None,
            self.builder.nodes[x].shape,
            at.get("strides", ones),
            begin,
            at.get("dilations", ones),
            at.get("group", 1),
            extra,
        )
        return self.builder.affine(op, x, where)

    @staticmethod
    def _pads(at: dict[str, Any], n: int) -> tuple[list[int], list[int]]:
        pads = list(at.get("pads", [0] * 2 * n))
        return pads[:n], pads[n:]

    def _pad(self, x: int, begin: Sequence[int], end: Sequence[int], where: str) -> int:
        sides = [side for pair in zip(reversed(begin), reversed(end)) for side in pair]
        return self.builder.rearrange(lambda v: F.pad(v, sides), x, where)

    def _shape_or_pool(self, kind: str, x: int, operands: list[Any], at: dict[str, Any], where: str) -> int:
        b = self.builder
        shape = b.nodes[x].shape
        if kind == "Flatten":
            if at.get("axis", 1) != 1:
                raise ValueError(f"path: {where} mixes the batch dimension with others")
            return b.reshape(x, (b.nodes[x].size,), where)
        if kind == "Reshape":
            target = [int(s) for s in operands[1]]
            out = torch.empty(1, *shape).reshape([1, *target[1:]]).shape
            return b.reshape(x, tuple(out[1:]), where)
        if kind in ("Squeeze", "Unsqueeze"):
            axes = [int(a) for a in (operands[1] if len(operands) > 1 else at["axes"])]
            stand_in = torch.empty(2, *shape)  # a batch of two, so that axis 0 cannot be squeezed away
            for axis in sorted(axes, reverse=kind == "Squeeze"):
                stand_in = getattr(stand_in, kind.lower())(axis)
            return b.reshape(x, tuple(stand_in.shape[1:]), where)
        if kind == "Transpose":
            order = at["perm"]
            return b.rearrange(lambda v: v.permute(*order), x, where)
        if kind == "ReduceMean":
            over, keep = reduced(operands, at), bool(at.get("keepdims", 1))
            mean = b.rearrange(lambda v: v.mean(over, keepdim=keep), x, where)
            self.by_hand.note_mean(mean, x, over, keep)
            return mean
        if kind == "GlobalAveragePool":
            axes = list(range(2, len(shape) + 1))
            return b.rearrange(lambda v: v.mean(axes, keepdim=True), x, where)
        if kind in ("AveragePool", "MaxPool") and len(shape) == 3 and at.get("auto_pad", "NOTSET") == "NOTSET":
            return self._pool(kind, x, at, where)
        raise ValueError(f"path: {where} is not supported")

    def _pool(self, kind: str, x: int, at: dict[str, Any], where: str) -> int:
        begin, end = self._pads(at, 2)
        if begin != end:
            raise ValueError(f"path: {where} has uneven padding, which is not supported")
        kernel: Any = tuple(at["kernel_shape"])
        stride: Any = tuple(at.get("strides", [1, 1]))
        padding: Any = tuple(begin)
        dilation: Any = tuple(at.get("dilations", [1, 1]))
        ceil = bool(at.get("ceil_mode", 0))
        if kind == "MaxPool":
            return add_max_pool(self.builder, nn.MaxPool2d(kernel, stride, padding, dilation, False, ceil), x, where)
        if dilation != (1, 1):
            raise ValueError(f"path: {where} is dilated, which is not supported")
        pool = nn.AvgPool2d(kernel, stride, padding, ceil, bool(at.get("count_include_pad", 0)))
        return self.builder.rearrange(pool, x, where)


def reduced(operands: list[Any], at: dict[str, Any]) -> list[int]:
    """Axes of a reduction, which newer files give as an input; without any, all but the batch would be left."""
    given = operands[1] if len(operands) > 1 and operands[1] is not None else at.get("axes", [0])
    return [int(a) for a in given]


def unwrapped(part: Part) -> int | Squared | Spread:
    return part.index if isinstance(part, Ref) else part
