"""Bases and edges beside an autograd loop over outputs, scikit-learn's PCA, the authors' edge counts; growth.

The authors' package (`rib`) asks for a language-model stack of its own and is not installed here; its way of getting
Jacobians, one backward pass for each output direction, is what `one_backward_an_output` times with plain torch.
LOCALLY_DATA names the folder that holds modular-addition/ with the authors' transformers.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.decomposition import PCA
from torch import Tensor

from benchmarks.harness import Comparison, compare, growth
from locally.evidence import Run
from locally.papers.local_interaction_basis import AUTHORS, BASES, authors_transformer, mlp
from locally.tangent.interaction_basis import LocalInteractionBasis, load_addition_transformer

CUTS = ["0", "2", "4"]


def main() -> list[Comparison]:
    return [*against_backward_passes(), against_pca(), *growths(), *against_the_authors()]


def against_backward_passes() -> list[Comparison]:
    """M' and the edges of every section, at the same bases."""
    model, x = mlp((256, 128, 128, 10), 0).double(), data(1000, 256)
    lib = LocalInteractionBasis(CUTS).fit(model, x)
    name = "MLP 256-128-128-10, 1000 examples"
    ours = "closed forms over slopes"
    theirs = "one backward pass an output"
    loop = [one_backward_an_output(lib, l, x) for l in range(3)]
    edges = lib.interaction_graph(x).edges
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, (_, b) in zip(edges, loop))
    return [
        compare(
            f"{name}: M' and edges",
            (ours, lambda: closed_forms(lib, x)),
            (theirs, lambda: [one_backward_an_output(lib, l, x) for l in range(3)]),
            rounds=5,
        ),
        Comparison(f"{name}: edges", "largest relative difference", worst, worst, worst, ours, theirs),
    ]


def closed_forms(lib: LocalInteractionBasis, x: Tensor) -> None:
    with torch.no_grad():
        for l in range(3):
            lib._jacobian_moments(l, x)
    lib.interaction_graph(x)


def one_backward_an_output(lib: LocalInteractionBasis, l: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """M' and the edges of a section from torch.autograd.grad, output by output."""
    with torch.no_grad():
        f = lib.chain_.advance(lib.chain_.start(x), 0, l)
    section, C_next, here = lib._section(l), lib._next(l + 1), list(lib.bases_.values())[l]
    f.requires_grad_()
    out = section(f) if C_next is None else section(f) @ C_next
    M = torch.zeros(f.shape[1], f.shape[1], dtype=f.dtype)
    E = torch.zeros(out.shape[1], here.features, dtype=f.dtype)
    features = f.detach() @ here.C
    for i in range(out.shape[1]):
        (g,) = torch.autograd.grad(out[:, i].sum(), f, retain_graph=True)
        M += g.T @ g
        E[i] = (g @ here.C_pinv.T * features).square().sum(0)
    return M / len(f), E / len(f)


def against_pca() -> Comparison:
    """What a reader would otherwise use: principal components at every cut."""
    model, x = mlp((64, 60, 60, 10), 0).double(), data(1200, 64)

    def components() -> None:
        with torch.no_grad():
            for upto in (0, 2, 4):
                PCA().fit(model[:upto](x).numpy())

    return compare(
        "MLP 64-60-60-10, 1200 examples: bases at three cuts",
        ("local interaction basis", lambda: LocalInteractionBasis(CUTS).fit(model, x)),
        ("PCA (scikit-learn)", components),
        rounds=7,
    )


def growths() -> list[Comparison]:
    def examples(n: int) -> Callable[[], object]:
        model, x = mlp((64, 64, 64, 10), 0).double(), data(n, 64)
        return lambda: LocalInteractionBasis(CUTS).fit(model, x)

    def width(d: int) -> Callable[[], object]:
        model, x = mlp((d, d, d, 10), 0).double(), data(1024, d)
        return lambda: LocalInteractionBasis(CUTS).fit(model, x)

    return [
        growth("bases over examples", "local interaction basis", [1000, 2000, 4000, 8000, 16000], examples),
        growth("bases over width, 1024 examples", "local interaction basis", [64, 128, 256, 512], width),
    ]


def against_the_authors() -> list[Comparison]:
    folder = Path(os.environ.get("LOCALLY_DATA", "")) / "modular-addition"
    if "LOCALLY_DATA" not in os.environ or not folder.exists():
        print("  (edges of the authors' transformers skipped: LOCALLY_DATA names no folder with modular-addition/)")
        return []
    results = []
    for i in range(5):
        path = folder / f"transformer_p113_seed{i}.safetensors"
        if not path.exists():
            continue
        found = authors_transformer(Run(scale="paper", seeds=(i,)), i, load_addition_transformer(path))
        for method in BASES:
            for cut, ours, theirs in zip(found[method].edges, found[method].edges.values(), AUTHORS[i, method]):
                name = f"addition modulo 113, network {i}, {method}, from {cut}"
                detail = {"ours": ours, "authors": theirs}
                ratio = ours / theirs
                results.append(Comparison(name, "edges required", ratio, ratio, ratio, "ours", "the authors'", detail))
    return results


def data(n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


if __name__ == "__main__":
    for line in main():
        print(line)
