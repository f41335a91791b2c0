"""What calibration tells about the inputs of a layer: Gram matrix, means, and from them norms and variances."""

import torch
from jaxtyping import Float
from torch import Tensor

from locally.sequence.structured_pruning.team import Team


class InputStatistics:
    """Sums over tokens, added to batch by batch.

    Args:
        width: number of inputs.
        gram: also keep X^T X; else its diagonal only.
        device: where the sums are.

    Complexity:
        O(tokens width^2) time and width^2 single-precision numbers, without `gram` O(tokens width) and 2 width.
    """

    def __init__(self, width: int, *, gram: bool = True, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)
        self.gram = torch.zeros(width, width, device=device) if gram else None

    def add(self, x: Float[Tensor, "*batch width"]) -> None:
        """Take in a batch of inputs; leading dimensions are tokens."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += len(x)
        self.total += x.sum(0)
        if self.gram is None:
            self.squares += x.square().sum(0)
        else:
            self.gram.addmm_(x.mT, x)

    def reduce(self, team: Team, to: int) -> None:
        """Bring together, at one member of a team, what all have seen; the others' sums then mean nothing."""
        tokens = torch.tensor(self.tokens)
        for sums in (tokens, self.total, self.squares, self.gram):
            if sums is not None:
                team.reduce(sums, to)
        self.tokens = int(tokens)

    @property
    def squared_norms(self) -> Float[Tensor, " width"]:
        """Sum over tokens of the squares of each input."""
        return self.squares if self.gram is None else self.gram.diagonal().double()

    @property
    def means(self) -> Float[Tensor, " width"]:
        """Mean of each input over the tokens; 0 before the first."""
        return self.total / max(self.tokens, 1)

    @property
    def variances(self) -> Float[Tensor, " width"]:
        """Over tokens, with one degree of freedom taken by the mean."""
        centred = self.squared_norms - self.tokens * self.means.square()
        return centred.clamp(min=0) / max(self.tokens - 1, 1)
