"""The local interaction basis beside PCA: how many features and edges networks need, in either basis, to keep working.

Embedded: a network of two independent halves, classifiers of scikit-learn's digits, an MLP for addition modulo 31 and a
one-layer transformer for addition modulo 23, all trained here. Full size: the authors' transformers for addition modulo
113 and a classifier of CIFAR-10, from the user's folder.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import nan
from pathlib import Path
from statistics import median

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from locally.evidence import MissingData, Run
from locally.plots import INK, PALETTE, canvas
from locally.tangent.interaction_basis import (
    Ablation,
    InteractionGraph,
    LayerBasis,
    LocalInteractionBasis,
    Modules,
    addition_transformer,
    load_addition_transformer,
)

LIB, PCA = "local interaction basis", "PCA"
BASES = {LIB: "lib", PCA: "pca"}
MLP_CUTS = ("0", "2", "4")
TRANSFORMER_CUTS = ("attention", "mlp", "unembed")


@dataclass(frozen=True)
class Outcome:
    """What one basis of one network came to: for each section the edges, for each cut the nodes that it takes."""

    graph: InteractionGraph
    edges: dict[str, int]
    nodes: dict[str, int]
    curve: list[tuple[int, float]]  # (edges kept in the first section, score)
    modules: Modules


def experiment(run: Run) -> None:
    graphs, networks = zip(*run.parallel(all_networks, run.seeds, "networks"))
    outcomes = {name: [outcome for found in networks for outcome in found[name]] for name in networks[0]}
    halves_figure(run, graphs[-1])
    curves_figure(run, outcomes)
    name = list(outcomes)[min(1, len(outcomes) - 1)]
    graph_figure(run, name, outcomes[name][0])
    if run.scale == "paper":
        authors_transformers(run)
        cifar_classifier(run)


def all_networks(
    run: Run, seed: int
) -> tuple[dict[str, tuple[InteractionGraph, Modules]], dict[str, list[dict[str, Outcome]]]]:
    """The graphs of the independent halves, and for every other network what each basis came to."""
    graphs = independent_halves(run, seed)
    replays = run.pick(quick=1, default=3, paper=5)
    outcomes = {"digit classifier": [digits(run, seed, replay) for replay in run.track(range(replays), "digits")]}
    if run.scale != "quick":
        outcomes["addition modulo 31"] = [modular_addition(run, seed)]
        outcomes["small transformer"] = [small_transformer(run, seed)]
    return graphs, outcomes


# Networks -------------------------------------------------------------------------------------------------------------


def independent_halves(run: Run, seed: int) -> dict[str, tuple[InteractionGraph, Modules]]:
    """Five ReLU layers of two 4 x 4 Gaussian blocks on Gaussian input: no edge should cross, and PCA does not know.

    Medians over networks, since features of the two halves that matter equally can be mixed at will: then it depends
    on the sample alone how much of each a direction takes.
    """
    generator = torch.Generator().manual_seed(seed)
    largest: dict[str, list[float]] = {method: [] for method in BASES}
    first: dict[str, list[float]] = {method: [] for method in BASES}
    graphs = {}
    for _ in range(run.pick(quick=3, default=9, paper=25)):
        model = block_diagonal(generator)
        x = torch.randn(20_000, 8, generator=generator)
        for method, basis in BASES.items():
            cuts = [str(i) for i in range(0, 10, 2)]
            lib = LocalInteractionBasis(cuts, basis=basis, batch_size=10_000).fit(model, x)
            graph = lib.interaction_graph(x)
            graphs[method] = graph, Modules(halves(lib), nan)
            shares = crossing_shares(lib, graph)
            largest[method].append(max(shares))
            first[method].append(shares[0])
    for method in BASES:
        run.record(method, "largest share of edge weight between the halves", median(largest[method]), seed=seed)
        run.record(method, "share of edge weight between the halves, first layers", median(first[method]), seed=seed)
        run.record(method, "largest share in any network", max(largest[method]), seed=seed)
    return graphs


def block_diagonal(generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(5):
        linear = nn.Linear(8, 8)
        blocks = [torch.randn(4, 4, generator=generator) for _ in range(2)]
        linear.weight.data, linear.bias.data = torch.block_diag(*blocks), torch.zeros(8)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def crossing_shares(lib: LocalInteractionBasis, graph: InteractionGraph) -> list[float]:
    """For each section the share of edge weight between features of different halves; 0 where there are no edges."""
    bases = list(lib.bases_.values())
    shares = []
    for here, there, E in zip(bases[:-1], bases[1:], graph.edges):
        E = E[there.fixed :, here.fixed :]
        crossing = half_of(there)[:, None] != half_of(here)[None, :]
        total = float(E.sum())
        shares.append(float(E[crossing].sum()) / total if total > 0 else 0.0)
    return shares


def halves(lib: LocalInteractionBasis) -> tuple[frozenset[tuple[str, int]], ...]:
    """The features of each half, at all cuts."""
    sides: tuple[list[tuple[str, int]], ...] = ([], [])
    for name, basis in lib.bases_.items():
        for i, side in enumerate(half_of(basis).tolist()):
            sides[side].append((name, i + basis.fixed))
    return tuple(frozenset(side) for side in sides)


def half_of(basis: LayerBasis) -> Int[Tensor, " k"]:
    """In which half most of each feature's direction lies, the constant left out."""
    squares = basis.C[:8, basis.fixed :].square()
    return (squares[4:].sum(0) > squares[:4].sum(0)).long()


