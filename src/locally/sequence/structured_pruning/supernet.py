"""The supernet: every sub-layer pruned and refitted at every level, on disk, made with one block in memory at a time.

What a block hands to the next is the expectation over its levels, so that later blocks are fitted to inputs that have
suffered as they will. Source: arXiv 2503.09657, section 3.2 and equation 5.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from locally.checks import check_choice, check_count
from locally.sequence.checkpoints import BadCheckpoint
from locally.sequence.structured_pruning.activations import HiddenStates
from locally.sequence.structured_pruning.cuts import BlockCut, Cut, narrow
from locally.sequence.structured_pruning.levels import HEADS, KINDS, NEURONS, Removed, Space
from locally.sequence.structured_pruning.local import LocalPruneResult, iterate_levels
from locally.sequence.structured_pruning.network import Block, Network
from locally.sequence.structured_pruning.statistics import InputStatistics
from locally.sequence.structured_pruning.team import Team

ACCUMULATIONS = ("expectation", "center", "uniform", "random", "none")


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """How each sub-layer is pruned, and what it hands on.

    Args:
        score, damping: as for `local_prune`.
        rounds: of removal of neurons; heads go one at a time.
        accumulation: weights with which calibration goes on to the next block. "expectation": average of all levels
            weighted by their density, "uniform": plain average, "center": the centre's, "random": of one level,
            "none": the dense ones.
        sequential: measure a block's feed-forward part after its attention is pruned, instead of in the same pass.
        batch: calibration sequences in memory at a time.
        seed: for "random".
    """

    score: str = "obs+grad"
    damping: float = 1e-2
    rounds: int = 16
    accumulation: str = "expectation"
    sequential: bool = False
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("accumulation", self.accumulation, ACCUMULATIONS)
        check_count("rounds", self.rounds)
        check_count("batch", self.batch)


@dataclass(frozen=True)
class Supernet:
    """Levels of all sub-layers, one file each, read when asked for."""

    network: Network
    space: Space
    folder: Path
    unit: str = "query_head"

    def cut(self, b: int, heads: int, neurons: int) -> BlockCut:
        """Block b without so many heads (groups of the unit) and neurons."""
        return BlockCut(self._read(b, HEADS, heads), self._read(b, NEURONS, neurons))

    def plan(self, removed: Removed) -> "SupernetPlan":
        """The network with that many groups removed from every sub-layer, its blocks read when they are run."""
        return SupernetPlan(self, removed)

    def _read(self, b: int, kind: str, removed: int) -> Cut | None:
        if removed == 0:
            return None
        path = _file(self.folder, b, kind, removed)
        try:
            with safe_open(path, framework="pt") as stored:
                held = set(stored.keys())
                kept, weight = stored.get_tensor("kept"), stored.get_tensor("weight")
                bias = stored.get_tensor("bias") if "bias" in held else None
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"{path} of the supernet cannot be read: {error}") from None
        return Cut(kept.long(), weight, bias)


@dataclass(frozen=True)
class SupernetPlan:
    """One choice of levels, as a plan whose cuts are read block by block."""

    supernet: Supernet
    removed: Removed

    def __getitem__(self, b: int) -> BlockCut:
        if not 0 <= b < len(self):
            raise IndexError(b)
        return self.supernet.cut(b, *self.removed[2 * b : 2 * b + 2])

    def __len__(self) -> int:
        return self.supernet.network.depth

    def __iter__(self) -> Iterator[BlockCut]:
        return (self[b] for b in range(len(self)))


def build_supernet(
    network: Network,
    ids: Int[Tensor, "N T"],
    space: Space,
    folder: str | Path,
    settings: LocalSettings | None = None,
    *,
    unit: str = "query_head",
    on_block: Callable[[int, int], None] | None = None,
    team: Team | None = None,
) -> Supernet:
    """Prune every sub-layer at every level of `space`, or go on where an earlier call with the same input was stopped.

    Args:
        ids: calibration sequences.
        folder: gets one file for each sub-layer and level; hidden states are there while it works.
        on_block: called with (blocks done, blocks).
        team: processes that do this together, each with its share of the sequences and the same other arguments. Heads
            are fitted by the first and neurons by the second of them. Their sums of the statistics differ in rounding
            from those of one process, and so do the levels.

    Raises:
        LostMember: another process has ended; the blocks that are finished are kept.

    Complexity:
        Two passes of the calibration data through the model, and for each sub-layer O(d_in^3). Memory of one block, the
        Gram matrices of its two output projections and what `local_prune` takes; hidden states are on disk, twice.
    """
    settings, team = settings or LocalSettings(), team or Team()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if len(ids) < team.size:
        raise ValueError(f"ids must have a sequence for each of the {team.size} processes, got {len(ids)}")
    states = HiddenStates(folder, network, ids, batch=settings.batch, team=team)
    done, processes = _blocks_done(folder, space)
    usable = done == network.depth or (processes == team.size and states.intact())
    done = team.least(done if usable else 0)
    if done == 0:
        states.embed()
    for b in range(done, network.depth):
        _prune_block(network, b, space, states, settings, unit, folder)
        team.wait()  # for the others' hidden states, of which the state speaks too
        if team.leads:
            write_json(folder / "state.json", {"blocks_done": b + 1, "processes": team.size})
        team.wait()  # nobody may write over the input of block b before
        if on_block is not None:
            on_block(b + 1, network.depth)
    if team.leads:
        for file in folder.glob("hidden_*.bin"):
            file.unlink(missing_ok=True)
    return Supernet(network, space, folder, unit)


def _prune_block(
    network: Network, b: int, space: Space, states: HiddenStates, settings: LocalSettings, unit: str, folder: Path
) -> None:
    team, block = states.team, network.block(b)
    handed_on = block
    averages: dict[str, Cut | None] = dict.fromkeys(KINDS)
    for kinds in [(HEADS,), (NEURONS,)] if settings.sequential else [KINDS]:
        seen = states.observe(b, handed_on, kinds)
        whose = {kind: KINDS.index(kind) % team.size for kind in kinds}
        for kind in kinds:
            seen[kind].reduce(team, whose[kind])
        fitted: dict[str, Tensor | None] = {}
        for kind in kinds:  # by their owners at the same time
            dense, i = _output(block, kind), 2 * b + KINDS.index(kind)
            if team.rank == whose[kind]:
                fitted[kind] = prune_sublayer(dense, seen.pop(kind), space, i, settings, network, unit, folder)
            else:
                expected = (
                    None if settings.accumulation == "none" else torch.empty_like(dense.weight.mT, dtype=torch.float)
                )
                fitted[kind] = expected
        seen.clear()
        for kind in kinds:
            dense, average = _output(block, kind), fitted[kind]
            if average is not None:
                team.broadcast(average, whose[kind])
                everything = torch.arange(network.heads if kind == HEADS else network.neurons)
                bias = None if dense.bias is None else dense.bias.detach()
                averages[kind] = Cut(everything, average.mT, bias)
        handed_on = narrow(network, block, BlockCut(averages[HEADS], averages[NEURONS]))
    states.advance(b, handed_on)


def prune_sublayer(
    dense: nn.Linear,
    statistics: InputStatistics,
    space: Space,
    i: int,
    settings: LocalSettings,
    network: Network,
    unit: str,
    folder: Path,
) -> Float[Tensor, "d_in d_out"] | None:
    """Write all levels of sub-layer i; the weight with which calibration leaves it, None for the dense one."""
    assert statistics.gram is not None
    sublayer = space.sublayers[i]
    removed = space.choices(i)[::-1]  # as `iterate_levels` yields them: the fewest kept first
    shares = expectation_shares(removed, sublayer.groups, space.centres[i], settings, i)
    weight = dense.weight.detach().mT.float()
    levels = iterate_levels(
        statistics.gram,
        weight,
        groups=sublayer.groups,
        keeps=[sublayer.groups - r for r in removed],
        rounds=None if sublayer.kind == HEADS else settings.rounds,
        score=settings.score,
        damping=settings.damping,
    )
    average = torch.zeros_like(weight)
    for r, share, level in zip(removed, shares or [0.0] * len(removed), levels):
        average.add_(level.weight, alpha=share)
        if r:
            write_cut(
                as_cut(level, dense, sublayer.kind, network, unit), _file(folder, sublayer.block, sublayer.kind, r)
            )
    return average if shares else None


def expectation_shares(
    removed: Sequence[int], groups: int, centre: int, settings: LocalSettings, i: int
) -> list[float] | None:
    """Weights of the levels in what a sub-layer hands on; None for the dense weights.

    The layer is linear, so that averaging its weights is averaging its outputs (equation 5).
    """
    if settings.accumulation == "none":
        return None
    if settings.accumulation == "center":
        return [float(r == centre) for r in removed]
    if settings.accumulation == "random":
        chosen = int(np.random.default_rng([settings.seed, i]).integers(len(removed)))
        return [float(e == chosen) for e in range(len(removed))]
    densities = [groups - r for r in removed]
    if settings.accumulation == "uniform" or not any(densities):
        densities = [1] * len(removed)
    return [density / sum(densities) for density in densities]


def as_cut(level: LocalPruneResult, dense: nn.Linear, kind: str, network: Network, unit: str) -> Cut:
    """What is kept of a sub-layer, in query heads whatever the unit of removal."""
    kept = level.kept.nonzero().squeeze(1)
    per_group = network.heads // network.kv_heads if kind == HEADS and unit == "kv_group" else 1
    kept = (kept.unsqueeze(1) * per_group + torch.arange(per_group, device=kept.device)).flatten()
    size = network.head_dim if kind == HEADS else 1
    columns = (kept.unsqueeze(1) * size + torch.arange(size, device=kept.device)).flatten()
    bias = None if dense.bias is None else dense.bias.detach()
    return Cut(kept, level.weight[columns].mT.to(dense.weight.dtype), bias)


def write_json(path: Path, content: object) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".tmp")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_cut(cut: Cut, path: Path) -> None:
    """Whole or not at all."""
    parts = {"kept": cut.kept.int(), "weight": cut.weight, "bias": cut.bias}
    beside = path.with_suffix(".tmp")
    save_file({name: t.cpu().contiguous() for name, t in parts.items() if t is not None}, beside)
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def _output(block: Block, kind: str) -> nn.Linear:
    return block.self_attn.o_proj if kind == HEADS else block.mlp.down_proj


def _file(folder: Path, b: int, kind: str, removed: int) -> Path:
    return folder / f"block_{b:04d}_{kind}_{removed:05d}.safetensors"


def _blocks_done(folder: Path, space: Space) -> tuple[int, int]:
    """As the folder says, if every level of these blocks is there; and by how many processes."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        done, processes = state["blocks_done"], state["processes"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return 0, 0
    levels = ((s, r) for i, s in enumerate(space.sublayers) if s.block < done for r in space.choices(i) if r)
    complete = all(_file(folder, s.block, s.kind, r).exists() for s, r in levels)
    return (done, processes) if complete else (0, 0)
