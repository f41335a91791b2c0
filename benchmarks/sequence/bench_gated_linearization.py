"""Decoding and prefill over the length to 32k tokens: converted models beside Llama with Transformers' caches.

Time a token and bytes of memory on the CPU, the chunkwise form against the token-by-token loop and PyTorch's SDPA.
Flash-linear-attention's kernels, the peer on GPUs, need one and are not timed here.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from benchmarks.harness import Comparison, compare, growth
from locally.sequence.gated_linearization import (
    LigerCache,
    LigerConfig,
    cache_bytes,
    gated_linear_attention,
    gated_slot_attention,
    linearize,
)

CONTEXTS = (256, 1024, 4096, 16384, 32768)
ROUNDS = 7


def main() -> list[Comparison]:
    with torch.no_grad():
        results = [*decoding(), *memory(), *forms()]
    return results + training()


def models(kv_heads: int = 8) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2**17,
    )
    original = LlamaForCausalLM(config).eval()
    return original, linearize(original, LigerConfig(window=64))


def fill(cache: Cache, model: PreTrainedModel, context: int) -> Cache:
    """Random keys and values, on which the time of a step does not depend."""
    config = model.config
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, context, config.head_dim)
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def growing(model: PreTrainedModel, context: int) -> Cache:
    return fill(DynamicCache(config=model.config), model, context)


def preallocated(model: PreTrainedModel, context: int) -> Cache:
    return fill(StaticCache(config=model.config, max_cache_len=context + 200), model, context)


def read(model: PreTrainedModel, context: int) -> LigerCache:
    """The memory after a real pass over so many tokens."""
    cache = LigerCache(model.config)
    model(torch.randint(0, 64, (1, context)), cache=cache, logits_to_keep=1)
    return cache


def step(model: PreTrainedModel, cache: Cache, tokens: int = 8):  # type: ignore[no-untyped-def]
    token = torch.zeros(1, 1, dtype=torch.long)
    return lambda: [model(token, cache=cache) for _ in range(tokens)]


def decoding() -> list[Comparison]:
    original, converted = models()
    results = []
    for context in CONTEXTS:
        ours = ("converted", step(converted, read(converted, context)))
        for label, cache in (("growing cache", growing), ("preallocated cache", preallocated)):
            theirs = (f"Llama, {label}", step(original, cache(original, context)))
            results.append(compare(f"8 tokens after {context}", ours, theirs, rounds=ROUNDS))
    results.append(
        growth("8 tokens over the context", "converted", CONTEXTS, lambda n: step(converted, read(converted, n)))
    )
    results.append(
        growth(
            "8 tokens over the context",
            "Llama, growing cache",
            CONTEXTS,
            lambda n: step(original, growing(original, n)),
        )
    )
    return results


def memory() -> list[Comparison]:
    results = []
    for kv_heads in (8, 2):
        original, converted = models(kv_heads)
        held = {"converted": [], "Llama": []}  # type: dict[str, list[int]]
        for context in CONTEXTS:
            held["converted"].append(cache_bytes(read(converted, context)))
            held["Llama"].append(cache_bytes(growing(original, context)))
        name = f"memory of decoding over the context, {kv_heads} key heads"
        for model, sizes in held.items():
            slope = float(np.polyfit(np.log(CONTEXTS), np.log(sizes), 1)[0])
            detail = {"sizes": list(CONTEXTS), "bytes": sizes}
            results.append(Comparison(name, "growth exponent", slope, slope, slope, model, detail=detail))
        for context, ours, theirs in zip(CONTEXTS, *held.values()):
            ratio = ours / theirs
            where = f"memory after {context} tokens, {kv_heads} key heads"
            results.append(Comparison(where, "bytes", ratio, ratio, ratio, "converted", "Llama"))
    return results


def tensors(n: int, grad: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    q, k, v, g = (torch.randn(1, 8, n, 32, generator=generator) for _ in range(4))
    found = q.softmax(-1), k.softmax(-1), v, logsigmoid(g) / 16
    return tuple(x.requires_grad_(grad) for x in found)  # type: ignore[return-value]


def ready(attention: Callable[..., object], n: int) -> Callable[[], object]:
    inputs = tensors(n)
    return lambda: attention(*inputs)


def sdpa(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def forms() -> list[Comparison]:
    """One layer's recurrence, 8 heads of dimension 32."""
    results = []
    for name, attention in (("gated linear attention", gated_linear_attention), ("gated slots", gated_slot_attention)):
        chunk = partial(ready, attention)
        loop = partial(ready, partial(attention, mode="recurrent"))
        ours = ("chunkwise", chunk(4096))
        results.append(compare(f"{name}, 4096 tokens", ours, ("token by token", loop(4096)), rounds=3))
        results.append(compare(f"{name}, 4096 tokens", ours, ("SDPA", ready(sdpa, 4096)), rounds=5))
        results.append(growth(f"{name} over the length", "chunkwise", (2048, 8192, 32768), chunk))
    results.append(growth("attention over the length", "SDPA", (1024, 2048, 4096, 8192), partial(ready, sdpa)))
    strong = [*tensors(4096)[:3], torch.full((1, 8, 4096, 32), -5.0)]
    weak = [*strong[:3], torch.full((1, 8, 4096, 32), -0.05)]
    results.append(
        compare(
            "4096 tokens, gates too strong for one product",
            ("by halves", lambda: gated_linear_attention(*strong)),
            ("one product", lambda: gated_linear_attention(*weak)),
            rounds=5,
        )
    )
    return results


def training() -> list[Comparison]:
    """Forward and backward of both models on 2048 tokens."""
    original, converted = (model.train() for model in models())
    x = torch.randint(0, 64, (1, 2048))

    def work(model: PreTrainedModel):  # type: ignore[no-untyped-def]
        return lambda: model(x, labels=x, use_cache=False).loss.backward()

    pair = ("converted", work(converted)), ("Llama, SDPA", work(original))
    return [compare("forward and backward, 2048 tokens", *pair, rounds=5)]


if __name__ == "__main__":
    for line in main():
        print(line)
