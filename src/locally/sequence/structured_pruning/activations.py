"""Hidden states between blocks, on disk, and what the inputs of a block's output projections say.

Two files take turns: a block reads one and writes the other, so that a run that is killed finds the input of the block
that it was at.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from locally.sequence.structured_pruning.levels import HEADS, KINDS, NEURONS
from locally.sequence.structured_pruning.network import Block, Network
from locally.sequence.structured_pruning.statistics import InputStatistics
from locally.sequence.structured_pruning.team import Team


class HiddenStates:
    """Inputs of the blocks for all calibration sequences.

    Args:
        folder: where the two files are.
        network, ids: the model, and token ids of shape (sequences, length).
        batch: sequences that go through a block at a time.
        team: whose members have a share of the sequences each; at least one sequence for each.
    """

    def __init__(
        self, folder: Path, network: Network, ids: Int[Tensor, "N T"], *, batch: int = 8, team: Team | None = None
    ) -> None:
        self.team = team or Team()
        ids = ids[self.team.share(len(ids))]
        self.network, self.ids, self.batch = network, ids, batch
        whose = "" if self.team.size == 1 else f"_{self.team.rank}_of_{self.team.size}"
        self.files = (folder / f"hidden_even{whose}.bin", folder / f"hidden_odd{whose}.bin")
        first = network.embed(ids[:1])
        self.shape, self.dtype = (len(ids), *first.shape[1:]), first.dtype

    def embed(self) -> None:
        """Fill the input of block 0."""
        into = self._open(0)
        for part in self._parts():
            into[part] = self.network.embed(self.ids[part]).to("cpu", self.dtype)

    def intact(self) -> bool:
        """Both files are there, in the size that they must have."""
        size = math.prod(self.shape) * torch.empty(0, dtype=self.dtype).element_size()
        return all(file.exists() and file.stat().st_size == size for file in self.files)

    def observe(
        self, b: int, block: Block, kinds: Sequence[str] = KINDS, *, gram: bool = True
    ) -> dict[str, InputStatistics]:
        """Inputs of the output projections of block b, of this member's sequences."""
        outputs = {HEADS: block.self_attn.o_proj, NEURONS: block.mlp.down_proj}
        seen = {
            kind: InputStatistics(outputs[kind].in_features, gram=gram, device=outputs[kind].weight.device)
            for kind in kinds
        }
        hooks = [
            outputs[kind].register_forward_pre_hook(partial(_hand_over, statistics))
            for kind, statistics in seen.items()
        ]
        try:
            source = self._open(b)
            for part in self._parts():
                self.network.run(b, block, source[part])
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def advance(self, b: int, block: Block) -> None:
        """Put what `block`, which stands for block b, makes of its input where block b + 1 reads it."""
        source, into = self._open(b), self._open(b + 1)
        for part in self._parts():
            into[part] = self.network.run(b, block, source[part]).to("cpu", self.dtype)

    def change(self, b: int) -> float:
        """1 - mean cosine between input and output of block b, after `advance`."""
        source, into = self._open(b), self._open(b + 1)
        cosines = [
            torch.nn.functional.cosine_similarity(source[part].double(), into[part].double(), dim=-1).mean(1)
            for part in self._parts()
        ]
        return 1 - float(torch.cat(cosines).mean())

    def _open(self, b: int) -> Tensor:
        count = math.prod(self.shape)
        return torch.from_file(str(self.files[b % 2]), shared=True, size=count, dtype=self.dtype).view(self.shape)

    def _parts(self) -> list[slice]:
        return [slice(i, i + self.batch) for i in range(0, len(self.ids), self.batch)]


def _hand_over(statistics: InputStatistics, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    statistics.add(arguments[0])
