"""How far a candidate is from the dense model, for many candidates at once.

All candidates of a stage go through the model together, block by block: a block is loaded once, and candidates that
agree up to it share its output. So a stage reads the model once, whether it is in memory or in a folder. Source: arXiv
2503.09657, section 3.3.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from locally.checks import check_choice, check_count
from locally.sequence.structured_pruning.cuts import narrow
from locally.sequence.structured_pruning.levels import Removed
from locally.sequence.structured_pruning.network import Block
from locally.sequence.structured_pruning.search import Batch
from locally.sequence.structured_pruning.supernet import Supernet
from locally.sequence.structured_pruning.team import Team

FITNESS = ("kl", "topk_kl", "ppl", "hidden")
LOGITS_AT_ONCE = 1 << 25  # entries


class Scorer:
    """Mean over tokens of a distance between the dense model's predictions and a candidate's; lower is better.

    Args:
        supernet: whose levels the candidates are.
        ids: calibration sequences that batches choose from.
        fitness: "kl": KL divergence from dense to sparse next-token distributions; "topk_kl": both restricted to the
            `top_k` likeliest tokens of the dense model and normalised there; "ppl": the logarithm of the sparse model's
            perplexity; "hidden": KL plus the mean squared distance of hidden states after the first, middle and last
            block, times `alpha`. The last position of a sequence is left out.
        cache_bytes: of blocks at their levels that are kept between calls.
        tokens_at_once: how many tokens of each candidate go through a block together; bounds the memory.
        team: processes that share out the pieces of a batch, or its candidates where there are more processes than
            pieces. Each calls with the same arguments and gets the scores that one process would, bit for bit where
            all compute with as many threads.
    """

    def __init__(
        self,
        supernet: Supernet,
        ids: Int[Tensor, "N T"],
        *,
        fitness: str = "kl",
        top_k: int = 8192,
        alpha: float = 1.0,
        cache_bytes: int = 1 << 28,
        tokens_at_once: int = 16384,
        team: Team | None = None,
    ) -> None:
        check_choice("fitness", fitness, FITNESS)
        check_count("top_k", top_k)
        self.supernet, self.network, self.ids = supernet, supernet.network, ids
        self.fitness, self.top_k, self.alpha = fitness, top_k, alpha
        self.cache_bytes, self.tokens_at_once = cache_bytes, tokens_at_once
        self.team = team or Team()
        self._cache: OrderedDict[tuple[int, int, int], nn.Module] = OrderedDict()
        depth = self.network.depth
        self.compared = {0, depth // 2, depth - 1} if fitness == "hidden" else set()

    def __call__(self, candidates: Sequence[Removed], batch: Batch) -> Float[np.ndarray, " candidates"]:
        """Scores on the first `batch.tokens` tokens of these sequences."""
        pieces = self._pieces(batch)
        sums = torch.zeros(len(pieces), len(candidates), dtype=torch.float64)
        for p, chosen in self._own(len(pieces), candidates):
            sums[p, chosen] = torch.from_numpy(self._sums([candidates[c] for c in chosen], pieces[p]))
        self.team.sum(sums)  # exact: all but one of the terms are zero
        positions = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in pieces)
        totals = np.zeros(len(candidates))
        for of_piece in sums.numpy():
            totals += of_piece
        return totals / max(positions, 1)

    def _own(self, pieces: int, candidates: Sequence[Removed]) -> Iterator[tuple[int, list[int]]]:
        """This member's pieces, each with the candidates to score on it; candidates that share blocks stay together."""
        order = sorted(range(len(candidates)), key=lambda c: candidates[c])
        parts = -(-self.team.size // max(pieces, 1))
        for unit in range(self.team.rank, pieces * parts, self.team.size):
            p, part = divmod(unit, parts)
            chosen = order[len(order) * part // parts : len(order) * (part + 1) // parts]
            if chosen:
                yield p, chosen

    def _pieces(self, batch: Batch) -> list[Int[Tensor, "count length"]]:
        """Whole sequences in chunks, then what is left of the last one."""
        ids = self.ids[torch.from_numpy(batch.sequences)]
        length = ids.shape[1]
        whole, rest = divmod(batch.tokens, length)
        at_once = max(self.tokens_at_once // length, 1)
        pieces = [ids[i : min(i + at_once, whole)] for i in range(0, whole, at_once)]
        return pieces + ([ids[whole : whole + 1, :rest]] if rest > 1 else [])

    def _sums(
        self, candidates: Sequence[Removed], ids: Int[Tensor, "count length"]
    ) -> Float[np.ndarray, " candidates"]:
        dense: Removed = (0,) * (2 * self.network.depth)
        paths = {tuple(c) for c in candidates} | ({dense} if self.fitness != "ppl" else set())
        frontier: dict[Removed, Tensor] = {(): self.network.embed(ids)}
        distances: dict[Removed, float] = {(): 0.0}
        for b in range(self.network.depth):
            block: Block = None
            after: dict[Removed, Tensor] = {}
            for path in sorted({p[: 2 * b + 2] for p in paths}):
                at_level = self._cached(b, path)
                if at_level is None:
                    block = block or self.network.block(b)
                    at_level = self._make(b, path, block)
                after[path] = self.network.run(b, at_level, frontier[path[:-2]])
            travelled = {path: distances[path[:-2]] for path in after}
            if b in self.compared:
                target = after[dense[: 2 * b + 2]].double()
                for path, hidden in after.items():
                    apart = (hidden[:, :-1].double() - target[:, :-1]).square().mean(-1).sum()
                    travelled[path] += self.alpha * float(apart)
            frontier, distances = after, travelled
        divergences = self._divergences(frontier, dense, ids)
        return np.array([distances[tuple(c)] + divergences[tuple(c)] for c in candidates])

    def _divergences(
        self, frontier: dict[Removed, Tensor], dense: Removed, ids: Int[Tensor, "count length"]
    ) -> dict[Removed, float]:
        """Sums over all positions but the last of each sequence, from the hidden states after the last block."""
        totals = dict.fromkeys(frontier, 0.0)
        at_once = max(LOGITS_AT_ONCE // (ids.shape[1] * self.network.config.vocab_size), 1)
        for i in range(0, len(ids), at_once):
            part = slice(i, i + at_once)
            wanted = None if self.fitness == "ppl" else self._predictions(frontier[dense][part])
            for path, hidden in frontier.items():
                sparse = self._predictions(hidden[part])
                if wanted is None:
                    targets = ids[part, 1:].to(sparse.device)
                    totals[path] += float(F.cross_entropy(sparse.flatten(0, 1), targets.flatten(), reduction="sum"))
                else:
                    totals[path] += self._kl(wanted, sparse)
        return totals

    def _predictions(self, hidden: Tensor) -> Float[Tensor, "count positions vocabulary"]:
        return self.network.logits(hidden)[:, :-1].float()

    def _kl(self, dense: Tensor, sparse: Tensor) -> float:
        if self.fitness == "topk_kl" and self.top_k < dense.shape[-1]:
            dense, chosen = dense.topk(self.top_k, dim=-1)
            sparse = sparse.gather(-1, chosen)
        return float(F.kl_div(sparse.log_softmax(-1), dense.log_softmax(-1), reduction="sum", log_target=True))

    def _cached(self, b: int, path: Removed) -> nn.Module | None:
        key = (b, path[-2], path[-1])
        if key not in self._cache:
            return None
        self._cache.move_to_end(key)
        return self._cache[key]

    def _make(self, b: int, path: Removed, block: Block) -> nn.Module:
        heads, neurons = path[-2:]
        made = narrow(self.network, block, self.supernet.cut(b, heads, neurons))
        size = sum(p.numel() * p.element_size() for p in made.parameters())
        room = self.cache_bytes // max(size, 1)
        if room:
            self._cache[b, heads, neurons] = made
            while len(self._cache) > room:
                self._cache.popitem(last=False)
        return made
