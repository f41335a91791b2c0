"""Explanations as local function approximation: eight post hoc methods, one estimator, and which of them to choose.

For whoever has to explain single predictions of a model and must decide between LIME, SHAP, Occlusion, gradients,
SmoothGrad and integrated gradients. Source: Han, Srinivas, Lakkaraju, Which Explanation Should I Choose? A Function
Approximation Perspective to Characterizing Post Hoc Explanations, NeurIPS 2022, arXiv 2206.01254.

`explain` gives an explanation by the name of its method, `LFA` one of your own making, `choose` and `recommend` say
which to take, `faithfulness`, `perturbation_test` and `nfl_certificate` say how far to trust it.
"""

from locally.tangent.explanation.approximation import LFA, Explanation, Loss, Status
from locally.tangent.explanation.black_box import BlackBox, Output
from locally.tangent.explanation.faithfulness import (
    Faithfulness,
    Ranked,
    Recommendation,
    expected_loss,
    faithfulness,
    recommend,
)
from locally.tangent.explanation.guide import Guidance, Perturbation, choose
from locally.tangent.explanation.interpretable import InterpretableModel, LinearModel, LogisticModel
from locally.tangent.explanation.masks import BinaryMask, LeaveOneOut
from locally.tangent.explanation.methods import Attributor, Method, explain, local_approximation
from locally.tangent.explanation.neighbourhoods import (
    AdditiveNeighbourhood,
    Draws,
    Estimator,
    GaussianNoise,
    MultiplicativeNeighbourhood,
    Neighbourhood,
    ScaleNoise,
    Segment,
    Space,
)
from locally.tangent.explanation.no_free_lunch import NoFreeLunchCertificate, nfl_certificate
from locally.tangent.explanation.perturbation import PerturbationTest, perturbation_test
from locally.tangent.explanation.recorded import Empirical

__all__ = [
    "LFA",
    "AdditiveNeighbourhood",
    "Attributor",
    "BinaryMask",
    "BlackBox",
    "Draws",
    "Empirical",
    "Estimator",
    "Explanation",
    "Faithfulness",
    "GaussianNoise",
    "Guidance",
    "InterpretableModel",
    "LeaveOneOut",
    "LinearModel",
    "LogisticModel",
    "Loss",
    "Method",
    "MultiplicativeNeighbourhood",
    "Neighbourhood",
    "NoFreeLunchCertificate",
    "Output",
    "Perturbation",
    "PerturbationTest",
    "Ranked",
    "Recommendation",
    "ScaleNoise",
    "Segment",
    "Space",
    "Status",
    "choose",
    "expected_loss",
    "explain",
    "faithfulness",
    "local_approximation",
    "nfl_certificate",
    "perturbation_test",
    "recommend",
]
