"""The eight explanation methods as neighbourhood and loss, and the interfaces that other libraries give them.

Source: Han, Srinivas, Lakkaraju, arXiv 2206.01254, Table 1. `explain` is the functional form; `Attributor` drops into
code written for captum; every result also has shap's `values` and `base_values`.
"""

import inspect
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from torch import Tensor

from locally.checks import check_choice
from locally.tangent.explanation.approximation import LFA, Explanation, Loss
from locally.tangent.explanation.black_box import Points, Target
from locally.tangent.explanation.masks import BinaryMask, LeaveOneOut
from locally.tangent.explanation.neighbourhoods import (
    GaussianNoise,
    Neighbourhood,
    ScaleNoise,
)


class Method(StrEnum):
    """Names of the eight methods, additive family first."""

    C_LIME = "c_lime"
    SMOOTHGRAD = "smoothgrad"
    GRADIENT = "gradient"
    INTEGRATED_GRADIENTS = "integrated_gradients"
    GRADIENT_X_INPUT = "gradient_x_input"
    LIME = "lime"
    KERNEL_SHAP = "kernel_shap"
    OCCLUSION = "occlusion"

    @property
    def additive(self) -> bool:
        """Whether its perturbations are added to the input, so that its attributions are slopes over the input."""
        return self in (Method.C_LIME, Method.SMOOTHGRAD, Method.GRADIENT)

    @property
    def loss(self) -> Loss:
        """What the method's fit compares: gradients or values."""
        gradient = (Method.SMOOTHGRAD, Method.GRADIENT, Method.INTEGRATED_GRADIENTS, Method.GRADIENT_X_INPUT)
        return Loss.GRADIENT if self in gradient else Loss.SQUARED


def local_approximation(
    method: Method | str,
    *,
    sigma: float | Shaped[ndarray, " d"] | Float[Tensor, " d"] | None = None,
    low: float | None = None,
    width: float = 1.0,
    convention: str = "paper",
    groups: Shaped[ndarray, " d"] | None = None,
    importance: bool = True,
    **options: Any,
) -> LFA:
    """The LFA instance that is the named method.

    Args:
        method: one of `Method`.
        sigma: standard deviation of the noise of c_lime and smoothgrad (default 0.1); for gradient it replaces the
            limit sigma -> 0, which is taken exactly.
        low: smallest scale of integrated_gradients (default 0); for gradient_x_input it replaces the limit low -> 1.
        width, convention: exponential kernel of lime, see `BinaryMask`.
        groups: features that lime, kernel_shap and occlusion remove together.
        importance: see `BinaryMask`.
        options: passed on to `LFA` (n_samples, exact, model, penalty, alpha, batch_size, ...).

    >>> local_approximation("lime", width=2.0).neighbourhood.kernel
    'exponential'
    """
    check_choice("method", method, tuple(str(m) for m in Method))
    method = Method(method)
    neighbourhoods: dict[Method, Callable[[], Neighbourhood]] = {
        Method.C_LIME: lambda: GaussianNoise(sigma=0.1 if sigma is None else sigma),
        Method.SMOOTHGRAD: lambda: GaussianNoise(sigma=0.1 if sigma is None else sigma),
        Method.GRADIENT: lambda: GaussianNoise(sigma=0.0 if sigma is None else sigma),
        Method.INTEGRATED_GRADIENTS: lambda: ScaleNoise(low=0.0 if low is None else low),
        Method.GRADIENT_X_INPUT: lambda: ScaleNoise(low=1.0 if low is None else low),
        Method.LIME: lambda: BinaryMask(
            kernel="exponential", width=width, convention=convention, groups=groups, importance=importance
        ),
        Method.KERNEL_SHAP: lambda: BinaryMask(kernel="shapley", groups=groups, importance=importance),
        Method.OCCLUSION: lambda: LeaveOneOut(groups=groups),
    }
    return LFA(neighbourhood=neighbourhoods[method](), **({"loss": method.loss} | options))


def explain(f: Callable[[Any], Any], X: Points, method: Method | str, **options: Any) -> Explanation:
    """Explain f at every row of X by the named method.

    Args:
        f, X, method: see `LFA.explain` and `Method`.
        options: anything that `local_approximation` or `LFA.explain` takes.

    >>> import numpy as np
    >>> f = lambda x: x[:, 0] * x[:, 1] + 2 * x[:, 2]
    >>> explain(f, np.array([[2.0, 3.0, 1.0]]), "kernel_shap").values.round(6)
    array([[3., 3., 2.]])
    """
    at_call = {k: options.pop(k) for k in tuple(options) if k in CALL_OPTIONS}
    return local_approximation(method, **options).explain(f, X, **at_call)


