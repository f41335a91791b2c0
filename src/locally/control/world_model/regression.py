"""Losse-FTL as a scikit-learn regressor: one pass over a stream, no replay, no learning rate."""

from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.utils.validation import check_is_fitted, validate_data

from locally.checks import check_choice, check_count, check_finite, check_positive
from locally.control.validity import checked_arrays
from locally.control.world_model.encoding import LosseEncoder, Scale, read_inputs, take_over
from locally.control.world_model.leader import BlockLeader, FullLeader, block_leader

PREDICT_ROWS = 4096  # predictions are made in pieces, so that codes of long inputs take no memory


class LosseFTLRegressor(RegressorMixin, BaseEstimator):
    """Linear regression on locality-sensitive sparse codes that follows the leader: the fit to all data so far.

    After each sample the weights of its active nodes become the exact minimiser of the squared loss on everything seen,
    given the other weights. No update raises that loss, and none depends on the order of what came before through
    anything but the weights outside the block: old data are not forgotten. This sparse version is one step of block
    descent a sample, not the global leader; `n_sweeps` moves it closer, `solver="full"` is it.

    Inputs must be standardised before, and not again later. Where no data came predictions are near zero; where
    targets are random they are conditional means.

    Args:
        n_grids, grid_dim, n_bins, scale, projection, binning: of the `LosseEncoder`.
        eps: ridge, positive.
        ridge: "relative" multiplies it by the number of samples, as the paper does; "absolute" does not. None is
            relative for the sparse solver and absolute for the full one, which allows nothing else.
        solver: "sparse" or "full".
        update: "sample" solves after each row; "batch" takes in all rows of a call and then solves once on the union
            of their nodes.
        n_sweeps: blocks of earlier inputs, drawn at random, solved again after each sample (after each call where
            `update` is "batch").
        sweep_memory: how many inputs' node numbers are remembered for that; no data are.
        storage: of the Gram matrix, "dense", "rows" (only pairs of nodes that were active together) or "auto", which
            is dense up to 4096 nodes.
        memory_limit: MiB for the Gram matrix; the sample that needs more is refused with `MemoryError`.
        dtype: of the weights, "float64" or "float32".
        random_state: of projection and sweeps.

    Attributes:
        encoder_: of the inputs.
        n_seen_, n_targets_, n_features_in_: samples taken in, columns of y and of X.
        coef_: weights, (D, n_targets).
        gram_, xty_: A as a sparse matrix (D, D), B (D, n_targets); sparse solver only.
        grad_norm_: norm of the gradient of the normalised loss; sparse solver only.
        hindsight_loss_: min over W of the ridge loss on all data; full solver only.

    Raises:
        ValueError, TypeError: an argument is out of range, or data are of another width, NaN or infinite; before any
            update.
        MemoryError: see `memory_limit`.

    Complexity: with K active nodes and r pairs in their rows, O(r n_targets + K^3 / 3) a sample, whatever D and the
    number of samples; O(m^2) with `solver="full"`, m the nodes ever active.

    References: arXiv 2401.13034, algorithm 2.

    >>> rng = np.random.default_rng(0)
    >>> model = LosseFTLRegressor(n_grids=10, random_state=0)
    >>> for x in rng.uniform(-1, 1, (500, 2)):
    ...     model = model.partial_fit(x[None], [x[0] * x[1]])
    >>> bool(abs(model.predict([[0.5, 0.5]])[0] - 0.25) < 0.02)
    True
    """

    def __init__(
        self,
        n_grids: int = 50,
        grid_dim: int = 2,
        n_bins: int = 5,
        *,
        eps: float | int = 1e-5,
        ridge: str | None = None,
        solver: str = "sparse",
        update: str = "sample",
        n_sweeps: int = 0,
        sweep_memory: int = 1024,
        storage: str = "auto",
        memory_limit: float | int = 4096,
        scale: Scale = 1.0,
        projection: Any = "truncnorm",
        binning: str = "soft",
        dtype: str = "float64",
        random_state: Any = None,
    ) -> None:
        self.n_grids = n_grids
        self.grid_dim = grid_dim
        self.n_bins = n_bins
        self.eps = eps
        self.ridge = ridge
        self.solver = solver
        self.update = update
        self.n_sweeps = n_sweeps
        self.sweep_memory = sweep_memory
        self.storage = storage
        self.memory_limit = memory_limit
        self.scale = scale
        self.projection = projection
        self.binning = binning
        self.dtype = dtype
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    _flat: bool  # whether y came without a second dimension

    def fit(self, X: Any, y: Any) -> "LosseFTLRegressor":
        """Forget everything and go over X (n, n_inputs) and y (n,) or (n, n_targets) once, in order."""
        X, y = self._read(X, y, reset=True)
        self._start(X, y)
        return self._follow(X, y)

    def partial_fit(self, X: Any, y: Any) -> "LosseFTLRegressor":
        """Go on with the rows of X (n, n_inputs) and y (n,) or (n, n_targets), in order."""
        first = not hasattr(self, "leader_")
        X, y = self._read(X, y, reset=first)
        if first:
            self._start(X, y)
        return self._follow(X, y)

    def _read(self, X: Any, y: Any, reset: bool) -> tuple[ndarray, ndarray]:
        ready = not reset and type(X) is ndarray and type(y) is ndarray and y.dtype == np.float64 and len(y) == len(X)
        if ready:
            X = read_inputs(self, X)
            check_finite("y", y)
        else:
            X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, multi_output=True, reset=reset)
            y = np.asarray(y, np.float64)
        columns = y.reshape(len(y), -1)
        if not reset and (columns.shape[1] != self.n_targets_ or (y.ndim == 1) != self._flat):
            raise ValueError(f"y must have {self.n_targets_} target(s) as before, got shape {y.shape}")
        if reset:
            self._flat = y.ndim == 1
        return X, columns

    def _start(self, X: ndarray, y: ndarray) -> None:
        check_positive("eps", self.eps)
        check_choice("solver", self.solver, ("sparse", "full"))
        check_choice("ridge", self.ridge, (None, "relative", "absolute"))
        check_choice("update", self.update, ("sample", "batch"))
        check_choice("storage", self.storage, ("auto", "dense", "rows"))
        check_choice("dtype", self.dtype, ("float64", "float32"))
        check_count("n_sweeps", self.n_sweeps, at_least=0)
        check_count("sweep_memory", self.sweep_memory)
        check_positive("memory_limit", self.memory_limit)
        if self.solver == "full" and self.ridge == "relative":
            raise ValueError('ridge must be "absolute" with solver="full": no recursion has a ridge that grows')
        self.encoder_ = LosseEncoder(
            self.n_grids,
            self.grid_dim,
            self.n_bins,
            scale=self.scale,
            projection=self.projection,
            binning=self.binning,
            random_state=self.random_state,
        ).fit(X)
        self.n_targets_ = y.shape[1]
        self.leader_ = self._new_leader()
        self._memory = np.empty((self.sweep_memory if self.n_sweeps else 0, self.encoder_.n_active_), np.int64)
        self._remembered = 0
        seed = self.random_state if isinstance(self.random_state, int | np.integer) else None
        self._rng = np.random.default_rng(seed)

    def _new_leader(self) -> BlockLeader | FullLeader:
        D, dtype = self.encoder_.n_codes_, np.dtype(self.dtype)
        if self.solver == "full":
            return FullLeader(D, self.n_targets_, eps=self.eps, memory_limit=self.memory_limit, dtype=dtype)
        return block_leader(
            D,
            self.n_targets_,
            storage=self.storage,
            eps=self.eps,
            relative=self.ridge != "absolute",
            memory_limit=self.memory_limit,
            dtype=dtype,
        )

    def _follow(self, X: ndarray, y: ndarray) -> "LosseFTLRegressor":
        indices, values = self.encoder_._encode(X)
        for i, v, target in zip(indices, values, y):
            self.leader_.add(i, v, target)
            if self.update == "sample":
                self.leader_.solve_block(i)
                self._sweep_again(i)
        if self.update == "batch":
            self.leader_.solve_block(np.unique(indices))
            for i in indices:
                self._remember(i)
            self.sweep(self.n_sweeps)
        return self

    def _sweep_again(self, indices: Int[ndarray, " K"]) -> None:
        if self.n_sweeps:
            self._remember(indices)
            self.sweep(self.n_sweeps)

    def _remember(self, indices: Int[ndarray, " K"]) -> None:
        """Keep a uniform sample of the inputs' node numbers (reservoir sampling)."""
        if not self.n_sweeps:
            return
        capacity = len(self._memory)
        place = self._remembered if self._remembered < capacity else int(self._rng.integers(self._remembered + 1))
        if place < capacity:
            self._memory[place] = indices
        self._remembered += 1

    def sweep(self, blocks: int) -> "LosseFTLRegressor":
        """Solve `blocks` blocks of remembered inputs again, towards the global leader; needs `n_sweeps` > 0."""
        check_count("blocks", blocks, at_least=0)
        kept = min(self._remembered, len(self._memory))
        if blocks and not kept:
            raise ValueError("no inputs are remembered: set n_sweeps and sweep_memory to at least 1")
        for r in self._rng.integers(kept, size=blocks) if blocks else ():
            self.leader_.solve_block(self._memory[r])
        return self

    def predict(self, X: Any) -> Float[ndarray, "..."]:
        """Predictions (n,) or (n, n_targets), as y was, for X (n, n_inputs)."""
        check_is_fitted(self)
        X = read_inputs(self, X)
        out = np.empty((len(X), self.n_targets_))
        for at in range(0, len(X), PREDICT_ROWS):
            rows = slice(at, at + PREDICT_ROWS)
            out[rows] = self.leader_.predict(*self.encoder_._encode(X[rows]))
        return out[:, 0] if self._flat else out

    @property
    def n_seen_(self) -> int:
        """Samples learnt so far."""
        return self.leader_.n_seen

    @property
    def coef_(self) -> Float[ndarray, "D targets"]:
        """W, one row for each entry of the code; with solver="full" solved for when asked for."""
        return self.leader_.weights() if isinstance(self.leader_, FullLeader) else self.leader_.W

    @property
    def gram_(self) -> sp.csr_array:
        """The Gram matrix as SciPy has it; AttributeError with solver="full"."""
        return self._block_leader("gram_").gram.to_csr()

    @property
    def xty_(self) -> Float[ndarray, "D targets"]:
        """Sums of codes times targets; AttributeError with solver="full"."""
        return self._block_leader("xty_").B

    @property
    def grad_norm_(self) -> float:
        """Frobenius norm of the gradient of F_t at W; AttributeError with solver="full"."""
        return float(np.linalg.norm(self._block_leader("grad_norm_").gradient()))

    @property
    def hindsight_loss_(self) -> float:
        """Loss of the best weights in hindsight on all samples so far; AttributeError unless solver="full"."""
        if not isinstance(self.leader_, FullLeader):
            raise AttributeError('hindsight_loss_ needs solver="full"')
        return self.leader_.hindsight_loss

    def _block_leader(self, attribute: str) -> BlockLeader:
        if not isinstance(self.leader_, BlockLeader):
            raise AttributeError(f'{attribute} needs solver="sparse"')
        return self.leader_

    def state_dict(self) -> dict[str, Any]:
        """Arrays and numbers from which a regressor with the same arguments goes on as if nothing had happened."""
        if not hasattr(self, "leader_"):
            return {"fitted": False}
        return {
            "fitted": True,
            "solver": self.solver,
            "flat": self._flat,
            "n_targets": self.n_targets_,
            "codes": [self.encoder_.n_codes_, self.encoder_.n_active_],
            "projection": self.encoder_.projection_.copy(),
            "leader": self.leader_.state_dict(),
            "memory": self._memory[: self._remembered].copy(),
            "remembered": self._remembered,
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: the state is of a regressor with another solver or other grids; then nothing has changed.
        """
        fresh = clone(self)
        if state["fitted"]:
            fresh._restore(state)
        take_over(self, fresh)

    def _restore(self, state: dict[str, Any]) -> None:
        """As a new object, so that what is refused half-way leaves nothing behind."""
        if state["solver"] != self.solver:
            raise ValueError(f"state must be of a regressor with solver={self.solver!r}, got {state['solver']!r}")
        self._flat = bool(state["flat"])
        n_targets, P = int(state["n_targets"]), np.array(state["projection"])
        self.n_features_in_ = len(P)
        check_count("n_targets", n_targets)
        self._start(np.zeros((1, len(P))), np.zeros((1, n_targets)))
        if state["codes"] != [self.encoder_.n_codes_, self.encoder_.n_active_]:
            raise ValueError(
                f"state must be of codes with {self.encoder_.n_codes_} nodes, {self.encoder_.n_active_} of them "
                f"active, got {state['codes'][0]} and {state['codes'][1]}"
            )
        self.encoder_.projection_ = checked_arrays(state, {"projection": self.encoder_.projection_})["projection"]
        check_finite("projection", self.encoder_.projection_)
        self.leader_.load_state_dict(state["leader"])
        self._remembered = int(state["remembered"])
        here = self._memory[: self._remembered]
        here[:] = kept = checked_arrays(state, {"memory": here})["memory"]
        if kept.size and not (kept.min() >= 0 and kept.max() < self.encoder_.n_codes_):
            raise ValueError(f"state must remember nodes of 0, ..., {self.encoder_.n_codes_ - 1}")
        self._rng.bit_generator.state = state["rng"]
