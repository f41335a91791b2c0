"""Fixed points and their gradients beside dense maps, elimination and SciPy; methods beside sweeps; growth in edges."""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import bicgstab
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Comparison, compare, growth
from locally.solvers.convergent_graph import (
    CGS,
    ContractingFixedPoint,
    ContractingMaps,
    FixedPointSolver,
    StackedGNN,
    disjoint_union,
    make_pore_network,
)

TOL = 1e-6


def main() -> list[Comparison]:
    torch.set_num_threads(1)
    return [*dense_peers(), *scipy_peer(), *geometric_peer(), *methods(), *training(), *growths()]


def random_graph(nodes: int, edges: int, heads: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A ring and random edges; a third of the logits is clipped at either end."""
    g = torch.Generator().manual_seed(seed)
    ring = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
    others = torch.randint(nodes, (2, edges - nodes), generator=g)
    logit = 3 * torch.rand(edges, heads, generator=g) - 1
    return torch.cat([ring, others], 1), logit, torch.rand(nodes, heads, generator=g)


def batch_of(graphs: int, nodes: int, edges: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = [random_graph(nodes, edges, heads, seed) for seed in range(graphs)]
    edge_index = torch.cat([p[0] + i * nodes for i, p in enumerate(parts)], 1)
    batch = torch.arange(graphs).repeat_interleave(nodes)
    return edge_index, torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]), batch


def dense_matrices(maps: ContractingMaps) -> Tensor:
    """gamma A for every graph and head."""
    eye = torch.eye(int(maps.sparsity.starts[1]))
    return eye - maps.dense()


def dense_peers() -> list[Comparison]:
    """What the method costs with one dense matrix a head, as it is usually coded: 1600 nodes in all, 16 heads."""
    results = []
    for nodes in (50, 200, 400):
        graphs, heads = 32 * 200 // nodes // 4, 16
        edge_index, logit, bias, batch = batch_of(graphs, nodes, 6 * nodes, heads)
        layer = ContractingFixedPoint(0.5, solver="picard", tol=TOL)
        b = bias.view(graphs, nodes, heads).permute(0, 2, 1)

        def ours(layer=layer, edge_index=edge_index, logit=logit, bias=bias, batch=batch):
            return layer(edge_index, logit, bias, batch)

        def sweeps(layer=layer, edge_index=edge_index, logit=logit, bias=bias, batch=batch, b=b):
            matrices = dense_matrices(layer.maps(edge_index, logit, bias, batch))
            x = torch.zeros_like(b)
            for _ in range(50):
                x, last = b + (matrices @ x[..., None])[..., 0], x
                if (x - last).norm() < TOL * x.norm():
                    break
            return x

        def elimination(layer=layer, edge_index=edge_index, logit=logit, bias=bias, batch=batch, b=b):
            return torch.linalg.solve(layer.maps(edge_index, logit, bias, batch).dense(), b)

        torch.testing.assert_close(ours().view(graphs, nodes, heads).permute(0, 2, 1), elimination())
        name = f"fixed points, {graphs} graphs of {nodes} nodes, 16 heads, gamma 0.5"
        peers = {"dense sweeps": sweeps, "torch.linalg.solve": elimination}
        for peer, work in peers.items():
            results.append(compare(name, ("sweeps over edges", ours), (peer, work), rounds=5))
            ratio = peak_bytes(ours) / peak_bytes(work)
            results.append(Comparison(name, "peak memory", ratio, ratio, ratio, "sweeps over edges", peer))
    return results


def scipy_peer() -> list[Comparison]:
    """One large graph near gamma = 1: SciPy solves head after head."""
    nodes, heads = 20_000, 8
    maps = ContractingFixedPoint(0.99).maps(*(t.double() if t.is_floating_point() else t for t in large(nodes, heads)))
    rows, columns = maps.sparsity.rows.numpy(), maps.sparsity.columns.numpy()

    def theirs():
        solutions = []
        for h in range(heads):
            A = sp.coo_array((maps.weights[:, h].numpy(), (rows, columns)), shape=(nodes, nodes)).tocsr()
            solutions.append(bicgstab(sp.eye_array(nodes) - maps.gamma * A, maps.bias[:, h].numpy(), rtol=1e-10)[0])
        return np.stack(solutions, 1)

    def ours():
        # the maps keep their compiled form, which the peer makes anew as well
        fresh = ContractingMaps(maps.sparsity, maps.weights, maps.bias, maps.gamma)
        return FixedPointSolver(method="bicgstab", tol=1e-9).solve(fresh).x

    np.testing.assert_allclose(ours().numpy(), theirs(), rtol=1e-6)
    name = f"{nodes} nodes, {heads} heads, gamma 0.99"
    return [compare(name, ("BiCGSTAB, all heads at once", ours), ("SciPy bicgstab, head by head", theirs), rounds=5)]


def large(nodes: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    edge_index, logit, bias = random_graph(nodes, 5 * nodes, heads)
    return edge_index, logit.clamp(min=1), bias


def geometric_peer() -> list[Comparison]:
    try:
        from torch_geometric.nn import APPNP
    except ImportError:
        print("  torch_geometric is not installed: its APPNP is left out")
        return []
    nodes, heads, sweeps = 20_000, 16, 20
    edge_index, _, bias = large(nodes, heads)
    ones = torch.ones(edge_index.shape[1], heads)
    weights = 1 / torch.bincount(edge_index[1])[edge_index[1]].float()
    theirs = APPNP(K=sweeps, alpha=0.5, normalize=False)
    layer = ContractingFixedPoint(0.5, flow="source_to_target", solver="picard", tol=1e-20, max_iter=sweeps)

    def ours() -> Tensor:
        maps = layer.maps(edge_index, ones, 0.5 * bias)
        return layer.solver.solve(maps).x

    torch.testing.assert_close(ours(), theirs(bias, edge_index, weights), rtol=1e-4, atol=1e-5)
    name = f"{sweeps} sweeps over {edge_index.shape[1]} edges, {heads} heads"
    peer = ("torch_geometric APPNP (one weight for all heads)", lambda: theirs(bias, edge_index, weights))
    return [compare(name, ("ContractingFixedPoint", ours), peer, rounds=5)]


def methods() -> list[Comparison]:
    """What `auto` saves beside the sweeps alone, where rows sum to one and gamma is close to 1."""
    results = []
    for gamma in (0.9, 0.99):
        for graphs, nodes in ((100, 40), (1, 4000)):
            edge_index, logit, bias, batch = batch_of(graphs, nodes, 5 * nodes, 8)
            for activation in ("identity", "tanh"):
                layer = ContractingFixedPoint(gamma, activation)
                maps = layer.maps(edge_index, logit.clamp(min=1), 0.01 * bias, batch)
                auto = lambda maps=maps: FixedPointSolver(tol=TOL).solve(maps)
                sweeps = lambda maps=maps: FixedPointSolver(method="picard", tol=TOL).solve(maps)
                name = f"{graphs} x {nodes} nodes, gamma {gamma}, {activation}"
                ours = f"auto ({auto().method})"
                results.append(compare(name, (ours, auto), ("sweeps", sweeps), rounds=3))
    return results


def training() -> list[Comparison]:
    """One forward and backward pass on 8 pore networks beside message passing in five layers."""
    rng = np.random.default_rng(0)
    graph = disjoint_union([make_pore_network(75, rng)[0] for _ in range(8)])
    models = {"CGS, gamma 0.9": CGS(2, 3, 1, gamma=0.9), "five-layer stack": StackedGNN(2, 3, 1, num_layers=5)}
    ours, peer = ((name, lambda m=m: m(graph).square().mean().backward()) for name, m in models.items())
    return [compare("training step, 8 pore networks", ours, peer, rounds=9)]


def growths() -> list[Comparison]:
    """Four edges a node, eight heads; the sweeps are those that the tolerance asks for, about 20 at gamma = 0.5."""

    def forward(edges: int) -> Callable[[], object]:
        edge_index, logit, bias = random_graph(edges // 4, edges, 8)
        layer = ContractingFixedPoint(0.5, tol=TOL)
        return lambda: layer(edge_index, logit, bias)

    def backward(edges: int) -> Callable[[], object]:
        edge_index, logit, bias = random_graph(edges // 4, edges, 8)
        layer = ContractingFixedPoint(0.5, tol=TOL)
        logit.requires_grad_()
        return lambda: layer(edge_index, logit, bias).sum().backward()

    def krylov(edges: int) -> Callable[[], object]:
        edge_index, logit, bias = random_graph(edges // 4, edges, 8)
        layer = ContractingFixedPoint(0.99, tol=1e-5)
        return lambda: layer(edge_index, logit.clamp(min=1), bias)

    sizes = [1_000, 10_000, 100_000, 1_000_000]
    return [
        growth("fixed point over edges", "sweeps, gamma 0.5", sizes, forward),
        growth("fixed point and gradient over edges", "sweeps, gamma 0.5", sizes, backward),
        growth("fixed point over edges", "auto, gamma 0.99", sizes, krylov),
    ]


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that torch held at a time."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    # `recorded.events()` gives those inside an operation to the operation
    raw = recorded.profiler.kineto_results.events()
    events = sorted((e for e in raw if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return int(np.cumsum([e.nbytes() for e in events]).max())


if __name__ == "__main__":
    for line in main():
        print(line)