def digits(run: Run, seed: int, replay: int) -> dict[str, Outcome]:
    X, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(X / 16, dtype=torch.float32), torch.tensor(y)
    own = 1000 * replay + seed
    order = torch.from_numpy(np.random.default_rng(own).permutation(len(labels)))
    train, test = order[:1200], order[1200:]
    model = mlp((64, 60, 60, 10), own)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, weight_decay=1e-4, fused=True)
    epochs = run.pick(quick=30, default=60, paper=60)
    train_epochs(model, optimizer, images[train], labels[train], epochs=epochs, batch=64, seed=own)
    found = study(run, "digit classifier", seed, model, MLP_CUTS, images[train], images[test], labels[test], delta=0.01)
    ours, theirs = found[LIB], found[PCA]
    ratio = ours.edges["0"] / theirs.edges["0"]
    run.record(LIB, "edges required / PCA's, first layers of a digit classifier", ratio, seed=seed)
    ratio = ours.nodes["0"] / theirs.nodes["0"]
    run.record(LIB, "input nodes required / PCA's, digit classifier", ratio, seed=seed)
    return found


def modular_addition(run: Run, seed: int) -> dict[str, Outcome]:
    """Two one-hot numbers to their sum; bases and ablations on all pairs."""
    p = 31
    pairs, sums = addition_table(p)
    x = F.one_hot(pairs, p).flatten(1).float()
    train, test = split_pairs(p, 0.8, seed)
    model = mlp((2 * p, 128, 64, p), seed)
    grok(run, "addition modulo 31", model, x, sums, train, test, seed)
    found = study(run, "addition modulo 31", seed, model, MLP_CUTS, x, x, sums, delta=0.01)
    record_totals(run, "modular addition", found, seed)
    return found


def small_transformer(run: Run, seed: int) -> dict[str, Outcome]:
    """The paper's architecture, smaller."""
    p = 23
    pairs, sums = addition_table(p)
    x = F.pad(pairs, (0, 1), value=p)
    train, test = split_pairs(p, 0.85, seed)
    torch.manual_seed(seed)
    model = addition_transformer(p, width=48, heads=4, head_width=12, hidden=96)
    grok(run, "small transformer", model, x, sums, train, test, seed)
    found = study(run, "small transformer", seed, model, TRANSFORMER_CUTS, x, x, sums, delta=0.01)
    record_totals(run, "small transformer", found, seed)
    return found


def authors_transformers(run: Run) -> None:
    """Bases on the training pairs, ablations on the others, and the authors' counts beside ours."""
    files = []
    for i in range(5):
        try:
            what = "the authors' transformer for addition modulo 113"
            files.append((i, run.data(f"modular-addition/transformer_p113_seed{i}.safetensors", what)))
        except MissingData:
            if i == 0:
                raise
    first: dict[str, int] = dict.fromkeys(BASES, 0)
    for i, path in run.track(files, "the authors' transformers"):
        ours = authors_transformer(run, i, load_addition_transformer(path))
        for method, found in ours.items():
            first[method] += found.edges["attention"]
            if (counted := AUTHORS.get((i, method))) is not None:
                ratio = found.edges["attention"] / counted[0]
                run.record(method, "edges required / the authors' count, first section", ratio, seed=i)
    if len(files) == 5:
        ratio = first[LIB] / first[PCA]
        run.record(LIB, "edges required / PCA's, first section, summed over five transformers", ratio)


# Edges that the authors needed in the three sections, from the result files of their code.
AUTHORS = {
    **{(0, LIB): (133, 82, 633), (1, LIB): (80, 75, 699), (2, LIB): (71, 71, 610)},
    **{(3, LIB): (58, 60, 535), (4, LIB): (91, 82, 694)},
    **{(0, PCA): (167, 114, 682), (1, PCA): (76, 53, 734), (2, PCA): (99, 71, 598)},
    **{(3, PCA): (115, 71, 547), (4, PCA): (130, 117, 752)},
}


