"""causalicp, in an environment of its own."""

from collections.abc import Callable
from typing import Any

from benchmarks.peers import answer, ask_in


def elsewhere() -> Callable[..., Any] | None:
    return ask_in("causalicp", ["causalicp==0.1.1"], __name__)


def accepted_subsets(table: str) -> list[list[int]]:
    """At level 0.05, of a table whose last two columns are the target and the environment."""
    import causalicp
    import numpy as np

    rows = np.load(table, allow_pickle=False)
    data = [rows[rows[:, -1] == e, :-1] for e in np.unique(rows[:, -1])]
    found = causalicp.fit(data, rows.shape[1] - 2, alpha=0.05, verbose=False, color=False)
    return sorted(sorted(int(j) for j in subset) for subset in found.accepted_sets)


if __name__ == "__main__":
    answer(accepted_subsets)
