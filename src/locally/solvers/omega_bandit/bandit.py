"""Ask and tell: what every learner of a parameter on a grid offers, and the bookkeeping that they share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, no_type_check, runtime_checkable

import numpy as np
from jaxtyping import Float
from numba import njit
from numpy import ndarray

from locally.checks import check_choice, check_finite, check_nonnegative

RandomSource = int | np.random.Generator | None
Real = float | int
Outside = Literal["clip", "raise"]


@dataclass(frozen=True)
class Choice:
    """What a learner answers to `ask`: solve with `value`, then `tell` the cost together with this choice.

    Attributes:
        token: number that names this ask.
        arm, value: index into the grid and the parameter there.
        probability: with which it was drawn.
        context: what the caller gave, None for learners without context.
    """

    token: int
    arm: int
    value: float
    probability: float
    context: Real | None = None


@runtime_checkable
class ParameterBandit(Protocol):
    """Chooses one scalar parameter a round and sees nothing but the cost of that choice.

    Costs may be iteration counts, seconds or anything else that is non-negative and better when smaller. Several asks
    may be open at once; their costs may come in any order.
    """

    grid: ndarray

    def ask(self, context: Real | None = None) -> Choice:
        """Choose the parameter for the next solve; the choice stays open until its cost is told or it is cancelled.

        Args:
            context: a number known before the solve, for learners that use one.
        """

    def tell(self, cost: Real, choice: Choice | int | None = None) -> None:
        """Report the cost of a choice, which may be left out while exactly one ask is open; it is then closed."""

    def cancel(self, choice: Choice | int | None = None) -> None:
        """Withdraw an ask whose solve never ended: nothing is learnt from it."""

    def distribution(self, context: Real | None = None) -> ndarray:
        """Probability of every arm at the next ask, given this context."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round depends on, open asks and generator included, as plain JSON data."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the learner must have been constructed with the same arguments."""


class GridBandit(ABC):
    """Draws arms of a grid, keeps the open asks, saves and restores itself.

    A learner adds `distribution`, what it must `_remember` from an ask until the cost comes, `_learn`, and its state
    as arrays and numbers.

    Args:
        grid: the parameters to choose from, distinct and finite.
        min_cost: the smallest cost possible; 1 for iteration counts. Smaller costs (a solve that had nothing to do)
            count as this.
        rng: seed or generator of the draws.
    """

    def __init__(self, grid: Sequence[float] | ndarray, *, min_cost: float = 1.0, rng: RandomSource = None) -> None:
        values = np.array(grid, dtype=np.float64)
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"grid must be a non-empty list of numbers, got shape {values.shape}")
        check_finite("grid", values)
        if np.unique(values).size != values.size:
            raise ValueError("grid must hold distinct values")
        check_nonnegative("min_cost", min_cost)
        self.grid = values
        self.min_cost = float(min_cost)
        self.rng = np.random.default_rng(rng)
        self._next_token = 0
        self._open: dict[int, tuple[Choice, list[float]]] = {}

    @property
    def open_asks(self) -> tuple[Choice, ...]:
        """Asks whose cost has not come yet, oldest first."""
        return tuple(choice for choice, _ in self._open.values())

    @abstractmethod
    def distribution(self, context: Real | None = None) -> Float[ndarray, " d"]:
        """Probability of every arm at the next ask: positive, sum 1."""

    @abstractmethod
    def _remember(self, context: Real | None, p: Float[ndarray, " d"], arm: int) -> list[float]:
        """What the learner needs again when the cost comes."""

    @abstractmethod
    def _learn(self, choice: Choice, memory: list[float], cost: float) -> None: ...

    @abstractmethod
    def _save(self) -> dict[str, Any]: ...

    @abstractmethod
    def _restore(self, state: Mapping[str, Any]) -> None: ...

    def ask(self, context: Real | None = None) -> Choice:
        """Draw the parameter for the next solve.

        Raises:
            ValueError: the learner needs a context and got none, NaN, or one out of bounds where those are refused.
        """
        p = self.distribution(context)
        arm = _draw(p, self.rng.random())
        choice = Choice(self._next_token, arm, float(self.grid[arm]), float(p[arm]), context)
        self._open[choice.token] = (choice, self._remember(context, p, arm))
        self._next_token += 1
        return choice

    def tell(self, cost: Real, choice: Choice | int | None = None) -> None:
        """Report what a choice cost.

        Args:
            cost: finite, not negative.
            choice: what `ask` returned, or its token; may be left out while exactly one ask is open.

        Raises:
            ValueError: the cost is negative, NaN or infinite; the ask stays open.
            RuntimeError: no such ask is open.
        """
        check_nonnegative("cost", cost)
        asked, memory = self._open.pop(self._token_of(choice))
        self._learn(asked, memory, max(float(cost), self.min_cost))

    def cancel(self, choice: Choice | int | None = None) -> None:
        """Withdraw an ask whose solve never ended: nothing is learnt from it."""
        del self._open[self._token_of(choice)]

    def _token_of(self, choice: Choice | int | None) -> int:
        if choice is None:
            if len(self._open) != 1:
                raise RuntimeError(f"say which choice this is about: {len(self._open)} asks are open")
            return next(iter(self._open))
        token = choice.token if isinstance(choice, Choice) else choice
        if token not in self._open:
            raise RuntimeError(f"no open ask has token {token}: it was told or cancelled, or is another learner's")
        return token

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round depends on, open asks and generator included, as plain JSON data."""
        return {
            "learner": type(self).__name__,
            "grid": self.grid.tolist(),
            "min_cost": self.min_cost,
            "next_token": self._next_token,
            "open": [[asdict(choice), list(memory)] for choice, memory in self._open.values()],
            "rng": _plain(self.rng.bit_generator.state),
            "state": self._save(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` left off; the learner must have been constructed with the same arguments.

        Raises:
            ValueError: the state is of another learner, another grid or another bit generator, or damaged; then nothing
                has changed.
        """
        mine = {"learner": type(self).__name__, "grid": self.grid.tolist(), "min_cost": self.min_cost}
        for name, value in mine.items():
            if state.get(name) != value:
                raise ValueError(f"state must be of a learner with {name} {value}, got {state.get(name)}")
        generator = self.rng.bit_generator.state["bit_generator"]
        if state["rng"]["bit_generator"] != generator:
            raise ValueError(f"state must come from a {generator} generator, got {state['rng']['bit_generator']}")
        type(self.rng.bit_generator)().state = state["rng"]  # raises here what it would raise below
        next_token = int(state["next_token"])
        open_asks = {entry["token"]: (Choice(**entry), list(memory)) for entry, memory in state["open"]}
        for choice, _ in open_asks.values():
            if not 0 <= choice.arm < self.grid.size:
                raise ValueError(f"state must hold asks of arms 0, ..., {self.grid.size - 1}, got arm {choice.arm}")
        self._restore(state["state"])
        self.rng.bit_generator.state = state["rng"]
        self._next_token, self._open = next_token, open_asks


class ContextInterval:
    """The interval [low, high] that contexts come from, and what to do with one outside.

    "clip" moves it to the nearer end, where the learner is merely less well informed; "raise" refuses it.
    """

    def __init__(self, bounds: tuple[Real, Real], outside: Outside) -> None:
        if len(bounds) != 2 or not -np.inf < bounds[0] < bounds[1] < np.inf:
            raise ValueError(f"bounds must be (low, high) with low < high, both finite, got {bounds!r}")
        check_choice("outside", outside, ("clip", "raise"))
        self.low, self.high = float(bounds[0]), float(bounds[1])
        self.outside = outside

    @property
    def width(self) -> float:
        return self.high - self.low

    def place(self, context: Real | None) -> float:
        """The context's place in the interval, from 0 at `low` to 1 at `high`."""
        if context is None or not -np.inf < context < np.inf:
            raise ValueError(f"context must be a finite number, got {context!r}")
        place = (context - self.low) / self.width
        if 0 <= place <= 1:
            return place
        if self.outside == "raise":
            raise ValueError(f"context must lie in [{self.low:g}, {self.high:g}], got {context!r}")
        return min(max(place, 0.0), 1.0)


def restored(name: str, values: Any, here: ndarray) -> ndarray:
    """An array from a state, which must be as large as the one `here`: compiled loops index both alike."""
    array = np.array(values, here.dtype)
    if array.shape != here.shape:
        raise ValueError(f"state must hold {name} of shape {here.shape}, got {array.shape}")
    return array


@njit(cache=True, nogil=True)
@no_type_check
def _draw(p, uniform):
    """The arm at which the cumulative distribution passes `uniform`; the last one where rounding keeps it below."""
    for arm in range(p.size):
        uniform -= p[arm]
        if uniform < 0:
            return arm
    return p.size - 1


def _plain(state: Any) -> Any:
    """A bit generator's state with arrays as lists, which its setter takes back."""
    if isinstance(state, Mapping):
        return {name: _plain(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, ndarray) else state
