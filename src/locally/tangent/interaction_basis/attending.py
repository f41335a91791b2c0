r"""Sections with a single attention in closed form: no backward passes, and masked inputs at the price of what is seen.

Such a section maps activations f_s at positions s to

    out_t = sum_h sum_s P_h[t, s] f_s VB_h + f_t R,    P_h[t, .] = softmax over s <= t of f_t M_h f_s,

with M_h = Q_h K_h^T / sqrt(d) for the queries and keys of head h, VB_h for its values and all that is linear behind
them, and R for what passes by. With u_h[s, i] = f_s VB_h[:, i] and w_h[t, s, i] = P_h[t, s] (u_h[s, i] - the average
of u_h[., i] under P_h[t, .]), the derivative of the softmax gives

    d out_ti / d f_s = sum_h (P_h[t, s] VB_h[:, i] + w_h[t, s, i] M_h^T f_t)
                       + [s = t] (R[:, i] + sum_h sum_s' w_h[t, s', i] M_h f_s').
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Rule = Sequence[tuple[float, float]]  # alphas and weights


@dataclass(frozen=True)
class Attending:
    """f (n, positions, a) -> (n, positions, k), or (n, k) of the last position alone.

    Attributes:
        queries, keys: M_h = queries_h keys_h^T for each head.
        values: VB_h for each head.
        passing: R.
        last: whether only the last position goes on.
    """

    queries: Float[Tensor, "heads a d"]
    keys: Float[Tensor, "heads a d"]
    values: Float[Tensor, "heads a k"]
    passing: Float[Tensor, "a k"]
    last: bool

    @classmethod
    def of(
        cls, A: Float[Tensor, "a hidden"], B: Float[Tensor, "mixed k"], beside: int, heads: int, last: bool
    ) -> "Attending":
        """From f A = (passes, q, k, v, 1), with `beside` coordinates that pass, and the linear rest B behind the mix.

        >>> A, B = torch.randn(4, 2 + 3 * 6 + 1), torch.randn(2 + 6 + 1, 5)
        >>> section = Attending.of(A, B, beside=2, heads=3, last=True)
        >>> section(torch.randn(7, 10, 4)).shape
        torch.Size([7, 5])
        """
        q, k, v = A[:, beside:-1].unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
        around_A = torch.cat([A[:, :beside], A[:, -1:]], 1)
        around_B = torch.cat([B[:beside], B[-1:]])
        return cls(q / q.shape[-1] ** 0.5, k, v @ B[beside:-1].unflatten(0, (heads, -1)), around_A @ around_B, last)

    def turned(self, C_pinv: Float[Tensor, "j a"] | None, C_next: Float[Tensor, "k i"] | None) -> "Attending":
        """The same from features to features."""
        queries, keys, values, passing = self.queries, self.keys, self.values, self.passing
        if C_pinv is not None:
            queries, keys, values, passing = C_pinv @ queries, C_pinv @ keys, C_pinv @ values, C_pinv @ passing
        if C_next is not None:
            values, passing = values @ C_next, passing @ C_next
        return Attending(queries, keys, values, passing, self.last)

    def part(self, seen: Bool[Tensor, " a"], rows: Tensor) -> "Attending":
        """Only some inputs, the others being 0, and some outputs."""
        values = self.values[:, seen][..., rows]
        return Attending(self.queries[:, seen], self.keys[:, seen], values, self.passing[seen][:, rows], self.last)

    def __call__(self, f: Float[Tensor, "n s a"]) -> Float[Tensor, "n ... k"]:
        left, right = self._scored(f)
        P = self._pattern(left, right)
        out = torch.einsum("nhts,nshk->ntk", P, self._valued(f)) + self._looking(f) @ self.passing
        return out[:, -1] if self.last else out

    def jacobian_blocks(self, f: Float[Tensor, "n s a"], rule: Rule, memory: int) -> Iterator[Tensor]:
        """d out_ti / d f_sj at alpha f averaged by the rule, as blocks (m, t, k, s, a) of the examples in order."""
        for part in f.split(self._at_once(f, f.shape[1] * f.shape[2], memory)):
            block = part.new_zeros(())
            for alpha, weight in rule:
                block = block + weight * self._jacobian(alpha * part)
            yield block

    def influences(self, f: Float[Tensor, "n s a"], rule: Rule, memory: int) -> Iterator[Float[Tensor, "m t k a"]]:
        """sum_s d out_ti / d f_sj f_sj, the derivative being that at alpha f averaged by the rule, in blocks."""
        for part in f.split(self._at_once(f, f.shape[2], memory)):
            block = part.new_zeros(())
            for alpha, weight in rule:
                block = block + weight * self._influence(part, alpha)
            yield block

    # Parts of the formulas -------------------------------------------------------------------------------------------

    def _jacobian(self, f: Tensor) -> Float[Tensor, "m t k s a"]:
        P, w, toward_keys, toward_queries = self._derivatives(f)
        block = torch.einsum("nhts,hak->ntksa", P, self.values)
        block += torch.einsum("nhtsk,nhta->ntksa", w, toward_keys)
        own = torch.einsum("nhtsk,nhsa->ntka", w, toward_queries) + self.passing.T
        for t, s in enumerate(self._places(f)):
            block[:, t, :, s] += own[:, t]
        return block

    def _influence(self, f: Tensor, alpha: float) -> Float[Tensor, "m t k a"]:
        P, w, toward_keys, toward_queries = self._derivatives(alpha * f)
        # what stands beside w, for every head and position
        beside = torch.einsum("nhta,nsa->nthsa", toward_keys, f)
        beside += torch.einsum("nhsa,nta->nthsa", toward_queries, self._looking(f))
        low_rank = w.permute(0, 2, 4, 1, 3).flatten(3) @ beside.flatten(2, 3)
        averages = torch.cat([torch.einsum("nhts,nsa->anth", P, f), self._looking(f).permute(2, 0, 1)[..., None]], -1)
        weights = torch.cat([self.values.transpose(0, 1), self.passing[:, None]], 1)  # (a, heads + 1, k)
        direct = averages.flatten(1, 2) @ weights
        return low_rank + direct.unflatten(1, averages.shape[1:3]).permute(1, 2, 3, 0)

    def _derivatives(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """P (n, h, t, s), w (n, h, t, s, k), M_h^T f_t (n, h, t, a) and M_h f_s (n, h, s, a)."""
        q = torch.einsum("nta,had->nhtd", self._looking(f), self.queries)
        k = torch.einsum("nsa,had->nhsd", f, self.keys)
        P = self._softmax(torch.einsum("nhtd,nhsd->nhts", q, k))
        u = self._valued(f).transpose(1, 2)
        w = P[..., None] * (u[:, :, None] - (P @ u)[:, :, :, None])
        return P, w, q @ self.keys.mT, k @ self.queries.mT

    def _scored(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors of the scores: f_t M_h and f_s where that is shorter than queries and keys."""
        heads, a, d = self.queries.shape
        looking = self._looking(f)
        if a <= 2 * d:
            M = self.queries @ self.keys.mT
            return (looking @ M.transpose(0, 1).flatten(1)).unflatten(-1, (heads, a)), f[:, :, None]
        project = lambda g, matrices: (g @ matrices.transpose(0, 1).flatten(1)).unflatten(-1, (heads, d))
        return project(looking, self.queries), project(f, self.keys)

    def _pattern(self, left: Float[Tensor, "n t h x"], right: Float[Tensor, "n s _ x"]) -> Float[Tensor, "n h t s"]:
        if right.shape[2] == 1:  # the same for all heads
            n, t, heads, _ = left.shape
            return self._softmax((left.flatten(1, 2) @ right[:, :, 0].mT).view(n, t, heads, -1).transpose(1, 2))
        return self._softmax(torch.einsum("nthx,nshx->nhts", left, right))

    def _softmax(self, scores: Float[Tensor, "n h t s"]) -> Float[Tensor, "n h t s"]:
        if self.last:
            return scores.softmax(-1)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)

    def _valued(self, f: Tensor) -> Float[Tensor, "n s h k"]:
        heads, _, k = self.values.shape
        return (f @ self.values.transpose(0, 1).flatten(1)).unflatten(-1, (heads, k))

    def _looking(self, f: Tensor) -> Float[Tensor, "n t a"]:
        """Activations at the positions that go on."""
        return f[:, -1:] if self.last else f

    def _places(self, f: Tensor) -> range:
        return range(f.shape[1] - 1, f.shape[1]) if self.last else range(f.shape[1])

    def _at_once(self, f: Tensor, inputs: int, memory: int) -> int:
        """Examples whose blocks, with what they are summed from, fit into `memory`."""
        numbers = 3 * len(self._places(f)) * self.passing.shape[1] * inputs
        return max(1, memory // (numbers * f.element_size()))