def authors_transformer(run: Run, i: int, model: nn.Module, modulus: int = 113) -> dict[str, Outcome]:
    pairs, sums = addition_table(modulus)
    x = F.pad(pairs, (0, 1), value=modulus)
    train, test = split_pairs(modulus, 0.3, seed=0)  # the one split of all five
    name = f"addition modulo {modulus}"
    return study(run, name, i, model, TRANSFORMER_CUTS, x[train], x[test], sums[test], delta=0.001, tol=1e-15)


def cifar_classifier(run: Run) -> None:
    """Two hidden layers of 100, the authors' configuration."""
    try:
        path = run.data("cifar10/cifar10.zip", "CIFAR-10 as train/<class>/*.jpg and test/<class>/*.jpg in one zip file")
    except MissingData:
        return  # the claim about it then says that nothing was recorded
    train, test = (read_images(path, part) for part in ("train", "test"))
    mean, deviation = train[0].mean(0), train[0].std(0).clamp(min=1e-6)
    x, x_test = ((images - mean) / deviation for images, _ in (train, test))
    for seed in run.track(run.seeds, "CIFAR-10"):
        model = mlp((x.shape[1], 100, 100, 10), seed)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
        train_epochs(model, optimizer, x, train[1], epochs=12, batch=64, seed=seed)
        found = study(run, "CIFAR-10", seed, model, MLP_CUTS, x[:10_000], x_test, test[1], delta=0.001)
        record_totals(run, "CIFAR-10", found, seed)


def read_images(path: Path, part: str) -> tuple[Float[Tensor, "n pixels"], Int[Tensor, " n"]]:
    """Pixels in [0, 1] and class numbers, classes in alphabetical order, shuffled."""
    from PIL import Image

    images, labels = [], []
    with zipfile.ZipFile(path) as file:
        names = sorted(n for n in file.namelist() if n.startswith(f"{part}/") and n.endswith((".jpg", ".png")))
        if not names:
            raise ValueError(f"{path} holds no images under {part}/")
        classes = sorted({name.split("/")[1] for name in names})
        for name in names:
            images.append(np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")))
            labels.append(classes.index(name.split("/")[1]))
    order = np.random.default_rng(0).permutation(len(labels))
    pixels = torch.from_numpy(np.stack(images)[order]).flatten(1).float() / 255
    return pixels, torch.tensor(labels)[order]


# Study of one network -------------------------------------------------------------------------------------------------


def study(
    run: Run,
    network: str,
    seed: int,
    model: nn.Module,
    cuts: Sequence[str],
    x: Tensor,
    x_test: Tensor,
    y_test: Int[Tensor, " n"],
    *,
    delta: float,
    tol: float | str = "auto",
) -> dict[str, Outcome]:
    """Both bases on x, ablations on x_test until `delta` of the accuracy is lost."""
    found = {}
    for method, basis in BASES.items():
        lib = LocalInteractionBasis(cuts, basis=basis, tol=tol).fit(model, x)
        graph = lib.interaction_graph(x)
        ablation = Ablation(lib, x_test, y_test, dtype=torch.float32)
        edges = {cut: ablation.edges_required(graph, cut, delta) for cut in cuts}
        nodes = {cut: ablation.nodes_required(cut, delta).kept for cut in cuts}
        floors = [weakest_kept(graph, cut, edges[cut].kept) for cut in cuts]
        modules = graph.modules(floors=floors, seed=seed, algorithm="louvain")
        for cut in cuts:
            setting = {"network": network, "cut": cut}
            run.record(method, "features kept", lib.bases_[cut].features, seed=seed, **setting)
            run.record(method, "edges required", edges[cut].kept, seed=seed, **setting)
            run.record(method, "nodes required", nodes[cut], seed=seed, **setting)
        for cut, spread in zip(cuts, graph.participation()):
            run.record(method, "participation of edges", spread, seed=seed, network=network, cut=cut)
        run.record(method, "modularity", modules.modularity, seed=seed, network=network)
        run.record("network", "accuracy without ablation", ablation.baseline, seed=seed, network=network)
        kept = sorted(set(np.geomspace(1, graph.edges[0].numel(), 14).round().astype(int).tolist()))
        curve = list(zip(kept, ablation.edge_curve(graph, cuts[0], kept)))
        counts = {cut: required.kept for cut, required in edges.items()}
        found[method] = Outcome(graph, counts, nodes, curve, modules)
    return found


def record_totals(run: Run, name: str, found: dict[str, Outcome], seed: int) -> None:
    ours, theirs = found[LIB], found[PCA]
    ratio = sum(ours.edges.values()) / sum(theirs.edges.values())
    run.record(LIB, f"edges required / PCA's, {name}", ratio, seed=seed)
    ratio = sum(ours.nodes.values()) / sum(theirs.nodes.values())
    run.record(LIB, f"nodes required / PCA's, {name}", ratio, seed=seed)


def weakest_kept(graph: InteractionGraph, cut: str, kept: int) -> float:
    """The smallest edge of those required that is above zero, from which clusters measure strength."""
    E = graph.between(cut)[:, int(graph.constants[graph.layers.index(cut)]) :]
    strongest = E.flatten().topk(min(max(kept, 1), E.numel())).values
    return float(strongest[strongest > 0].min())


# Training -------------------------------------------------------------------------------------------------------------


def mlp(widths: Sequence[int], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def addition_table(p: int) -> tuple[Int[Tensor, "pairs two"], Int[Tensor, " pairs"]]:
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    return pairs, pairs.sum(1) % p


def split_pairs(p: int, fraction: float, seed: int) -> tuple[Int[Tensor, " train"], Int[Tensor, " test"]]:
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(seed))
    return order[: int(fraction * p * p)], order[int(fraction * p * p) :]


def train_epochs(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, *, epochs: int, batch: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()


def grok(
    run: Run,
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    train: Tensor,
    test: Tensor,
    seed: int,
    most: int = 4000,
) -> None:
    """Full-batch AdamW with strong weight decay until pairs that were not trained on come out right."""
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=2.0, betas=(0.9, 0.98), fused=True)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1.0))
    accuracy = 0.0
    for epoch in range(1, most + 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x[train]), y[train]).backward()
        optimizer.step()
        warm_up.step()
        if epoch % 50 == 0:
            with torch.no_grad():
                accuracy = float((model(x[test]).argmax(1) == y[test]).double().mean())
            if accuracy > 0.995:
                break
    run.record("network", "accuracy on pairs held out", accuracy, seed=seed, network=name)


