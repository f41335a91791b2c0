"""Arrays or named columns in, checked observations out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from locally.checks import check_shape


@dataclass(frozen=True)
class Observations:
    """Outcome y, treatment a, instrument z and covariates X of n units, all finite, no column constant."""

    y: Float[ndarray, " n"]
    a: Float[ndarray, " n"]
    z: Float[ndarray, " n"]
    X: Float[ndarray, "n d"]
    names: tuple[str, ...]  # outcome, treatment, instrument, covariates

    @property
    def n(self) -> int:
        """Number of units."""
        return self.y.size

    def __getitem__(self, rows: Int[ndarray, " rows"] | Bool[ndarray, " n"]) -> "Observations":
        return Observations(self.y[rows], self.a[rows], self.z[rows], self.X[rows], self.names)

    @classmethod
    def read(cls, y: Any, a: Any, z: Any, X: Any) -> "Observations":
        """Check and convert; the caller's data stay as they were.

        Args:
            y, a, z: one column each (array, list, series), or, where X has named columns, the name of one of them.
            X: covariates: an (n, d) array, or anything with named columns - a data frame of any library, a mapping
                of names to columns, a structured array. Columns that y, a, z name are not covariates.

        Raises:
            TypeError: a column is not numeric, or y, a, z are names and X has none.
            ValueError: lengths differ, a column holds NaN or infinity or is constant, a name is not there.
        """
        names, columns = _columns(X)
        given = {"y": y, "a": a, "z": z}
        picked: dict[str, str] = {}
        for role, value in given.items():
            if not isinstance(value, str):
                continue
            if not names:
                raise TypeError(f"{role} is the name {value!r}, but X has no named columns")
            if value not in names:
                raise ValueError(f"{role} names the column {value!r}, but X has {', '.join(names)}")
            if value in picked.values():
                raise ValueError(f"{role} names the column {value!r} a second time")
            picked[role] = value
        single = {
            role: _vector(role, columns[names.index(picked[role])] if role in picked else value)
            for role, value in given.items()
        }
        labels = [picked.get(role, role) for role in given]
        kept = [j for j in range(len(columns)) if not names or names[j] not in picked.values()]
        if not kept:
            raise ValueError("X must hold at least one covariate")
        covariates = [names[j] if names else f"X{j + 1}" for j in kept]
        n = single["y"].size
        for role, column in single.items():
            if column.size != n:
                raise ValueError(f"{role} has {column.size} entries, but y has {n}")
        matrix = np.column_stack([_vector(f"X[{name!r}]", columns[j]) for name, j in zip(covariates, kept)])
        if matrix.shape[0] != n:
            raise ValueError(f"X has {matrix.shape[0]} rows, but y has {n}")
        for role, column in single.items():
            _check_varies(role, column)
        for name, column in zip(covariates, matrix.T):
            _check_varies(f"X[{name!r}]", column)
        return cls(single["y"], single["a"], single["z"], matrix, (*labels, *covariates))


def check_binary(name: str, column: Float[ndarray, " n"]) -> None:
    values = np.unique(column)
    if not np.isin(values, (0, 1)).all():
        shown = ", ".join(f"{v:g}" for v in values[:4])
        raise ValueError(f"{name} must be binary, 0 or 1, got the values {shown}{', ...' if values.size > 4 else ''}")


def check_cells(obs: Observations, n_folds: int) -> None:
    """Every (instrument, treatment) cell that is not empty must be able to give each fold a row."""
    if obs.n < n_folds:
        raise ValueError(f"n_folds is {n_folds}, but there are only {obs.n} rows")
    binary = set(np.unique(obs.a)) <= {0.0, 1.0}
    for arm in np.unique(obs.z):
        for level in (0.0, 1.0) if binary else (None,):
            rows = int(((obs.z == arm) & ((obs.a == level) if level is not None else True)).sum())
            if 0 < rows < n_folds:
                cell = f"z = {arm:g}" + ("" if level is None else f", a = {level:g}")
                raise ValueError(f"n_folds is {n_folds}, but only {rows} rows have {cell}")


def _columns(X: Any) -> tuple[list[str], list[Any]]:
    """Names (empty where there are none) and columns."""
    if isinstance(X, Mapping):
        names = [str(k) for k in X]
        return names, list(X.values())
    if hasattr(X, "columns"):
        return [str(c) for c in X.columns], [X[c] for c in X.columns]
    array = np.asarray(X)
    if array.dtype.names:
        return list(array.dtype.names), [array[c] for c in array.dtype.names]
    if array.ndim == 1:
        array = array[:, None]
    check_shape("X", array, (None, None))
    return [], list(array.T)


def _vector(name: str, column: Any) -> Float[ndarray, " n"]:
    array = np.asarray(column)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be numeric, got dtype {array.dtype}")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    check_shape(name, array, (None,))
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return array


def _check_varies(name: str, column: Float[ndarray, " n"]) -> None:
    if column.size == 0:
        raise ValueError(f"{name} is empty")
    if (column == column[0]).all():
        raise ValueError(f"{name} is constant ({column[0]:g}): it must vary")
