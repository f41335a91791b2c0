"""What is left of a model, and the blocks that it makes: real smaller layers, whatever their widths.

A cut names the groups of a sub-layer that stay and carries the refitted output weights. Blocks without any head or any
neuron are allowed. Query heads of one block may share key and value heads unevenly: then these are repeated in the
order in which the queries need them, after their projection, so that only the cache grows and no weight does.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from locally.sequence.structured_pruning.network import Block, Network


@dataclass(frozen=True)
class Cut:
    """What stays of one sub-layer."""

    kept: Int[Tensor, " kept"]  # query heads or neurons, ascending
    weight: Float[Tensor, "hidden width"]  # of o_proj or down_proj, columns of what is kept
    bias: Float[Tensor, " hidden"] | None = None  # added to the output; the dense bias where there is one


class BlockCut(NamedTuple):
    """Of one block; None leaves a sub-layer dense."""

    heads: Cut | None
    neurons: Cut | None


@runtime_checkable
class Plan(Protocol):
    """A cut for every block, read when asked for. A list of `BlockCut` is one."""

    def __getitem__(self, b: int, /) -> BlockCut: ...

    def __len__(self) -> int: ...


class Shape(NamedTuple):
    """Sizes of one block."""

    kv_index: tuple[int, ...]  # for each query head its key and value head, counted among those that are left
    kv_heads: int
    neurons: int

    @property
    def query_heads(self) -> int:
        return len(self.kv_index)

    @property
    def even(self) -> bool:
        """Every key and value head serves as many queries, in order: grouped attention as it is."""
        if not self.kv_heads or self.query_heads % self.kv_heads:
            return not self.kv_heads
        per_head = self.query_heads // self.kv_heads
        return self.kv_index == tuple(i // per_head for i in range(self.query_heads))


def shape_of(network: Network, cut: BlockCut) -> tuple[Shape, list[int]]:
    """Sizes of a block after a cut, and which of the dense key and value heads are left."""
    heads = range(network.heads) if cut.heads is None else cut.heads.kept.tolist()
    per_head = network.heads // network.kv_heads
    kv = sorted({h // per_head for h in heads})
    neurons = network.neurons if cut.neurons is None else len(cut.neurons.kept)
    return Shape(tuple(kv.index(h // per_head) for h in heads), len(kv), neurons), kv


def narrow(network: Network, block: Block, cut: BlockCut) -> Block:
    """The block with the cut carried out; the block itself stays as it is, and what is not cut is shared with it."""
    shape, kv = shape_of(network, cut)
    with torch.device("meta"):
        fresh = (cut.heads is not None, cut.neurons is not None)
        small = shaped(block, shape, network.head_dim, biases_of(cut), fresh)
    if cut.heads is not None and shape.query_heads:
        dense, attention = block.self_attn, small.self_attn
        size = network.head_dim
        for name, groups in (("q_proj", cut.heads.kept.tolist()), ("k_proj", kv), ("v_proj", kv)):
            rows = torch.tensor([g * size + i for g in groups for i in range(size)])
            _take_rows(getattr(attention, name), getattr(dense, name), rows)
        _assign(attention.o_proj, cut.heads.weight, cut.heads.bias, like=dense.o_proj)
    elif cut.heads is not None:
        _assign(small.self_attn, None, cut.heads.bias, like=block.self_attn.o_proj)
    if cut.neurons is not None and shape.neurons:
        for name in ("gate_proj", "up_proj"):
            _take_rows(getattr(small.mlp, name), getattr(block.mlp, name), cut.neurons.kept)
        _assign(small.mlp.down_proj, cut.neurons.weight, cut.neurons.bias, like=block.mlp.down_proj)
    elif cut.neurons is not None:
        _assign(small.mlp, None, cut.neurons.bias, like=block.mlp.down_proj)
    return small


def biases_of(cut: BlockCut) -> tuple[bool | None, bool | None]:
    """Whether the outputs of attention and of the feed-forward part get a bias; None: as in the dense block."""
    heads, neurons = (None if part is None else part.bias is not None for part in cut)
    return heads, neurons


def shaped(
    block: Block,
    shape: Shape,
    head_dim: int,
    biases: tuple[bool | None, bool | None] = (None, None),
    fresh: tuple[bool, bool] = (False, False),
) -> Block:
    """A copy of a block with linear layers of these sizes.

    Attention and feed-forward part of unchanged size are shared with the original, unless `fresh` says otherwise.
    """
    small = _twin(block)
    attention, mlp = block.self_attn, block.mlp
    hidden = attention.q_proj.in_features
    with_bias = lambda module, wanted: module.bias is not None if wanted is None else wanted
    sized = lambda module, d_in, d_out, bias=None: nn.Linear(d_in, d_out, bias=with_bias(module, bias))
    o_bias, down_bias = (with_bias(m, b) for m, b in zip((attention.o_proj, mlp.down_proj), biases))
    if shape.query_heads == 0:
        small.self_attn = AbsentAttention(attention.layer_idx, hidden if o_bias else 0)
    elif (
        fresh[0]
        or shape.query_heads * head_dim != attention.q_proj.out_features
        or o_bias != (attention.o_proj.bias is not None)
    ):
        small.self_attn = _twin(attention)
        small.self_attn.q_proj = sized(attention.q_proj, hidden, shape.query_heads * head_dim)
        for name in ("k_proj", "v_proj"):
            projection = sized(getattr(attention, name), hidden, shape.kv_heads * head_dim)
            setattr(small.self_attn, name, projection if shape.even else RepeatedLinear(projection, shape.kv_index))
        small.self_attn.num_key_value_groups = shape.query_heads // shape.kv_heads if shape.even else 1
        small.self_attn.o_proj = sized(attention.o_proj, shape.query_heads * head_dim, hidden, o_bias)
    if shape.neurons == 0:
        small.mlp = AbsentMLP(hidden if down_bias else 0)
    elif fresh[1] or shape.neurons != mlp.gate_proj.out_features or down_bias != (mlp.down_proj.bias is not None):
        small.mlp = _twin(mlp)
        small.mlp.gate_proj = sized(mlp.gate_proj, hidden, shape.neurons)
        small.mlp.up_proj = sized(mlp.up_proj, hidden, shape.neurons)
        small.mlp.down_proj = sized(mlp.down_proj, shape.neurons, hidden, down_bias)
    return small


class AbsentAttention(nn.Module):
    """Attention without heads: zero, or a bias.

    It puts a key of width one into the cache, since models read the number of tokens seen from the first block's.
    """

    def __init__(self, layer_idx: int, bias: int = 0) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.bias = nn.Parameter(torch.zeros(bias)) if bias else None

    def forward(self, hidden_states: Tensor, *_: Any, **given: Any) -> tuple[Tensor, None]:
        past = given.get("cache", given.get("past_key_values"))
        if past is not None:
            key = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past.update(key, key, self.layer_idx)
        return _constant(hidden_states, self.bias), None


class AbsentMLP(nn.Module):
    """A feed-forward part without neurons: zero, or a bias."""

    def __init__(self, bias: int = 0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return _constant(x, self.bias)


class RepeatedLinear(nn.Linear):
    """Projection to a few heads, whose outputs are then repeated in a given order."""

    def __init__(self, plain: nn.Linear, index: Sequence[int]) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.index = tuple(index)
        self._placed: dict[torch.device, Tensor] = {}  # no buffer: what loads checkpoints would have to fill it

    def forward(self, input: Tensor) -> Tensor:
        if input.device not in self._placed:
            self._placed[input.device] = torch.tensor(self.index, device=input.device)
        y = F.linear(input, self.weight, self.bias)
        heads = y.unflatten(-1, (max(self.index) + 1, -1))
        return heads.index_select(-2, self._placed[input.device]).flatten(-2)


def _constant(like: Tensor, bias: Tensor | None) -> Tensor:
    return torch.zeros_like(like) if bias is None else bias.expand_as(like)


def _twin(module: nn.Module) -> Any:
    """Another module with the same parts, whose parts can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _take_rows(small: nn.Linear, dense: nn.Linear, rows: Tensor) -> None:
    rows = rows.to(dense.weight.device)
    bias = None if dense.bias is None else dense.bias.detach()[rows]
    _assign(small, dense.weight.detach()[rows], bias, like=dense)


def _assign(small: nn.Module, weight: Tensor | None, bias: Tensor | None, like: nn.Linear) -> None:
    """Give a module of the meta device its tensors, of the dtype and on the device of the dense layer."""
    place = lambda x: nn.Parameter(x.detach().to(like.weight.device, like.weight.dtype), requires_grad=False)
    if weight is not None:
        small.weight = place(weight)
    if bias is not None:
        small.bias = place(bias)