# Figures --------------------------------------------------------------------------------------------------------------


def halves_figure(run: Run, graphs: dict[str, tuple[InteractionGraph, Modules]]) -> None:
    figure, panels = canvas(9.0, 3.4, ncols=2)
    for axes, (method, (graph, sides)) in zip(panels, graphs.items()):
        graph.draw(axes, edges=64, modules=sides, colours=PALETTE)
        axes.set_xticks(range(len(graph.layers)), [*(f"layer {i + 1}" for i in range(len(graph.layers) - 1)), "output"])
        axes.set_title(method)
    caption = (
        "A network of two independent halves on Gaussian input. Colour says in which half most of a feature lies, grey"
        " edges cross. Principal components of the input mix the halves, although nothing in the network does. Width is"
        " the root of an edge's strength."
    )
    run.figure(figure, "independent-halves", caption)


def curves_figure(run: Run, outcomes: dict[str, list[dict[str, Outcome]]]) -> None:
    figure, panels = canvas(3.6 * len(outcomes) + 1.4, 3.4, ncols=len(outcomes), squeeze=False)
    for axes, (network, seeds) in zip(panels[0], outcomes.items()):
        for method, colour in zip(BASES, PALETTE):
            for number, outcome in enumerate(seeds):
                kept, scores = zip(*outcome[method].curve)
                label = method if number == 0 else None
                axes.plot(kept, scores, color=colour, lw=1.3, alpha=0.85, label=label)
                first = next(iter(outcome[method].edges.values()))
                axes.axvline(max(first, 1), color=colour, ls=":", lw=1, alpha=0.7)
        axes.set(xscale="log", xlabel="edges kept in the first section", title=network, ylim=(0, 1.03))
    panels[0][0].set_ylabel("accuracy")
    figure.legend(*panels[0][0].get_legend_handles_labels(), labelcolor=INK, loc="outside upper left", ncols=2)
    caption = (
        "Accuracy when only the strongest edges from the first to the second layer of features stay, one line a seed."
        " Dotted: the number that a bisection finds to be enough."
    )
    run.figure(figure, "edge-ablation", caption)


def graph_figure(run: Run, network: str, found: dict[str, Outcome]) -> None:
    figure, panels = canvas(9.6, 5.4, ncols=2)
    for axes, (method, outcome) in zip(panels, found.items()):
        kept = list(outcome.edges.values())
        graph = outcome.graph.pruned(kept)
        graph.draw(axes, edges=max(max(kept), 1), modules=outcome.modules, colours=PALETTE)
        axes.set_title(f"{method}: {sum(kept)} edges, Q = {outcome.modules.modularity:.2f}")
    caption = (
        f"Interaction graphs of one network ({network}), only the edges that it needs. One column a layer of features,"
        " the most important on top, constants left out; colours are clusters of the weighted graph with modularity Q."
    )
    run.figure(figure, "interaction-graphs", caption)
