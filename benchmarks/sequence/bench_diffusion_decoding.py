"""Rules beside one another in one loop, what a rule costs beside a forward pass, what caches save, cost over length.

A model trained on the experiment's running sums decides how many calls a rule needs; the costs of calls are those of a
LLaDA stack with fresh weights, since time does not depend on them. `gpu` repeats the caches where there is a device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Comparison, compare, growth
from locally.papers.localleap import FAST, GREEDY, OURS, RULES, Study, draw, train
from locally.sequence.diffusion_decoding import (
    BidirectionalLM,
    DiffusionConfig,
    FixedCount,
    LocalLeap,
    build,
    diffusion_generate,
    predict,
)

GENERATED, BLOCK = 64, 32


def main() -> list[Comparison]:
    return [*rules(), *selection(), *stack(), *caches("cpu"), *over_length(), *gpu()]


def rules() -> list[Comparison]:
    """One response at a time, as a reader would wait for it: LocalLeap against the other rules."""
    study = Study()
    model = train(study, 0, "cpu")
    prompts, _ = draw(study, 10, torch.Generator().manual_seed(1))
    results, calls = [], {}

    def respond(name: str) -> Callable[[], object]:
        config = DiffusionConfig(study.length, study.length, RULES[name])
        outputs = [diffusion_generate(model, p, config) for p in prompts.split(1)]
        calls[name] = sum(o.forward_calls for o in outputs)
        return lambda: [diffusion_generate(model, p, config) for p in prompts.split(1)]

    ours = respond(OURS)
    for name in (GREEDY, "2 tokens per call", FAST):
        label, work = "10 responses of 24 tokens, running sums", respond(name)
        results.append(compare(label, (OURS, ours), (name, work), rounds=3, calls=dict(calls)))
        ratio = calls[OURS] / calls[name]
        results.append(Comparison(label, "model calls", ratio, ratio, ratio, OURS, name))
    return results


def in_a_loop(confidence: list[list[float]], masked: list[list[bool]]) -> list[set[int]]:
    """LocalLeap position by position with sets, as it is first written."""
    chosen = []
    for sure, open_ in zip(confidence, masked):
        left = [i for i, m in enumerate(open_) if m]
        commit = {max(left, key=sure.__getitem__)}
        for a in left:
            if sure[a] >= 0.9:
                commit.add(a)
                commit.update(j for j in left if abs(j - a) <= 4 and sure[j] >= 0.75)
        chosen.append(commit)
    return chosen


def llada(
    width: int = 512, layers: int = 4, vocabulary: int = 8192, device: str = "cpu", **more: Any
) -> BidirectionalLM:
    sizes = {"d_model": width, "n_heads": 8, "n_layers": layers, "mlp_hidden_size": 3 * width}
    tokens = {"vocab_size": vocabulary, "mask_token_id": vocabulary - 1, "max_sequence_length": 8192}
    torch.manual_seed(0)
    return build({"architectures": ["LLaDAModelLM"], **sizes, **tokens, **more}, device=device).eval()


def selection() -> list[Comparison]:
    """One call on 384 tokens, 32 of them the block; and the rule alone against a loop over positions."""
    model, ids = llada(), torch.randint(0, 8000, (1, 384))
    block = torch.arange(256, 256 + BLOCK)
    with torch.no_grad():
        logits = model.logits_at(ids, block)
    rule, masked = LocalLeap(), torch.ones(1, BLOCK, dtype=torch.bool)

    def forward() -> Tensor:
        with torch.no_grad():
            return model.logits_at(ids, block)

    choose = lambda: rule(predict(logits, 8191).confidence, masked)
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(16, 256, generator=generator, dtype=torch.float64)
    every = torch.ones(16, 256, dtype=torch.bool)
    plain = confidence.tolist(), every.tolist()
    return [
        compare("one call, 384 tokens", ("prediction and rule", choose), ("forward pass", forward), rounds=5),
        compare(
            "rule on 16 rows of 256 masks",
            ("pooled", lambda: rule(confidence, every)),
            ("loop over positions", lambda: in_a_loop(*plain)),
            rounds=9,
        ),
    ]


def stack() -> list[Comparison]:
    """The forward pass against the Llama of Transformers with its own switch for attention to both sides."""
    from transformers import LlamaForCausalLM

    model, ids = llada(), torch.randint(0, 8000, (1, 384))
    config = type(model.stack.config).from_dict(model.stack.config.to_dict() | {"is_causal": False})
    config._attn_implementation = "sdpa"
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(model.stack.state_dict())

    def run(call: Callable[[], Any]) -> Callable[[], Any]:
        def without_gradients() -> Any:
            with torch.no_grad():
                return call()

        return without_gradients

    peer = run(lambda: theirs(input_ids=ids, use_cache=False).logits)
    ours = run(lambda: model(ids))
    gap = float((ours() - peer()).abs().max())
    return [
        compare("forward pass, 384 tokens", ("ours", ours), ("Transformers, is_causal=False", peer), rounds=5, gap=gap)
    ]


def caches(device: str) -> list[Comparison]:
    """64 tokens after 256, two tokens a call, so that every variant makes the same number of calls."""
    model = llada(width=256, layers=4, device=device)
    ids = torch.randint(0, 8000, (1, 256), device=device)

    def respond(cache: Any) -> Callable[[], object]:
        config = DiffusionConfig(GENERATED, BLOCK, FixedCount(2), cache=cache)
        return lambda: diffusion_generate(model, ids, config).sequences.cpu()

    name = f"64 tokens after 256, {device}"
    peer = ("no cache", respond(None))
    return [compare(name, (f"{cache} cache", respond(cache)), peer, rounds=3) for cache in ("prefix", "dual")]


def over_length() -> list[Comparison]:
    """One block of 32 tokens in 8 calls after prompts of growing length."""
    model = llada(width=256, layers=4)

    def respond(cache: Any, length: int) -> Callable[[], object]:
        ids = torch.randint(0, 8000, (1, length))
        config = DiffusionConfig(BLOCK, BLOCK, FixedCount(4), cache=cache)
        return lambda: diffusion_generate(model, ids, config)

    sizes = (128, 256, 512, 1024)
    return [
        growth("a block of 32 tokens over the prompt's length", name, sizes, lambda n, cache=cache: respond(cache, n))
        for name, cache in (("no cache", None), ("dual cache", "dual"))
    ]


def gpu() -> list[Comparison]:
    if not torch.cuda.is_available():
        print("the caches are not timed on a GPU: there is none here")
        return []
    return caches("cuda")


if __name__ == "__main__":
    for line in main():
        print(line)
