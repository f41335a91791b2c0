"""Local linear attention: at every query a weighted linear regression of values on keys, read at the query.

For sequence models that learn from their context (test-time regression, associative memory), in place of softmax
attention, which is the local constant fit, or of linear attention and MesaNet, which are global linear ones.
`local_linear_attention` is called like `scaled_dot_product_attention`, `LocalLinearAttention` is the layer,
`lla_decode` with a `KeyValueCache` takes one token after the other, `register_with_transformers` puts it under that
library's models. Source: Zuo et al., Local Linear Attention, arXiv 2510.01450.
"""

from locally.sequence.local_linear_attention.baselines import delta_rule, linear_attention, mesa, nadaraya_watson
from locally.sequence.local_linear_attention.decoding import KeyValueCache, lla_decode
from locally.sequence.local_linear_attention.functional import LLAInfo, Status, local_linear_attention
from locally.sequence.local_linear_attention.module import LocalLinearAttention, register_with_transformers
from locally.sequence.local_linear_attention.reference import ReferenceFit, reference
from locally.sequence.local_linear_attention.regressor import LocalLinearRegressor

__all__ = [
    "KeyValueCache",
    "LLAInfo",
    "LocalLinearAttention",
    "LocalLinearRegressor",
    "ReferenceFit",
    "Status",
    "delta_rule",
    "linear_attention",
    "lla_decode",
    "local_linear_attention",
    "mesa",
    "nadaraya_watson",
    "reference",
    "register_with_transformers",
]
