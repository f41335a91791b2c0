"""The black box f that is to be explained, whatever it is made of.

A torch module or torch callable is batched and differentiated by autograd; a NumPy or scikit-learn callable is only
evaluated, unless the caller supplies its gradient or asks for central differences. Values come back in float64, so that
the regressions above do not inherit the precision of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from locally.checks import check_count, check_finite

Points = Float[Tensor, "batch d"] | Float[ndarray, "batch d"]
Target = int | Literal["predicted"] | Sequence[int] | Int[Tensor, " batch"] | Int[ndarray, " batch"] | None
Gradient = Callable[[Any], Any] | Literal["numeric"] | None


class Output(StrEnum):
    """What is explained: the output itself or, for a probability, its log-odds (which do not saturate)."""

    IDENTITY = "identity"
    LOGIT = "logit"


class BlackBox:
    """Scalar output of f around a batch of points, with its gradient where there is one.

    Args:
        f: maps (rows, d) to (rows,) or (rows, outputs). A module always receives tensors; any other callable receives
            what X is made of, tensors or arrays.
        X: the points to explain, (batch, d), finite.
        target: output index for all points or one for each; "predicted" fixes the largest output at each point of X
            (not at its perturbations); None where f has a single output.
        grad: None for autograd, "numeric" for central differences (2 d evaluations a point), or a callable that maps
            rows (rows, d) to the gradient of the explained output, (rows, d).
        output: "identity" or "logit".
        input_shape: shape of one input, if f takes no flat rows: each row is reshaped to it before the call.
        batch_size: most rows in one call of f.
        n_jobs: workers that share the calls of a NumPy callable, as in joblib.

    Raises:
        ValueError: X is not a finite matrix, the target does not exist, or f answers with the wrong shape.
    """

    def __init__(
        self,
        f: Callable[[Any], Any],
        X: Points,
        *,
        target: Target = None,
        grad: Gradient = None,
        output: Output | str = Output.IDENTITY,
        input_shape: Sequence[int] | None = None,
        batch_size: int = 2**16,
        n_jobs: int = 1,
    ) -> None:
        if not callable(f):
            raise TypeError(f"f must be callable, got {type(f).__name__}")
        if not isinstance(X, Tensor | np.ndarray):
            raise TypeError(f"X must be a tensor or an array, got {type(X).__name__}")
        if X.ndim != 2 or 0 in X.shape:
            raise ValueError(
                f"X must have shape (batch, d), got {tuple(X.shape)}: flatten each input and give input_shape"
            )
        if input_shape is not None and int(np.prod(input_shape)) != X.shape[1]:
            raise ValueError(f"input_shape {tuple(input_shape)} does not hold the {X.shape[1]} features of X")
        if grad is not None and grad != "numeric" and not callable(grad):
            raise ValueError(f'grad must be None, "numeric" or callable, got {grad!r}')
        check_finite("X", X)
        check_count("batch_size", batch_size)
        self.f = f
        self.grad = grad
        self.output = Output(output)
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.takes_arrays = isinstance(X, np.ndarray) and not isinstance(f, torch.nn.Module)
        self.x0 = self._as_points(X)
        self.target: Int[Tensor, " batch"] | None = None
        with self.evaluating():
            self.target = self._resolve_target(target)
            self.f_x0 = self.values(self.x0[:, None])[:, 0]

    @property
    def has_gradient(self) -> bool:
        """Whether f can be differentiated: by `grad`, or by autograd where f takes tensors."""
        return self.grad is not None or not self.takes_arrays

    def values(self, x: Float[Tensor, "batch n d"], points: slice = slice(None)) -> Float[Tensor, "batch n"]:
        """f at perturbations of the points `points` of the batch, in float64."""
        if not x.shape[1]:
            return x.new_zeros(x.shape[:2], dtype=torch.float64)
        batches = list(self._batches(x, points))
        if self.takes_arrays and self.n_jobs != 1:
            from joblib import Parallel, delayed

            parts = Parallel(n_jobs=self.n_jobs, prefer="threads")(delayed(self._values)(*b) for b in batches)
        else:
            parts = [self._values(*b) for b in batches]
        values = torch.cat(parts).reshape(x.shape[:2])
        self._refuse_non_finite(values)
        return values

    def values_and_gradients(
        self, x: Float[Tensor, "batch n d"], points: slice = slice(None)
    ) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n d"]]:
        """f and its gradient over x, both in float64.

        Raises:
            TypeError: f is a NumPy callable without a gradient, or its output is detached from its input.
        """
        if not self.has_gradient:
            raise TypeError(
                "f is a NumPy callable, but gradient matching needs gradients: take a squared-error method instead "
                "(c_lime for smoothgrad and gradient; lime, kernel_shap or occlusion for integrated_gradients and "
                'gradient_x_input), or pass grad="numeric" or a callable'
            )
        if self.grad == "numeric":
            values, gradients = self.values(x, points), self._central_differences(x, points)
        elif callable(self.grad):
            rows = [self._as_float64(self.grad(self._present(r))) for r, _ in self._batches(x, points)]
            values, gradients = self.values(x, points), torch.cat(rows).reshape(x.shape)
        else:
            parts = [self._autograd(*b) for b in self._batches(x, points)]
            values = torch.cat([v for v, _ in parts]).reshape(x.shape[:2])
            gradients = torch.cat([g for _, g in parts]).reshape(x.shape)
        self._refuse_non_finite(values, gradients)
        return values, gradients

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put a module into eval mode (dropout off, batch statistics frozen) and every part back afterwards."""
        training = [m for m in self.f.modules() if m.training] if isinstance(self.f, torch.nn.Module) else []
        try:
            if isinstance(self.f, torch.nn.Module):
                self.f.eval()
            yield
        finally:
            for module in training:
                module.training = True

    def _as_points(self, X: Any) -> Float[Tensor, "batch d"]:
        if isinstance(X, Tensor):
            return X.detach() if X.is_floating_point() else X.to(torch.get_default_dtype())
        if isinstance(self.f, torch.nn.Module):
            parameter = next((p for p in self.f.parameters() if p.is_floating_point()), torch.empty(0))
            return torch.as_tensor(np.array(X), dtype=parameter.dtype, device=parameter.device)
        return torch.as_tensor(np.array(X, dtype=np.float64))

    def _resolve_target(self, target: Target) -> Int[Tensor, " batch"] | None:
        with torch.no_grad():
            answers = self._answer(self.x0[: self.batch_size])
        outputs = answers.shape[1]
        if target is None:
            if outputs > 1:
                raise ValueError(f'f has {outputs} outputs: target must name one of them, or "predicted"')
            return None
        batch = self.x0.shape[0]
        if isinstance(target, str):
            if target != "predicted":
                raise ValueError(f'target must be an index, one for each point, or "predicted", got {target!r}')
            with torch.no_grad():
                largest = [self._answer(rows).argmax(1) for rows in self.x0.split(self.batch_size)]
            return torch.cat(largest)
        index = torch.as_tensor(target, device=self.x0.device)
        if index.ndim == 0:
            index = index.expand(batch)
        if index.shape != (batch,) or index.is_floating_point():
            raise ValueError(
                f"target must be one index or one for each of the {batch} points, got shape {tuple(index.shape)}"
            )
        if index.min() < -outputs or index.max() >= outputs:
            raise ValueError(f"target must lie in [0, {outputs - 1}], got {int(index.min())} to {int(index.max())}")
        return index % outputs

    def _batches(self, x: Tensor, points: slice) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Flat rows and their output columns, at most batch_size at a time."""
        rows = x.reshape(-1, x.shape[-1])
        columns = None if self.target is None else self.target[points].repeat_interleave(x.shape[1])
        for start in range(0, rows.shape[0], self.batch_size):
            stop = start + self.batch_size
            yield rows[start:stop], None if columns is None else columns[start:stop]

    def _present(self, rows: Tensor) -> Any:
        """The rows as f wants them."""
        shaped = rows if self.input_shape is None else rows.reshape(-1, *self.input_shape)
        return shaped.detach().cpu().numpy() if self.takes_arrays else shaped

    def _answer(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, "rows outputs"]:
        raw = self.f(self._present(rows))
        answer = raw if isinstance(raw, Tensor) else torch.as_tensor(np.asarray(raw, dtype=np.float64))
        if answer.ndim == 1:
            answer = answer[:, None]
        if answer.ndim != 2 or answer.shape[0] != rows.shape[0]:
            raise ValueError(
                f"f must map ({rows.shape[0]}, ...) to ({rows.shape[0]},) or ({rows.shape[0]}, outputs), "
                f"got {tuple(answer.shape)}"
            )
        return answer

    def _explained(self, rows: Tensor, columns: Tensor | None) -> Float[Tensor, " rows"]:
        answer = self._answer(rows)
        chosen = answer[:, 0] if columns is None else answer.gather(1, columns[:, None])[:, 0]
        return torch.logit(chosen) if self.output is Output.LOGIT else chosen

    def _values(self, rows: Tensor, columns: Tensor | None) -> Float[Tensor, " rows"]:
        with torch.no_grad():
            return self._explained(rows, columns).to(rows.device, torch.float64)

    def _autograd(self, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = rows.detach().requires_grad_(True)
        with torch.enable_grad():
            values = self._explained(rows, columns)
            if not values.requires_grad:
                raise TypeError('f is detached from its input, so autograd has no gradient: pass grad="numeric"')
            (gradients,) = torch.autograd.grad(values.sum(), rows)
        return values.detach().double(), gradients.double()

    def _central_differences(self, x: Tensor, points: slice) -> Float[Tensor, "batch n d"]:
        # The cube root of the rounding unit balances truncation, O(h^2), with cancellation, O(eps / h).
        step = torch.finfo(x.dtype).eps ** (1 / 3) * x.abs().clamp_min(1)
        gradients = torch.empty(x.shape, dtype=torch.float64, device=x.device)
        for i in range(x.shape[-1]):
            up, down = x.clone(), x.clone()
            up[..., i] += step[..., i]
            down[..., i] -= step[..., i]
            rise = self.values(up, points) - self.values(down, points)
            gradients[..., i] = rise / (up[..., i] - down[..., i]).double()
        return gradients

    def _as_float64(self, array: Any) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float64, device=self.x0.device)

    def _refuse_non_finite(self, *arrays: Tensor) -> None:
        if all(bool(a.isfinite().all()) for a in arrays):
            return
        why = ": a probability of exactly 0 or 1 has no logit" if self.output is Output.LOGIT else ""
        raise ValueError(f"f answered NaN or infinity at a perturbed point{why}")
