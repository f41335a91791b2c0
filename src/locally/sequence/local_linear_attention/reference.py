"""The estimator as its definition reads: every z_ij and Sigma_i formed, solved exactly, differentiated by autograd.

Theta(n^2 d) memory and Theta(n^2 d^2 + n d^3) time: for tests and short sequences.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locally.checks import check_choice
from locally.sequence.local_linear_attention.layout import arrange

EPSILON = 1e-12  # keeps the denominator away from zero


@dataclass(frozen=True)
class ReferenceFit:
    """All that the definition names, in float64. `attention` has rows that sum to one, with entries of either sign."""

    output: Float[Tensor, "*batch H L Ev"]
    attention: Float[Tensor, "*batch H L S"]
    rho: Float[Tensor, "*batch H L E"]
    delta: Float[Tensor, "*batch H L"]
    omega: Float[Tensor, "*batch H L"]
    shift: Float[Tensor, "*batch H L"]  # the largest logit of each row


def reference(
    q: Float[Tensor, "*batch H L E"],
    k: Float[Tensor, "*batch Hkv S E"],
    v: Float[Tensor, "*batch Hkv S Ev"],
    *,
    ridge: float | Float[Tensor, "..."] = 1.0,
    scale: float | Float[Tensor, "..."] | None = None,
    is_causal: bool = True,
    key_padding_mask: Bool[Tensor, "*batch S"] | None = None,
    ridge_grad: str = "exact",
) -> ReferenceFit:
    """Local linear attention in float64 whatever the inputs are; arguments as for `local_linear_attention`.

    Source: arXiv 2510.01450, the closed form of the intercept of a weighted ridge regression of v_j on k_j - q_i.

    >>> k = torch.linspace(-1, 1, 9).reshape(1, 9, 1)
    >>> fit = reference(k, k, 3 * k + 2, ridge=1e-9, is_causal=False)
    >>> bool((fit.output - (3 * k + 2)).abs().max() < 1e-6)  # a line is fitted exactly
    True
    """
    check_choice("ridge_grad", ridge_grad, ("exact", "detached"))
    a = arrange(q.double(), k.double(), v.double(), ridge, scale, is_causal, key_padding_mask)
    L, S, d = a.q.shape[2], a.k.shape[1], a.q.shape[3]
    visible = torch.ones(L, S, dtype=torch.bool, device=q.device)
    if is_causal:
        visible = visible.tril(S - L)
    visible = visible.expand(len(a.k), 1, L, S)
    if a.hidden is not None:
        visible = visible & ~a.hidden[:, None, None, :]
    some = visible.any(-1)  # a query that sees no key gets zero

    logits = a.scale.unsqueeze(-1) * torch.einsum("hgid,hjd->hgij", a.q, a.k)
    logits = logits.masked_fill(~visible, -torch.inf)
    shift = logits.detach().amax(-1) if S else logits.new_zeros(logits.shape[:-1])
    shift = shift.masked_fill(~some, 0.0)
    w = (logits - shift.unsqueeze(-1)).exp()
    z = a.k[:, None, None] - a.q.unsqueeze(3)

    omega = w.sum(-1)
    mu = torch.einsum("hgij,hgijd->hgid", w, z)
    Sigma = torch.einsum("hgij,hgijd,hgije->hgide", w, z, z)
    weight = omega.detach() if ridge_grad == "detached" else omega
    loading = (a.ridge * weight).masked_fill(~some, 1.0)
    A = Sigma + loading[..., None, None] * torch.eye(d, dtype=w.dtype, device=w.device)
    rho = torch.linalg.solve(A, mu)
    delta = (omega - (mu * rho).sum(-1)).masked_fill(~some, 1.0)
    guarded = delta + EPSILON * torch.where(delta < 0, -1.0, 1.0)
    p = w * (1 - torch.einsum("hgijd,hgid->hgij", z, rho)) / guarded.unsqueeze(-1)
    o = torch.einsum("hgij,hje->hgie", p, a.v)
    return ReferenceFit(*(a.restore(x) for x in (o, p, rho, guarded, omega, shift)))
