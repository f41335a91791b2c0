"""Follow the leader on squared loss: block updates of the sparse problem, and the exact leader by orthogonal rotations.

F_t(W) = 1/2 sum_{i <= t} |W^T phi_i - y_i|^2 + r_t/2 |W|^2 with A_t = sum phi phi^T, B_t = sum phi y^T. The ridge is
r_t = eps t (relative, as in the paper) or r_t = eps (absolute). Source: arXiv 2401.13034, algorithm 2.
"""

import warnings
from typing import Any, no_type_check

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numba import njit
from numpy import ndarray
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import dposv

from locally.control.validity import checked_arrays
from locally.control.world_model.gram import DenseGram, Gram, RowGram

LARGEST_EPS = 1e-2  # up to here a block that is not positive definite in floating point gets a larger ridge


class BlockLeader:
    """Minimises F_t exactly over the weights of the active nodes, after every sample.

    With S the active nodes, W[S] = (A[S,S] + r I)^-1 (B[S] - A[S,S^c] W[S^c]): one step of exact block descent on the
    loss over all data so far. F_t never rises in it; the global leader is reached by going over the blocks again.

    Args:
        gram: the Gram matrix, empty.
        n_codes, n_targets: D and the width of y.
        eps: ridge, positive.
        relative: r_t = eps t instead of eps.
        dtype: of the weights W; sums are kept in float64.
    """

    def __init__(
        self, gram: Gram, n_codes: int, n_targets: int, *, eps: float | int, relative: bool, dtype: Any = np.float64
    ) -> None:
        self.gram = gram
        self.eps = eps
        self.relative = relative
        self.n_seen = 0
        self.W = np.zeros((n_codes, n_targets), dtype)
        self.B = np.zeros((n_codes, n_targets))

    @property
    def ridge(self) -> float:
        return self.eps * self.n_seen if self.relative else self.eps

    @property
    def nbytes(self) -> int:
        return self.gram.nbytes + self.W.nbytes + self.B.nbytes

    def add(self, indices: Int[ndarray, " K"], values: Float[ndarray, " K"], y: Float[ndarray, " targets"]) -> None:
        """Take in one sample without moving the weights."""
        self.gram.add(indices, values)
        self.B[indices] += values[:, None] * y
        self.n_seen += 1

    def solve_block(self, indices: Int[ndarray, " S"]) -> None:
        """Minimise F_t over W[S], the other weights held; `indices` ascend."""
        A_SS, A_S_W = self.gram.block(indices, self.W)
        right = self.B[indices] - A_S_W + A_SS @ self.W[indices]
        self.W[indices] = self._solve(A_SS, right)

    def _solve(self, A_SS: Float[ndarray, "S S"], right: Float[ndarray, "S targets"]) -> Float[ndarray, "S targets"]:
        ridge = self.ridge
        diagonal = np.arange(len(A_SS))
        plain = A_SS[diagonal, diagonal]
        while True:
            A_SS[diagonal, diagonal] = plain + ridge
            _, solution, info = dposv(A_SS, right)
            if info == 0:
                return solution
            # each grid's values sum to one, so the block is singular but for the ridge
            ridge *= 10
            if ridge > LARGEST_EPS * max(self.n_seen, 1):
                raise np.linalg.LinAlgError(f"the block of {len(A_SS)} nodes is not positive definite: raise eps")
            warnings.warn(f"eps = {self.eps:g} is lost in rounding, took more for this update", stacklevel=4)

    def predict(self, indices: Int[ndarray, "n K"], values: Float[ndarray, "n K"]) -> Float[ndarray, "n targets"]:
        return mix_rows(indices, values, self.W)

    def objective(self, square_sum: float) -> float:
        """F_t(W) from sum |y_i|^2, which the sums A and B do not hold."""
        W = self.W.astype(np.float64, copy=False)
        quadratic = np.sum(W * (self.gram.to_csr() @ W)) - 2 * np.sum(W * self.B) + square_sum
        return float(quadratic + self.ridge * np.sum(W * W)) / 2

    def gradient(self) -> Float[ndarray, "D targets"]:
        """Of F_t / t: zero on the block that was solved last."""
        W = self.W.astype(np.float64, copy=False)
        return (self.gram.to_csr() @ W - self.B + self.ridge * W) / max(self.n_seen, 1)

    def state_dict(self) -> dict[str, Any]:
        gram = self.gram.to_csr()
        active = np.flatnonzero((self.B != 0).any(axis=1) | (self.W != 0).any(axis=1))
        return {
            "n_seen": self.n_seen,
            "gram_pointers": gram.indptr.copy(),
            "gram_columns": gram.indices.copy(),
            "gram_values": gram.data.copy(),
            "active": active,
            "W": self.W[active],
            "B": self.B[active],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its leader had other codes or targets."""
        D = len(self.W)
        gram = sp.csr_array((state["gram_values"], state["gram_columns"], state["gram_pointers"]), shape=(D, D))
        gram.check_format(full_check=True)  # the rows are read by compiled loops
        active = np.asarray(state["active"])
        if (active != np.unique(active)).any() or (active.size and not 0 <= active[0] <= active[-1] < D):
            raise ValueError(f"state must hold ascending nodes of 0, ..., {D - 1} as active")
        rows = checked_arrays(state, {"W": self.W[active], "B": self.B[active]})
        n_seen = int(state["n_seen"])
        self.gram.load_csr(gram)
        self.W[:], self.B[:] = 0, 0
        self.W[active], self.B[active] = rows["W"], rows["B"]
        self.n_seen = n_seen


class FullLeader:
    """The global leader after every sample, for an absolute ridge: W minimises F_t over all weights.

    The triangle R with R^T R = A + eps I over the m nodes seen so far takes in a sample by Givens rotations, O(m^2),
    which is recursive least squares without its squared condition number; nothing is ever refitted. What the rotations
    leave over of y is min_W F_t, so the regret comes for free. A ridge that grows with t has no such recursion.

    Args:
        n_codes, n_targets: D and the width of y.
        eps: ridge, positive.
        memory_limit: MiB for the triangle; the sample that needs more is refused.
        dtype: of the weights that are handed out.
    """

    def __init__(
        self,
        n_codes: int,
        n_targets: int,
        *,
        eps: float | int,
        memory_limit: float | int = np.inf,
        dtype: Any = np.float64,
    ) -> None:
        self.eps = eps
        self.memory_limit = memory_limit
        self.n_seen = 0
        self.hindsight_loss = 0.0  # min_W 2 F_t
        self.slot = np.full(n_codes, -1, np.int64)  # of each node in R, -1 before it was active
        self.n_slots = 0
        self.R = np.zeros((0, 0))
        self.z = np.zeros((0, n_targets))
        self.W = np.zeros((n_codes, n_targets), dtype)
        self._stale = False

    @property
    def nbytes(self) -> int:
        return self.R.nbytes + self.z.nbytes + self.W.nbytes + self.slot.nbytes

    def add(self, indices: Int[ndarray, " K"], values: Float[ndarray, " K"], y: Float[ndarray, " targets"]) -> None:
        new = indices[self.slot[indices] < 0]
        self._open_slots(new)
        phi = np.zeros(self.n_slots)
        phi[self.slot[indices]] = values
        left_over = y.astype(np.float64)
        _rotate_in(self.R, self.z, phi, left_over)
        self.hindsight_loss += float(left_over @ left_over)
        self.n_seen += 1
        self._stale = True

    def _open_slots(self, new: Int[ndarray, " new"]) -> None:
        m = self.n_slots + len(new)
        if m > len(self.R):
            room = min(max(2 * len(self.R), m), len(self.slot))
            if 8 * room**2 > self.memory_limit * 2**20:
                raise MemoryError(
                    f'solver="full" with {m} nodes needs {8 * room**2 / 2**20:,.0f} MiB, memory_limit is '
                    f'{self.memory_limit:,.0f} MiB: take solver="sparse"'
                )
            R, z = np.zeros((room, room)), np.zeros((room, self.z.shape[1]))
            R[: self.n_slots, : self.n_slots] = self.R[: self.n_slots, : self.n_slots]
            z[: self.n_slots] = self.z[: self.n_slots]
            self.R, self.z = R, z
        places = np.arange(self.n_slots, m)
        self.R[places, places] = np.sqrt(self.eps)
        self.slot[new] = places
        self.n_slots = m

    def solve_block(self, indices: Int[ndarray, " S"]) -> None:
        """Nothing to do: the weights follow from R when they are asked for."""

    def weights(self) -> Float[ndarray, "D targets"]:
        if self._stale:
            seen = np.flatnonzero(self.slot >= 0)
            m = self.n_slots
            self.W[seen] = solve_triangular(self.R[:m, :m], self.z[:m], check_finite=False)[self.slot[seen]]
            self._stale = False
        return self.W

    def predict(self, indices: Int[ndarray, "n K"], values: Float[ndarray, "n K"]) -> Float[ndarray, "n targets"]:
        return mix_rows(indices, values, self.weights())

    def state_dict(self) -> dict[str, Any]:
        m = self.n_slots
        return {
            "n_seen": self.n_seen,
            "hindsight_loss": self.hindsight_loss,
            "slot": self.slot.copy(),
            "R": self.R[:m, :m].copy(),
            "z": self.z[:m].copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError if its leader had other codes or targets."""
        slot = checked_arrays(state, {"slot": self.slot})["slot"]
        m = int((slot >= 0).sum())
        if not np.array_equal(np.sort(slot[slot >= 0]), np.arange(m)):
            raise ValueError(f"state must hold each of the slots 0, ..., {m - 1} once")
        arrays = checked_arrays(state, {"R": np.empty((m, m)), "z": np.empty((m, self.z.shape[1]))})
        n_seen, hindsight_loss = int(state["n_seen"]), float(state["hindsight_loss"])
        self.n_seen, self.hindsight_loss = n_seen, hindsight_loss
        self.slot, self.R, self.z = slot, arrays["R"], arrays["z"]
        self.n_slots = m
        self.W[:] = 0
        self._stale = self.n_slots > 0


def block_leader(
    n_codes: int,
    n_targets: int,
    *,
    storage: str,
    eps: float | int,
    relative: bool,
    memory_limit: float | int = np.inf,
    dtype: Any = np.float64,
    dense_up_to: int = 4096,
) -> BlockLeader:
    """A block leader on "dense" or "rows" storage; "auto" is dense up to `dense_up_to` nodes."""
    dense = storage == "dense" or (storage == "auto" and n_codes <= dense_up_to)
    gram: Gram = DenseGram(n_codes, memory_limit) if dense else RowGram(n_codes, memory_limit)
    return BlockLeader(gram, n_codes, n_targets, eps=eps, relative=relative, dtype=dtype)


@njit(cache=True, nogil=True)
@no_type_check
def mix_rows(indices, values, W):
    """out[r] = sum_k values[r, k] W[indices[r, k]], (n, targets) in float64."""
    n, K = indices.shape
    targets = W.shape[1]
    out = np.zeros((n, targets))
    for r in range(n):
        for k in range(K):
            i, v = indices[r, k], values[r, k]
            for o in range(targets):
                out[r, o] += v * W[i, o]
    return out


@njit(cache=True, nogil=True, fastmath={"contract"})
@no_type_check
def _rotate_in(R, z, phi, y):
    """Zero `phi` against the triangle R by rotations, which also act on z and y."""
    for k in range(phi.size):
        if phi[k] == 0.0:
            continue
        row = R[k]
        radius = np.hypot(row[k], phi[k])
        c, s = row[k] / radius, phi[k] / radius
        for j in range(k, phi.size):
            upper, lower = row[j], phi[j]
            row[j] = c * upper + s * lower
            phi[j] = c * lower - s * upper
        for o in range(y.size):
            upper, lower = z[k, o], y[o]
            z[k, o] = c * upper + s * lower
            y[o] = c * lower - s * upper
