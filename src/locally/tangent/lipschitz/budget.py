"""How many rows of coefficients are held at once, from a memory budget in bytes."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

COPIES = 10  # coefficients, their positive and negative parts, products and absolute values, in two nodes at a time


@dataclass(frozen=True)
class Budget:
    """Chunks rows so that the working set of one propagation stays within `memory` bytes."""

    memory: int
    widest: int  # entries of the widest node

    @property
    def per_row(self) -> int:
        return COPIES * self.widest * 8

    def batch(self, rows: int) -> int:
        """Of batch items with at least `rows` rows each that fit together; ValueError if not even one does."""
        fits = self.memory // (self.per_row * rows)
        if fits < 1:
            raise ValueError(
                f"memory: {self.memory} bytes do not hold one row of coefficients for one input, which needs about "
                f"{self.per_row * rows}"
            )
        return fits

    def chunks(self, index: Tensor, batch: int, per_index: int) -> Iterator[Tensor]:
        """Pieces of `index`, each of which stands for `per_index` rows in each of `batch` items."""
        self.batch(1)
        size = max(1, self.memory // (self.per_row * batch * per_index))
        return iter(index.split(size) if len(index) else ())
