"""A network at a point, as the linear map that it is there: products with the Jacobian, never the Jacobian itself.

The ground under whatever looks at a network through its linearisation: tangent kernels, linear interpreters, Lipschitz
constants, interaction bases. Differentiates with respect to the inputs, the parameters or the activations after any
submodule, of the network's output or of any submodule's; many vectors at once, in chunks that fit a memory budget.
Forward and reverse mode come from `torch.func`; Baydin et al., arXiv 1502.05767, is the survey.
"""

from locally.tangent.linearization.linear_map import Linearization, Wrt
from locally.tangent.linearization.passes import (
    Product,
    Trail,
    call_with,
    check_called,
    first_line,
    hazard,
    pull_back,
    tapped,
    watched,
)
from locally.tangent.linearization.refusals import check_inputs, refuse_random_modules, select_parameters

__all__ = [
    "Linearization",
    "Product",
    "Trail",
    "Wrt",
    "call_with",
    "check_called",
    "check_inputs",
    "first_line",
    "hazard",
    "pull_back",
    "refuse_random_modules",
    "select_parameters",
    "tapped",
    "watched",
]
