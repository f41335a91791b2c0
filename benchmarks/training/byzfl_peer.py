"""ByzFL, in an environment of its own: it brings torchvision."""

from collections.abc import Callable
from typing import Any

from benchmarks.peers import answer, ask_in


def byzfl() -> Callable[..., Any] | None:
    """`ask("aggregate", rule=, file=, f=, nodes=)` gives seconds and a checksum; None where it cannot be installed."""
    return ask_in("byzfl", ["byzfl==0.0.11"], __name__, {"OMP_NUM_THREADS": "1"})


def aggregate(rule: str, file: str, f: int, nodes: int, rounds: int) -> dict[str, Any]:
    """The rule at each of the first nodes on all vectors of the file, in turn."""
    import time

    import byzfl
    import numpy as np
    import torch

    torch.set_num_threads(1)
    vectors = torch.from_numpy(np.load(file, allow_pickle=False))
    make = {
        "MoNNA": lambda i: byzfl.MoNNA(f=f, idx=i),
        "TrMean": lambda i: byzfl.TrMean(f=f),
    }[rule]
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        results = [make(i)(vectors) for i in range(nodes)]
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "norms": [float(r.norm()) for r in results]}


if __name__ == "__main__":
    answer(aggregate)
