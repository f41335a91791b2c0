"""Local pruning of one wide layer, all its levels in one pass, and many candidates in one pass of the model.

The peers are what one would write first: optimal-brain-surgeon updates on whole matrices, level by level, and
candidates one after the other.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Comparison, compare, growth, seconds
from locally.sequence.structured_pruning import (
    Batch,
    Scorer,
    Space,
    build_supernet,
    compress,
    local_prune_levels,
    open_network,
)
from locally.sequence.structured_pruning.levels import step_sizes, uniform

WIDE, LEVELS = 4096, 9


def main() -> list[Comparison]:
    return [*wide_layer(), *levels_together(), *over_width(), *candidates_together()]


def layer(width: int, outputs: int) -> tuple[Tensor, Tensor]:
    """The Gram matrix of correlated inputs with a few large ones, and weights."""
    generator = torch.Generator().manual_seed(width)
    X = torch.randn(2 * width, width, generator=generator)
    X = X * torch.rand(width, generator=generator).pow(-0.5) + X.roll(1, 1)
    return X.mT @ X, torch.randn(width, outputs, generator=generator) / width**0.5


def nested(H: Tensor, W: Tensor, groups: int) -> object:
    keeps = [round(groups * e / (LEVELS - 1)) for e in range(LEVELS)]
    return local_prune_levels(H, W, groups=groups, keeps=keeps)


def written_out(H: Tensor, W: Tensor, rounds: int = 16) -> list[Tensor]:
    """Neurons, as published: an inverse for every level, whole matrices in every round, a refit at the end."""
    d = len(W)
    found = []
    for e in range(LEVELS):
        keep = round(d * e / (LEVELS - 1))
        Hd = H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(d, dtype=torch.float64)
        inverse, G, running = torch.linalg.inv(Hd), Hd @ W.double(), W.double()
        alive = torch.ones(d, dtype=torch.bool)
        for count in np.diff(np.linspace(0, d - keep, rounds + 1).round().astype(int)):
            if count == 0 or keep == 0:
                continue
            scores = running.square().sum(1) / (2 * inverse.diagonal()) + (running * G).sum(1)
            P = scores.masked_fill(~alive, torch.inf).argsort()[:count]
            U = inverse[:, P] @ torch.linalg.inv(inverse[P][:, P])
            running, inverse = running - U @ running[P], inverse - U @ inverse[P]
            running[P] = 0
            inverse[P, :], inverse[:, P] = 0, 0
            alive[P] = False
        weight = torch.zeros_like(running)
        if keep:
            K = alive.nonzero().squeeze(1)
            weight[K] = torch.linalg.solve(Hd[K][:, K], G[K])
        found.append(weight)
    return found


def wide_layer() -> list[Comparison]:
    """Width 4096, nine levels, in a process of its own, for its memory: neurons, and 32 heads of 128."""
    results = []
    for groups, what in ((WIDE, "neurons"), (32, "heads")):
        code = f"from benchmarks.sequence import bench_structured_pruning as b; b.report_wide_layer({groups})"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        figures = json.loads(out.splitlines()[-1])
        name = f"one layer {WIDE} x {WIDE}, {what}, {LEVELS} levels"
        for quantity in ("seconds", "peak GiB"):
            value = figures[quantity]
            results.append(Comparison(name, quantity, value, value, value, "all levels", detail=figures))
    return results


def report_wide_layer(groups: int) -> None:
    """Print seconds of pruning and this process's peak of resident memory, input and libraries included."""
    import resource

    generator = torch.Generator().manual_seed(0)
    H = torch.zeros(WIDE, WIDE)
    for _ in range(8):  # the inputs in parts, as calibration brings them
        X = torch.randn(1024, WIDE, generator=generator)
        H.addmm_(X.mT, X)
    W = torch.randn(WIDE, WIDE, generator=generator) / WIDE**0.5
    from locally.sequence.structured_pruning.local import iterate_levels

    keeps = [round(groups * e / (LEVELS - 1)) for e in range(LEVELS)]

    def work() -> None:
        for level in iterate_levels(H, W, groups=groups, keeps=keeps, rounds=16 if groups == WIDE else None):
            del level

    taken = seconds(work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": taken, "peak GiB": peak, "threads": torch.get_num_threads()}))


def levels_together() -> list[Comparison]:
    results = []
    for width in (256, 512, 1024):
        H, W = layer(width, width)
        pair = ("nested", partial(nested, H, W, width)), ("written out", partial(written_out, H, W))
        results.append(compare(f"{LEVELS} levels of {width} neurons", *pair, rounds=3))
    return results


def over_width() -> list[Comparison]:
    def work(width: int) -> Callable[[], object]:
        H, W = layer(width, width)
        return partial(nested, H, W, width)

    return [growth(f"{LEVELS} levels over width, as many outputs", "nested", (256, 512, 1024, 2048), work)]


def candidates_together() -> list[Comparison]:
    """Twenty mutants of one parent on four sequences of 128: blocks and prefixes shared, or one after the other."""
    import tempfile

    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 256, (8, 128))
    network = open_network(model)
    sublayers = network.sublayers()
    space = Space(sublayers, uniform(sublayers, 0.5), step_sizes(sublayers, 0.125), 4)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        supernet = build_supernet(network, ids, space, folder)
        candidates = [space.removed(space.mutant(space.start, rng)) for _ in range(20)]
        batch = Batch(np.arange(4), 512)
        scorer = Scorer(supernet, ids)

        def one_by_one() -> list[float]:
            with torch.no_grad():
                dense = model(ids[:4]).logits.log_softmax(-1)
                scores = []
                for removed in candidates:
                    sparse = compress(model, supernet.plan(removed))(ids[:4]).logits.log_softmax(-1)
                    scores.append(float((dense.exp() * (dense - sparse))[:, :-1].sum(-1).mean()))
            return scores

        assert np.allclose(scorer(candidates, batch), one_by_one(), rtol=1e-3)
        pair = ("together", lambda: scorer(candidates, batch)), ("one by one", one_by_one)
        result = compare("scores of 20 candidates", *pair, rounds=5)
    result.detail["candidates_per_second"] = len(candidates) / result.detail["seconds_ours"]
    return [result]


if __name__ == "__main__":
    for line in main():
        print(line)
