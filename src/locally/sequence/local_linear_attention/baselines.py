"""What local linear attention is compared with: other layers that regress values on keys, in the same signature.

All causal, all exact, none with a loop over single positions: softmax attention (local constant), linear attention with
optional decay (RetNet, Mamba-2, gated linear attention), MesaNet (global linear least squares), and the delta rule with
optional decay (DeltaNet, Gated DeltaNet).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from locally.checks import check_positive
from locally.sequence.local_linear_attention.layout import check_tensors

CHUNK = 64


def nadaraya_watson(
    q: Float[Tensor, "*batch H L E"],
    k: Float[Tensor, "*batch H L E"],
    v: Float[Tensor, "*batch H L Ev"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "*batch H L Ev"]:
    """Softmax attention, the local constant estimate: PyTorch's `scaled_dot_product_attention`.

    >>> q = k = torch.eye(3).reshape(1, 3, 3)
    >>> nadaraya_watson(q, k, k, scale=100.0).allclose(k)
    True
    """
    check_same_length(q, k, v)
    if scale is not None:
        check_positive("scale", scale)
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def linear_attention(
    q: Float[Tensor, "*batch H L E"],
    k: Float[Tensor, "*batch H L E"],
    v: Float[Tensor, "*batch H L Ev"],
    *,
    decay: float | Float[Tensor, "..."] = 1.0,
) -> Float[Tensor, "*batch H L Ev"]:
    """o_i = S_i q_i with S_i = S_{i-1} diag(decay_i) + v_i k_i^T.

    Args:
        decay: in (0, 1]. One number (RetNet), one a position (..., H, L, 1) (Mamba-2), or one a coordinate of the keys
            (..., H, L, E) (gated linear attention, arXiv 2312.06635).

    >>> q = k = torch.eye(3).reshape(1, 3, 3)
    >>> linear_attention(q, k, torch.ones(1, 3, 1)).flatten().tolist()
    [1.0, 1.0, 1.0]
    """
    check_same_length(q, k, v)
    log_decay = log_of_decay(decay, k)
    chunk = CHUNK if log_decay.shape[-1] == 1 else 16  # decay between two positions: one number, or one a coordinate
    state = v.new_zeros(*v.shape[:-2], v.shape[-1], k.shape[-1])
    outputs = []
    for part in slices(k.shape[-2], chunk):
        Q, K, V = q[..., part, :], k[..., part, :], v[..., part, :]
        passed = log_decay[..., part, :].cumsum(-2)  # since the chunk began
        if passed.shape[-1] == 1:
            scores = (Q @ K.mT) * between(passed)
        else:
            scores = torch.einsum("...ie,...je,...ije->...ij", Q, K, causal_gap(passed).exp())
        outputs.append((passed.exp() * Q) @ state.mT + scores @ V)
        left = (passed[..., -1:, :] - passed).exp()
        state = state * passed[..., -1:, :].exp() + V.mT @ (left * K)
    return torch.cat(outputs, -2)


def mesa(
    q: Float[Tensor, "*batch H L E"],
    k: Float[Tensor, "*batch H L E"],
    v: Float[Tensor, "*batch H L Ev"],
    *,
    ridge: float = 1.0,
) -> Float[Tensor, "*batch H L Ev"]:
    """MesaNet: o_i = (sum_{j<=i} v_j k_j^T) (sum_{j<=i} k_j k_j^T + ridge I)^-1 q_i, ridge > 0 (arXiv 2506.05233).

    >>> k = torch.nn.functional.normalize(torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    >>> bool((mesa(k, k, 2 * k, ridge=1e-4) - 2 * k)[:, 10:].abs().max() < 1e-3)
    True
    """
    check_same_length(q, k, v)
    check_positive("ridge", ridge)
    gram = ridge * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device).expand(*k.shape[:-2], -1, -1)
    solved = []
    for part in slices(k.shape[-2], CHUNK):
        K = k[..., part, :]
        grams = gram.unsqueeze(-3) + (K.unsqueeze(-1) * K.unsqueeze(-2)).cumsum(-3)
        solved.append(torch.cholesky_solve(q[..., part, :].unsqueeze(-1), torch.linalg.cholesky(grams)).squeeze(-1))
        gram = grams[..., -1, :, :]
    return linear_attention(torch.cat(solved, -2), k, v)


def delta_rule(
    q: Float[Tensor, "*batch H L E"],
    k: Float[Tensor, "*batch H L E"],
    v: Float[Tensor, "*batch H L Ev"],
    *,
    beta: float | Float[Tensor, "*batch H L"] = 1.0,
    decay: float | Float[Tensor, "..."] = 1.0,
) -> Float[Tensor, "*batch H L Ev"]:
    """o_i = S_i q_i with S_i = decay_i S_{i-1} (I - beta_i k_i k_i^T) + beta_i v_i k_i^T; keys of unit norm.

    One step of online gradient descent a position. Within a chunk the corrections solve a triangular system
    (arXiv 2406.06484; with decay 2412.06464).

    Args:
        beta: in [0, 2]; above 1 the transition reflects, which tracks states (arXiv 2411.12537).
        decay: in (0, 1], a number or (..., H, L, 1).

    >>> k = torch.eye(2)[[0, 1, 0]].reshape(1, 3, 2)
    >>> delta_rule(k, k, torch.tensor([[[1.0], [2.0], [5.0]]])).flatten().tolist()  # the third overwrites the first
    [1.0, 2.0, 5.0]
    """
    check_same_length(q, k, v)
    rate = torch.as_tensor(beta, dtype=k.dtype, device=k.device).expand(k.shape[:-1])
    if not ((rate >= 0) & (rate <= 2)).all():
        raise ValueError(f"beta must lie in [0, 2], got {beta if not isinstance(beta, Tensor) else 'a tensor outside'}")
    log_decay = log_of_decay(decay, k)
    if log_decay.shape[-1] != 1:
        raise ValueError(f"decay must be one number a position, got shape {tuple(log_decay.shape)}")
    state = v.new_zeros(*v.shape[:-2], v.shape[-1], k.shape[-1])
    outputs = []
    for part in slices(k.shape[-2], CHUNK):
        Q, K, V, b = q[..., part, :], k[..., part, :], v[..., part, :], rate[..., part].unsqueeze(-1)
        passed = log_decay[..., part, :].cumsum(-2)
        gaps = between(passed)
        # u_i = beta_i (v_i - decay since the chunk began S k_i - sum_{j<i} decay_ij (k_j . k_i) u_j)
        system = (b * (K @ K.mT) * gaps).tril(-1)
        wanted = b * (V - passed.exp() * (K @ state.mT))
        u = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        outputs.append(passed.exp() * (Q @ state.mT) + ((Q @ K.mT) * gaps) @ u)
        left = (passed[..., -1:, :] - passed).exp()
        state = state * passed[..., -1:, :].exp() + u.mT @ (left * K)
    return torch.cat(outputs, -2)


def check_same_length(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_tensors(q, k, v)
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {tuple(q.shape)}, got {tuple(k.shape)}")


def log_of_decay(decay: float | Tensor, k: Tensor) -> Tensor:
    """Logarithms, one a position or one a coordinate."""
    given = torch.as_tensor(decay, dtype=k.dtype, device=k.device)
    if not ((given > 0) & (given <= 1)).all():
        raise ValueError(f"decay must lie in (0, 1], got {decay if given.ndim == 0 else 'a tensor outside'}")
    width = k.shape[-1] if given.ndim and given.shape[-1] == k.shape[-1] else 1
    return given.log().expand(*k.shape[:-1], width)


def between(passed: Float[Tensor, "*batch n 1"]) -> Float[Tensor, "*batch n n"]:
    """Decay from position j to position i >= j, and 0 for later j."""
    return causal_gap(passed).squeeze(-1).exp()


def causal_gap(passed: Float[Tensor, "*batch n e"]) -> Float[Tensor, "*batch n n e"]:
    n = passed.shape[-2]
    later = torch.ones(n, n, dtype=torch.bool, device=passed.device).triu(1).unsqueeze(-1)
    return (passed.unsqueeze(-2) - passed.unsqueeze(-3)).masked_fill(later, -torch.inf)


def slices(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
