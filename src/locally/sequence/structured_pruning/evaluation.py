"""What is left of a model's quality and what is gained in speed and size."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from locally.checks import check_count
from locally.sequence.structured_pruning.cuts import Plan, narrow, shape_of
from locally.sequence.structured_pruning.network import Network, open_network
from locally.sequence.structured_pruning.validity import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def log_likelihoods(
    model: "PreTrainedModel | Network | str | Path",
    ids: Int[Tensor, "N T"],
    *,
    plan: Plan | None = None,
    batch: int = 8,
) -> Float[Tensor, "N positions"]:
    """Of tokens 1, 2, ... of each sequence given those before, with the cuts of `plan`.

    A folder, or a model with a plan, goes one block at a time, so that it need not fit into memory; hidden states of
    `ids` must. A model without a plan, which may be a pruned one or any other causal model, is called as it is.
    """
    check_count("batch", batch)
    parts = [slice(i, i + batch) for i in range(0, len(ids), batch)]
    if plan is None and isinstance(model, nn.Module):
        check_ids("ids", ids, model.config)
        with torch.no_grad():
            return torch.cat([_of_next(model(ids[p].to(model.device)).logits, ids[p]) for p in parts])
    network = open_network(model)
    check_ids("ids", ids, network.config)
    hidden = [network.embed(ids[part]) for part in parts]
    for b in range(network.depth):
        block = network.block(b)
        block = block if plan is None else narrow(network, block, plan[b])
        hidden = [network.run(b, block, h) for h in hidden]
        del block  # before the next is read: one at a time
    return torch.cat([_of_next(network.logits(h), ids[part]) for part, h in zip(parts, hidden)])


def _of_next(logits: Float[Tensor, "batch T vocabulary"], ids: Int[Tensor, "batch T"]) -> Tensor:
    likelihoods = logits[:, :-1].float().log_softmax(-1).cpu()
    return likelihoods.gather(-1, ids[:, 1:].long().cpu().unsqueeze(-1)).squeeze(-1)


def perplexity(
    model: "PreTrainedModel | Network | str | Path",
    ids: Int[Tensor, "N T"],
    *,
    plan: Plan | None = None,
    batch: int = 8,
) -> float:
    """exp of the mean negative log likelihood of tokens 1, 2, ... of each sequence; see `log_likelihoods`."""
    return math.exp(-float(log_likelihoods(model, ids, plan=plan, batch=batch).double().mean()))


@dataclass(frozen=True)
class Size:
    """Of a model, dense or pruned."""

    query_heads: int
    kv_heads: int
    neurons: int
    block_parameters: int
    parameters: int  # of the whole model, tied weights once
    flops_per_token: int  # of its linear layers, a multiplication and an addition each; attention scores are left out

    def __sub__(self, other: "Size") -> "Size":
        return Size(*(a - b for a, b in zip(vars(self).values(), vars(other).values())))


def size_of(model: "PreTrainedModel | Network | str | Path", plan: Plan | None = None) -> Size:
    """Count without building anything: sizes follow from the configuration and the plan."""
    network = open_network(model)
    h, d = network.hidden, network.head_dim
    block = network.block(0)
    attention, mlp = block.self_attn, block.mlp
    q_bias = attention.q_proj.bias is not None
    per_block = sum(p.numel() for n, p in block.named_parameters() if "norm" in n)
    queries = kv = neurons = parameters = weights = 0
    for b in range(network.depth):
        if plan is None:
            n_q, n_kv, n_f = network.heads, network.kv_heads, network.neurons
            biases = (attention.o_proj.bias is not None, mlp.down_proj.bias is not None)
        else:
            cut = plan[b]
            shape, _ = shape_of(network, cut)
            n_q, n_kv, n_f = shape.query_heads, shape.kv_heads, shape.neurons
            outputs = (attention.o_proj, mlp.down_proj)
            biases = tuple((o if c is None else c).bias is not None for o, c in zip(outputs, cut))  # type: ignore[assignment]
        linear = h * d * (2 * n_q + 2 * n_kv) + 3 * h * n_f
        extra = (n_q + 2 * n_kv) * d * q_bias + 2 * n_f * (mlp.gate_proj.bias is not None) + h * sum(biases)
        norms = per_block if n_q else per_block - sum(p.numel() for n, p in attention.named_parameters() if "norm" in n)
        queries, kv, neurons = queries + n_q, kv + n_kv, neurons + n_f
        parameters += linear + extra + norms
        weights += linear
    vocabulary = network.config.vocab_size * h
    ends = vocabulary * (1 if network.config.tie_word_embeddings else 2) + h
    return Size(queries, kv, neurons, parameters, parameters + ends, 2 * (weights + vocabulary))


@dataclass(frozen=True)
class Speed:
    """Tokens per second."""

    prefill: float
    decode: float


def tokens_per_second(
    model: "PreTrainedModel", ids: Int[Tensor, "batch T"], *, new_tokens: int = 16, repeats: int = 3
) -> Speed:
    """Fastest of `repeats` of a forward pass over the prompt, and of greedy decoding with a cache after it."""
    check_count("new_tokens", new_tokens)
    check_count("repeats", repeats)
    ids = ids.to(next(model.parameters()).device)
    prefill, decode = math.inf, math.inf
    with torch.no_grad():
        for _ in range(repeats):
            start = _now(ids)
            out: Any = model(ids, use_cache=True)
            prefill = min(prefill, _now(ids) - start)
            cache = getattr(out, "cache", None) or out.past_key_values
            name = "cache" if hasattr(out, "cache") else "past_key_values"
            token = out.logits[:, -1:].argmax(-1)
            start = _now(ids)
            for _ in range(new_tokens):
                token = model(token, use_cache=True, **{name: cache}).logits[:, -1:].argmax(-1)
            decode = min(decode, _now(ids) - start)
    return Speed(ids.numel() / prefill, ids.shape[0] * new_tokens / decode)


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
