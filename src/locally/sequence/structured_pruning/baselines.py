"""What a reader would otherwise prune with: the same number of heads and of neurons removed, on the same calibration.

Magnitude, Wanda-sp and FLAP score groups of the dense model; uniform local pruning and its pure optimal-brain-surgeon
form refit, with full accumulation of errors; layer dropping removes whole blocks.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from locally.checks import check_choice
from locally.sequence.structured_pruning.activations import HiddenStates
from locally.sequence.structured_pruning.cuts import BlockCut, Cut
from locally.sequence.structured_pruning.levels import HEADS, KINDS, Space, SubLayer, uniform
from locally.sequence.structured_pruning.network import Block, Network, open_network
from locally.sequence.structured_pruning.statistics import InputStatistics
from locally.sequence.structured_pruning.supernet import LocalSettings, build_supernet
from locally.sequence.structured_pruning.validity import check_ids, check_sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = ("magnitude", "wanda-sp", "flap", "obs", "local", "layer-drop")


def prune_uniform(
    model: "PreTrainedModel | Network | str | Path",
    ids: Int[Tensor, "N T"],
    sparsity: float,
    *,
    method: str = "local",
    batch: int = 8,
    score: str = "obs+grad",
) -> list[BlockCut]:
    """Cuts of every block by a simpler method, to be given to `compress`.

    Args:
        model: as for `open_network`.
        ids: calibration sequences; "magnitude" does not look at them.
        sparsity: share of all heads and of all neurons to remove, in [0, 1).
        method: "magnitude": norm of the output weights of a group. "wanda-sp": sum of |W_ij| |X_j| over it. "flap":
            variance of its inputs times its squared weights, standardised in each sub-layer, one threshold a kind for
            the whole model, and a bias for the mean of what is gone. "obs": optimal brain surgeon with full error
            accumulation, as ZipLM does in one layer. "local": the same with `score`. "layer-drop": whole blocks, those
            whose output is most like their input. All but "flap" and "layer-drop" remove the same share everywhere.
        batch: calibration sequences in memory at a time.

    Raises:
        ValueError: a choice or `sparsity` is out of range, or a token id is not in the vocabulary.
    """
    check_choice("method", method, METHODS)
    check_sparsity(sparsity)
    network = open_network(model)
    check_ids("ids", ids, network.config)
    sublayers = network.sublayers()
    with tempfile.TemporaryDirectory() as folder:
        if method in ("obs", "local"):
            space = Space(sublayers, uniform(sublayers, sparsity), (1,) * len(sublayers), reach=0)
            settings = LocalSettings(score="obs" if method == "obs" else score, accumulation="center", batch=batch)
            return list(build_supernet(network, ids, space, folder, settings).plan(space.centres))
        states = HiddenStates(Path(folder), network, ids, batch=batch)
        states.embed()
        return (
            layer_drop(network, states, sparsity)
            if method == "layer-drop"
            else by_score(network, states, sublayers, sparsity, method)
        )


def by_score(
    network: Network, states: HiddenStates, sublayers: Sequence[SubLayer], sparsity: float, method: str
) -> list[BlockCut]:
    """One pass through the dense model for the scores, then the groups with the smallest go."""
    scores: dict[SubLayer, Tensor] = {}
    means: dict[SubLayer, Tensor] = {}
    for b in range(network.depth):
        block = network.block(b)
        seen = states.observe(b, block, gram=False)
        states.advance(b, block)
        for sublayer in sublayers[2 * b : 2 * b + 2]:
            statistics = seen[sublayer.kind]
            per_input = SCORES[method](_output(block, sublayer.kind).weight.detach().double(), statistics)
            scores[sublayer] = per_input.view(sublayer.groups, -1).sum(1).cpu()
            means[sublayer] = statistics.means
        del block  # before the next is read: one at a time
    if method == "flap":
        kept = globally_smallest(scores, sparsity)
    else:
        counts = dict(zip(sublayers, uniform(sublayers, sparsity)))
        kept = {s: scores[s].argsort(stable=True)[counts[s] :].sort().values for s in sublayers}
    cuts = []
    for b in range(network.depth):
        block = network.block(b)
        parts = (
            plain_cut(_output(block, s.kind), kept[s], s.groups, means[s] if method == "flap" else None)
            for s in sublayers[2 * b : 2 * b + 2]
        )
        cuts.append(BlockCut(*parts))
        del block, parts
    return cuts


def magnitude(weight: Tensor, _: InputStatistics) -> Float[Tensor, " d_in"]:
    return weight.square().sum(0)


def wanda(weight: Tensor, statistics: InputStatistics) -> Float[Tensor, " d_in"]:
    return weight.abs().sum(0) * statistics.squared_norms.sqrt()


def fluctuation(weight: Tensor, statistics: InputStatistics) -> Float[Tensor, " d_in"]:
    return weight.square().sum(0) * statistics.variances


SCORES: Mapping[str, Callable[[Tensor, InputStatistics], Tensor]] = {
    "magnitude": magnitude,
    "wanda-sp": wanda,
    "flap": fluctuation,
}


def globally_smallest(scores: Mapping[SubLayer, Tensor], sparsity: float) -> dict[SubLayer, Tensor]:
    """Kept groups when the smallest standardised scores of a kind go, wherever they are."""
    kept = {}
    for kind in KINDS:
        of_kind = [s for s in scores if s.kind == kind]
        standard = [(scores[s] - scores[s].mean()) / scores[s].std().clamp(min=1e-30) for s in of_kind]
        order = torch.cat(standard).argsort(stable=True)
        stays = torch.ones(len(order), dtype=torch.bool)
        stays[order[: round(sparsity * len(order))]] = False
        for s, mask in zip(of_kind, stays.split([s.groups for s in of_kind])):
            kept[s] = mask.nonzero().squeeze(1)
    return kept


def layer_drop(network: Network, states: HiddenStates, sparsity: float) -> list[BlockCut]:
    """Empty blocks where input and output have the largest cosine; source: ShortGPT, arXiv 2403.03853."""
    changes, nothing = [], []
    for b in range(network.depth):
        block = network.block(b)
        states.advance(b, block)
        changes.append(states.change(b))
        outputs = (_output(block, kind) for kind in KINDS)
        nothing.append(BlockCut(*(plain_cut(o, torch.arange(0), o.in_features, None, silent=True) for o in outputs)))
        del block, outputs
    gone = sorted(range(network.depth), key=changes.__getitem__)[: round(sparsity * network.depth)]
    return [nothing[b] if b in gone else BlockCut(None, None) for b in range(network.depth)]


def plain_cut(output: nn.Linear, kept: Tensor, groups: int, means: Tensor | None, *, silent: bool = False) -> Cut:
    """The weights as they are; with the means of all inputs, a bias for what the removed ones gave on average."""
    weight = output.weight.detach()
    size = output.in_features // groups
    columns = (kept.unsqueeze(1) * size + torch.arange(size)).flatten()
    bias = None if output.bias is None else output.bias.detach()
    if silent and bias is not None:
        bias = torch.zeros_like(bias)
    if means is not None:
        gone = torch.ones(output.in_features, dtype=torch.bool)
        gone[columns] = False
        constant = (weight.double()[:, gone] @ means.to(weight.device)[gone]).to(weight.dtype)
        bias = constant if bias is None else bias + constant
    return Cut(kept, weight[:, columns].clone(), bias)


def _output(block: Block, kind: str) -> nn.Linear:
    return block.self_attn.o_proj if kind == HEADS else block.mlp.down_proj
