"""Neural tangent kernels: of infinitely wide networks in closed form, of finite ones, and training under them.

For small data (kernel regression with the kernel of an architecture), and for whoever wants to know how a wide network
learns: `InfiniteNetwork` gives both kernels of a stack of layers or a torch `Sequential`, `empirical_ntk` and
`NTKOperator` those of a concrete network, `KernelFlow` the exact course of training, `NTKRegressor` the estimator.
Source: Jacot, Gabriel, Hongler, Neural Tangent Kernel: Convergence and Generalization in Neural Networks, NeurIPS 2018,
arXiv 1806.07572.
"""

from locally.tangent.kernel.duals import (
    GELU,
    ABReLU,
    Erf,
    Exponential,
    Gaussian,
    Nonlinearity,
    Quadrature,
    RBFFeature,
    Sign,
    Sine,
    absolute,
    cosine,
    identity,
    leaky_relu,
    relu,
)
from locally.tangent.kernel.dynamics import (
    EarlyStopping,
    Filter,
    FlowStatus,
    KernelFlow,
    PrincipalComponents,
    Trajectory,
    early_stopping,
    ensemble,
    integrate,
    posterior,
)
from locally.tangent.kernel.empirical import LinearizedModule, NTKOperator, empirical_ntk
from locally.tangent.kernel.finite import Elementwise, NTKConv2d, NTKLinear, Residual, UnitNorm
from locally.tangent.kernel.layers import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Sum,
    residual,
)
from locally.tangent.kernel.network import InfiniteNetwork, Kernels
from locally.tangent.kernel.regression import NTKRegressor

__all__ = [
    "GELU",
    "ABReLU",
    "Activation",
    "AvgPool",
    "Conv",
    "Dense",
    "EarlyStopping",
    "Elementwise",
    "Erf",
    "Exponential",
    "Filter",
    "Flatten",
    "FlowStatus",
    "Gaussian",
    "GlobalAvgPool",
    "InfiniteNetwork",
    "KernelFlow",
    "Kernels",
    "LayerNorm",
    "LinearizedModule",
    "NTKConv2d",
    "NTKLinear",
    "NTKOperator",
    "NTKRegressor",
    "Nonlinearity",
    "PrincipalComponents",
    "Quadrature",
    "RBFFeature",
    "Residual",
    "Sign",
    "Sine",
    "Sum",
    "Trajectory",
    "UnitNorm",
    "absolute",
    "cosine",
    "early_stopping",
    "empirical_ntk",
    "ensemble",
    "identity",
    "integrate",
    "leaky_relu",
    "posterior",
    "relu",
    "residual",
]
