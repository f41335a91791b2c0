"""Mixing beside the matrix product that any pairwise distances cost, beside ByzFL, and sockets beside gloo."""

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import Comparison, compare, growth, seconds
from benchmarks.training.byzfl_peer import byzfl
from locally.training.byzantine import (
    Membership,
    ModelProblem,
    NearestNeighborAverage,
    Rule,
    SocketTransport,
    TrimmedMean,
)


def main() -> list[Comparison]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*beside_the_product(), *beside_byzfl(), *gradients(), *exchanges(), *growths()]
    finally:
        torch.set_num_threads(threads)


def everybody(rule: Rule, pool: Tensor, nodes: int) -> Tensor:
    return rule.mix(pool, np.ones((nodes, len(pool)), dtype=bool), np.arange(nodes))


def beside_the_product() -> list[Comparison]:
    """n = 100, D = 10^6: one node's average, and all nodes' at once, over one X X^T."""
    n, f, D = 100, 9, 1_000_000
    pool = torch.randn(n, D)
    received = pool[: n - f]
    rule = NearestNeighborAverage(f)
    product = ("X X^T", lambda: pool @ pool.T)
    name = f"n = {n}, f = {f}, D = {D:,}"
    one = ("NNA at one node", lambda: rule(received, pool[0]))
    everyone = ("NNA at all nodes", lambda: everybody(rule, pool, n))
    return [compare(name, one, product, rounds=5), compare(name, everyone, product, rounds=5)]


def beside_byzfl() -> list[Comparison]:
    """The paper's MNIST network among 26 nodes: one coordination phase of the 21 honest ones."""
    ask = byzfl()
    if ask is None:
        return []
    n, f, D, results = 26, 5, 431_080, []
    pool = torch.randn(n - f, D)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "vectors.npy")
        np.save(file, pool.numpy(), allow_pickle=False)
        ours: dict[str, Rule] = {"MoNNA": NearestNeighborAverage(f), "TrMean": TrimmedMean(f)}
        for name, rule in ours.items():
            everybody(rule, pool, n - f)
            ratios = []
            for _ in range(3):
                taken = seconds(lambda rule=rule: everybody(rule, pool, n - f))
                theirs = ask("aggregate", rule=name, file=file, f=f, nodes=n - f, rounds=1)
                ratios.append(taken / theirs["seconds"])
            norms = everybody(rule, pool, n - f).norm(dim=1).numpy()
            # among random vectors the last neighbour is nearly a tie, which single precision may settle either way
            np.testing.assert_allclose(norms, theirs["norms"], rtol=2e-3)
            median = float(np.median(ratios))
            peer = f"ByzFL {name}, node by node"
            results.append(
                Comparison("21 nodes, D = 431,080", "time", median, min(ratios), max(ratios), repr(rule), peer)
            )
    return results


def gradients() -> list[Comparison]:
    """One step's gradients of 21 nodes, vectorised and in a loop."""
    labels = np.arange(2100) % 10
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    parts = np.array_split(np.arange(2100), 21)
    problem = ModelProblem(model, torch.randn(2100, 64), torch.from_numpy(labels), parts, batch=25)
    rows = problem.start().repeat(21, 1)
    together = ("all nodes in one call", lambda: problem.gradients(rows, 0, range(21)))
    alone = ("node by node", lambda: [problem.gradients(rows[k : k + 1], 0, [k]) for k in range(21)])
    return [compare("gradients of an MLP 64-24-10 at 21 nodes", together, alone)]


def exchanges() -> list[Comparison]:
    """Traffic of one round beside a ring all-reduce: what it costs that nobody is trusted to add up."""
    n, D, rounds = 5, 100_000, 20
    members = Membership.local(n)

    def node(member: Membership) -> None:
        with SocketTransport(member, f=1, entries=D) as transport:
            vector = torch.ones(D)
            for round in range(rounds):
                transport.exchange(round, vector)

    def everyone() -> None:
        threads = [threading.Thread(target=node, args=(member,)) for member in members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    taken = seconds(everyone) / rounds
    sent = (n - 1) / (2 * (n - 1) / n)
    detail = {"nodes": n, "entries": D, "milliseconds a round, five nodes in one process": 1e3 * taken}
    return [Comparison("floats sent by a node", "traffic", sent, sent, sent, "MoNNA", "ring all-reduce", detail)]


def growths() -> list[Comparison]:
    def nodes(n: int) -> Callable[[], object]:
        pool = torch.randn(n, 100_000)
        return lambda: everybody(NearestNeighborAverage(n // 11), pool, n)

    def entries(D: int) -> Callable[[], object]:
        pool = torch.randn(40, D)
        return lambda: everybody(NearestNeighborAverage(3), pool, 40)

    return [
        growth("mixing at all nodes over nodes", "NNA", [22, 44, 88, 176], nodes),
        growth("mixing at all nodes over parameters", "NNA", [20_000, 80_000, 320_000, 1_280_000], entries),
    ]


if __name__ == "__main__":
    for line in main():
        print(line)
