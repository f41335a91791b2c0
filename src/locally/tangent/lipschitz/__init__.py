"""Certified local Lipschitz constants of neural networks: bounds on the Clarke Jacobian over a box, branch and bound.

For whoever has to prove how fast a trained network can change around an input: robustness and fairness certificates,
verified controllers, audits of monotonicity. Source: Shi, Wang, Zhang, Kolter, Hsieh, Efficiently Computing Local
Lipschitz Constants of Neural Networks via Bound Propagation, NeurIPS 2022, arXiv 2210.07394.

`LocalLipschitz` bounds the constant, `jacobian_bounds` and `jvp_bounds` the entries and directional derivatives behind
it, `monotonicity` and `robust_radius` say what follows. Models are torch modules (dense, convolutional, pooled,
residual, normalised by batch, layer, root mean square, group or instance, the second and third also written out as
powers, means and roots; ReLU, leaky ReLU, tanh, sigmoid, GELU, softplus) or files read by `read_onnx`.
"""

from locally.tangent.lipschitz.branching import Score, Status
from locally.tangent.lipschitz.certificates import (
    MonotonicityTable,
    RobustRadius,
    jacobian_bounds,
    jvp_bounds,
    monotonicity,
    robust_radius,
)
from locally.tangent.lipschitz.estimator import LipschitzResult, LocalLipschitz, Method
from locally.tangent.lipschitz.network import Network
from locally.tangent.lipschitz.onnx_files import read_onnx
from locally.tangent.lipschitz.reading import read_module
from locally.tangent.lipschitz.relaxations import Relaxation, clarke_product

__all__ = [
    "LipschitzResult",
    "LocalLipschitz",
    "Method",
    "MonotonicityTable",
    "Network",
    "Relaxation",
    "RobustRadius",
    "Score",
    "Status",
    "clarke_product",
    "jacobian_bounds",
    "jvp_bounds",
    "monotonicity",
    "read_module",
    "read_onnx",
    "robust_radius",
]