CALL_OPTIONS = frozenset(inspect.signature(LFA.explain).parameters) - {"self", "f", "X"}


class Attributor:
    """A method behind captum's interface: construct with the model, then call `attribute`.

    Args:
        forward_func: a torch module or callable on (batch, ...) tensors.
        method: one of `Method`.
        options: as for `local_approximation`.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2).eval()
    >>> saliency = Attributor(model, "gradient")
    >>> torch.equal(saliency.attribute(torch.ones(1, 3), target=1), model.weight[1:2].detach())
    True
    """

    def __init__(self, forward_func: Callable[[Any], Any], method: Method | str, **options: Any) -> None:
        check_choice("method", method, tuple(str(m) for m in Method))
        if "groups" in options:
            raise ValueError("groups is an option of explain: pass feature_mask to attribute")
        self.forward_func = forward_func
        self.method = Method(method)
        self.options = options
        local_approximation(self.method, **options)  # refuses bad options before any work

    def attribute(
        self,
        inputs: Float[Tensor, "batch *features"],
        baselines: float | Tensor | None = None,
        target: Target = None,
        feature_mask: Shaped[Tensor, "..."] | None = None,
        *,
        n_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch *features"]:
        """Attributions in the shape of the inputs; all features of a group get the group's attribution.

        Args:
            inputs: (batch, ...) of any number of feature dimensions.
            baselines: None for 0, a number, or a tensor of the shape of the inputs or of one input.
            target: as for `explain`.
            feature_mask: group numbers from 0, one for each feature of an input, as in captum.
        """
        result = self.explain(inputs, baselines, target, feature_mask, n_samples=n_samples, generator=generator)
        attributions, groups = result.attributions, self._groups(inputs, feature_mask)
        if groups is not None:
            attributions = attributions[:, torch.as_tensor(groups, device=attributions.device)]
        return attributions.reshape(inputs.shape)

    def explain(
        self,
        inputs: Float[Tensor, "batch *features"],
        baselines: float | Tensor | None = None,
        target: Target = None,
        feature_mask: Shaped[Tensor, "..."] | None = None,
        *,
        n_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Explanation:
        """The same with everything that is known about it: standard errors, intercepts, g itself."""
        if inputs.ndim < 2:
            raise ValueError(f"inputs must have shape (batch, features...), got {tuple(inputs.shape)}")
        options = self.options | ({} if n_samples is None else {"n_samples": n_samples})
        groups = self._groups(inputs, feature_mask)
        if groups is not None:
            options = options | {"groups": groups}
        lfa = local_approximation(self.method, **options)
        shape: Sequence[int] | None = inputs.shape[1:] if inputs.ndim > 2 else None
        return lfa.explain(
            self.forward_func,
            inputs.flatten(1),
            target=target,
            baseline=self._flat_baseline(inputs, baselines),
            input_shape=shape,
            generator=generator,
        )

    def _groups(self, inputs: Tensor, feature_mask: Tensor | None) -> ndarray | None:
        if feature_mask is None:
            return None
        if self.method not in (Method.LIME, Method.KERNEL_SHAP, Method.OCCLUSION):
            raise ValueError(f"{self.method} perturbs every feature by itself: feature_mask must be None")
        if feature_mask.numel() != inputs[0].numel():
            raise ValueError(
                f"feature_mask must have the {inputs[0].numel()} features of one input, got {feature_mask.numel()}"
            )
        return feature_mask.detach().cpu().numpy().astype(np.int64).ravel()

    def _flat_baseline(self, inputs: Tensor, baselines: float | Tensor | None) -> float | Tensor:
        if baselines is None:
            return 0.0
        if not isinstance(baselines, Tensor) or not baselines.ndim:
            return baselines
        if baselines.shape == inputs.shape[1:]:
            return baselines.flatten()
        if baselines.shape[1:] != inputs.shape[1:] or baselines.shape[0] not in (1, len(inputs)):
            raise ValueError(f"baselines must have the shape of the inputs or of one input, got {baselines.shape}")
        return baselines.flatten(1)
