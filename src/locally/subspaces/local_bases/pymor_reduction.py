"""Dictionaries of local bases for pyMOR: VectorArrays in and out, one reduced model for each basis.

Works with the vectors of any solver that pyMOR drives: all simulations are orthonormalised once in the given product,
and everything after that happens in their coordinates, so no entry of a vector is ever read. pyMOR (the extra `pymor`)
is imported when it is used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from locally.errors import require
from locally.subspaces.local_bases.dictionary import LocalReducedBases
from locally.subspaces.local_bases.snapshots import is_vector_array


@dataclass(frozen=True)
class VectorArrayBases:
    """A dictionary whose bases are VectorArrays.

    Attributes:
        bases: K VectorArrays, orthonormal in the product.
        estimator: the fitted `LocalReducedBases`, in coordinates of `span`: labels_, medoid_indices_, predict, ...
        span: orthonormal VectorArray of all training snapshots.
        product: pyMOR operator, None for Euclidean.
    """

    bases: tuple[Any, ...]
    estimator: LocalReducedBases
    span: Any
    product: Any = None

    def errors(self, U: Any) -> Float[ndarray, "n clusters"]:
        """Relative projection error of each vector on each basis."""
        norms = U.norm(self.product)
        columns = [(U - V.lincomb(V.inner(U, self.product))).norm(self.product) / norms for V in self.bases]
        return np.column_stack(columns)

    def assign(self, U: Any) -> Int[ndarray, " n"]:
        """The nearest medoid of each vector, by its component in the span of the training snapshots.

        The component outside is orthogonal to every medoid and changes no order.
        """
        return self.estimator.assign(self.span.inner(U, self.product).T)


def fit_vector_arrays(
    estimator: LocalReducedBases, U: Any | Sequence[Any], parameters: Any = None, product: Any = None
) -> VectorArrayBases:
    """Fit a copy of `estimator` to pyMOR vectors.

    Args:
        estimator: hyper-parameters; its own `product` must be None.
        U: a VectorArray of n steady solutions, or a list of n VectorArrays, one trajectory each.
        parameters: (n, d) array, or n pyMOR parameter values (`Mu`).
        product: pyMOR operator of the inner product, such as `fom.h1_0_product`; None for Euclidean.

    Raises:
        TypeError: U is not made of VectorArrays.
        ValueError: as `LocalReducedBases.fit`.
    """
    gram_schmidt = require("pymor.algorithms.gram_schmidt", "pymor").gram_schmidt
    if estimator.product is not None:
        raise ValueError("product must be given to fit_vector_arrays, not to the estimator")
    steady = is_vector_array(U)
    pieces: list[Any] = [U] if steady else list(U)
    if not pieces or not all(map(is_vector_array, pieces)):
        raise TypeError("U must be a pyMOR VectorArray or a non-empty list of VectorArrays")
    together = pieces[0].empty(reserve=sum(map(len, pieces)))
    for piece in pieces:
        together.append(piece)
    norms = together.norm(product)
    if not np.isfinite(norms).all():
        raise ValueError(f"U holds NaN or infinity in vector {np.flatnonzero(~np.isfinite(norms))[0]}")
    starts = np.cumsum([0, *map(len, pieces)])[:-1]
    sizes = norms if steady else np.add.reduceat(norms, starts)
    if not (sizes > 0).all():
        raise ValueError(f"U has zero norm in simulation {np.flatnonzero(~(sizes > 0))[0]}: it spans no direction")
    # unit vectors, so that Gram-Schmidt's relative tolerance treats small amplitudes like large ones
    scale = np.where(norms > 0, norms, 1)
    together.scal(1 / scale)
    span, R = gram_schmidt(together, product, return_R=True, check=False, copy=False)
    coordinates = R * scale
    snapshots = coordinates.T if steady else np.split(coordinates, starts[1:], axis=1)
    fitted = clone(estimator).fit(snapshots, None if parameters is None else parameter_table(parameters))
    return VectorArrayBases(tuple(span.lincomb(basis) for basis in fitted.bases_), fitted, span, product)


def parameter_table(parameters: Any) -> Float[ndarray, "n d"]:
    """pyMOR parameter values as rows; arrays pass."""
    if isinstance(parameters, ndarray):
        return parameters
    return np.array([p.to_numpy() if hasattr(p, "to_numpy") else p for p in parameters], dtype=np.float64)


class LocalReductor:
    """One pyMOR reductor for each basis; `reduce` gives a model that picks the right ROM by itself.

    Args:
        fom: pyMOR model.
        dictionary: from `fit_vector_arrays`, fitted with parameters.
        reductor: called as reductor(fom, RB=basis, product=product); default `StationaryRBReductor`, the Galerkin
            projection. `CoerciveRBReductor` and others with these arguments fit too.
    """

    def __init__(self, fom: Any, dictionary: VectorArrayBases, reductor: Callable[..., Any] | None = None) -> None:
        check_is_fitted(dictionary.estimator)
        if dictionary.estimator.classifier_ is None:
            raise ValueError("dictionary must be fitted with parameters: without them no ROM can be chosen")
        make = reductor or require("pymor.reductors.basic", "pymor").StationaryRBReductor
        self.fom = fom
        self.dictionary = dictionary
        self.reductors = [make(fom, RB=basis, product=dictionary.product) for basis in dictionary.bases]

    def reduce(self) -> "LocalModel":
        """A ROM for every basis, under the classifier that picks one by the parameters."""
        return LocalModel(tuple(r.reduce() for r in self.reductors), tuple(self.reductors), self.dictionary.estimator)


@dataclass(frozen=True)
class LocalModel:
    """Reduced models of which each solve uses one.

    Attributes:
        roms: K pyMOR models.
    """

    roms: tuple[Any, ...]
    reductors: tuple[Any, ...]
    estimator: LocalReducedBases

    def choose(self, mu: Any) -> int:
        """The cluster that the classifier predicts for a parameter value."""
        return int(self.estimator.predict(parameter_table([mu]))[0])

    def solve(self, mu: Any) -> Any:
        """The reduced solution for mu, reconstructed as a VectorArray of the full space."""
        k = self.choose(mu)
        return self.reductors[k].reconstruct(self.roms[k].solve(mu))
