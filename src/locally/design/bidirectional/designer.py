"""The designer: fit a table of measured sequences, get new ones with high predicted scores.

Frozen language-model features, a linearised head, the forward and the backward mapping in closed form, and an auxiliary
model that sets their balance. Source: Chen, Zhang, Liu and Coates, Bidirectional Learning for Offline Model-based
Biological Sequence Design, ICML 2023, arXiv 2301.02931.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from locally.checks import check_between, check_choice, check_count, check_finite, check_nonnegative, check_positive
from locally.design.bidirectional.adaptive import AdaptiveRate, AdaptiveWeight
from locally.design.bidirectional.ascent import (
    Ascent,
    AscentResult,
    AscentState,
    Auxiliary,
    Callback,
    Embedding,
    Status,
    Step,
)
from locally.design.bidirectional.auxiliary import RidgeEnsemble
from locally.design.bidirectional.heads import Head, Kernel, KernelHead, LinearizedHead
from locally.design.bidirectional.infinite_width import ReluTangentKernel
from locally.design.bidirectional.language_model import SequenceModel, embed
from locally.design.bidirectional.relaxation import initial_logits, tokens
from locally.design.bidirectional.scores import Standardisation, check_table
from locally.design.bidirectional.sequences import Sequences, SequenceSpace

STEPS_DNA, STEPS_PROTEIN = 100, 25


@dataclass(frozen=True)
class DesignResult:
    """Designs and how they came about.

    Attributes:
        sequences: the designs, row by row from the best starting sequence on.
        proxy: their predicted scores, in the units of the table.
        auxiliary: their scores under the auxiliary model, in the units of the table.
        gamma: weight of the forward loss that each design ended with.
        distance: letters changed from the design's starting sequence.
        status: how the loop ended; designs are there in every case.
        trace: losses, auxiliary score, weight and rate of every step.
        state: what `design(resume=...)` goes on from.
        start: starting sequences, as indices.
    """

    sequences: list[str]
    proxy: Float[ndarray, " designs"]
    auxiliary: Float[ndarray, " designs"]
    gamma: Float[ndarray, " designs"]
    distance: Int[ndarray, " designs"]
    status: Status
    trace: list[Step]
    state: AscentState
    start: Int[ndarray, "designs length"]


class BIBDesigner:
    """Bidirectional learning on a linearised head over a frozen sequence model.

    Args:
        model: maps tokens to features, such as `MaskedLM`, `PretrainedLM`, `OneHotFeatures` or any module with an
            attribute `kmer`. Its weights stay as they are; it must not be in training mode.
        space: alphabet and length of the sequences.
        target: score asked of the designs, in standard deviations above the table's mean, > 0.
        ridge: of the head, over the mean of the kernel's diagonal, > 0.
        center: subtract the table's mean from the features, which is the same as an intercept without penalty. False is
            the published code, where the common part of all features rules the backward loss.
        kernel: "linear" is the closed form; "ntk" puts an infinitely wide ReLU network on the features, or give a
            function of two feature matrices.
        tilt: weight of high scores in the backward loss, softmax(tilt * score), >= 0.
        steps: of the loop, or "auto": 100 for alphabets up to 4 letters, 25 for more.
        lr: base rate of Adam, > 0.
        gamma: weight of the forward loss in [0, 1], or "adaptive" from 0.5 on. 1 is gradient ascent on the proxy.
        eta: "fixed" or "adaptive", or an `AdaptiveRate` of your own.
        aux: "ridge", or any object with `predict` and `gradient` of centred features (see `Auxiliary`).
        n_aux: members of the ridge ensemble, each on a bootstrap sample.
        n_designs: sequences to return.
        scale: standard deviation of the logits at the start, > 0.
        batch: sequences embedded at once.
        device: where model and designs are; default the model's own.
        random_state: of the starting logits and of the ensemble.

    Attributes:
        head_: the fitted proxy, on standardised scores.
        aux_: the auxiliary model.
        feature_mean_: (p,), zero where `center` is False.
        scores_: how scores are standardised.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Complexity: fit embeds n sequences and solves one p x p system (n x n where n < p); a step costs one forward and
    one to three backward passes of the model on the designs and O(p^2) for each of them, whatever n is.

    >>> from locally.design.bidirectional import OneHotFeatures
    >>> rng = np.random.default_rng(0)
    >>> space = SequenceSpace("dna", 6)
    >>> table = space.random(200, rng)
    >>> gc = ((table == 1) | (table == 2)).sum(1).astype(float)  # GC content, of which the table knows up to 3
    >>> designer = BIBDesigner(OneHotFeatures(), space, n_designs=4, random_state=0)
    >>> found = designer.fit(table[gc < 4], gc[gc < 4]).design()
    >>> [s.count("G") + s.count("C") for s in found.sequences], str(found.status)
    ([6, 6, 6, 6], 'finished')
    """

    def __init__(
        self,
        model: SequenceModel,
        space: SequenceSpace,
        *,
        target: float = 10.0,
        ridge: float = 1e-6,
        center: bool = True,
        kernel: Literal["linear", "ntk"] | Kernel = "linear",
        tilt: float = 0.0,
        steps: int | Literal["auto"] = "auto",
        lr: float = 0.1,
        gamma: float | Literal["adaptive"] = "adaptive",
        eta: Literal["fixed", "adaptive"] | AdaptiveRate = "fixed",
        aux: Literal["ridge"] | Auxiliary = "ridge",
        n_aux: int = 5,
        n_designs: int = 128,
        scale: float = 0.01,
        batch: int = 512,
        device: torch.device | str | None = None,
        random_state: int | None = None,
    ) -> None:
        if not callable(model) or not isinstance(getattr(model, "kmer", None), int):
            raise TypeError(f"model must be callable and have an integer attribute kmer, got {type(model).__name__}")
        check_positive("target", target)
        check_positive("ridge", ridge)
        check_nonnegative("tilt", tilt)
        check_positive("lr", lr)
        check_positive("scale", scale)
        for name, count in (("n_aux", n_aux), ("n_designs", n_designs), ("batch", batch)):
            check_count(name, count)
        if steps != "auto":
            check_count("steps", steps, at_least=0)
        if gamma != "adaptive":
            check_between("gamma", gamma, 0, 1)
        if not isinstance(eta, AdaptiveRate):
            check_choice("eta", eta, ("fixed", "adaptive"))
        if not callable(kernel):
            check_choice("kernel", kernel, ("linear", "ntk"))
        if isinstance(aux, str):
            check_choice("aux", aux, ("ridge",))
        if model.kmer > space.length:
            raise ValueError(f"model reads {model.kmer}-mers, which do not fit into sequences of {space.length}")
        self.model, self.space, self.kernel, self.aux = model, space, kernel, aux
        self.target, self.ridge, self.tilt, self.center = target, ridge, tilt, center
        self.n_aux, self.n_designs, self.scale, self.batch = n_aux, n_designs, scale, batch
        self.random_state = random_state
        own = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = torch.device(device) if device is not None else (own.device if own is not None else "cpu")
        self.dtype = own.dtype if own is not None else torch.get_default_dtype()
        if steps == "auto":
            steps = STEPS_DNA if space.letters <= 4 else STEPS_PROTEIN
        rate = AdaptiveRate(lr, bounds=(min(1e-4, lr), max(0.5, lr))) if eta == "adaptive" else eta
        self.ascent = Ascent(
            steps=steps,
            weight=AdaptiveWeight(rate=lr) if gamma == "adaptive" else gamma,
            rate=lr if isinstance(rate, str) else rate,
        )

    def fit(
        self,
        sequences: Sequences,
        scores: Float[ndarray, " n"],
        *,
        progress: Callable[[float], None] | None = None,
    ) -> "BIBDesigner":
        """Embed the table and solve for the head; `progress` sees the share embedded.

        Args:
            sequences: strings, or indices (n, length); at least 10.
            scores: (n,), higher is better.

        Raises:
            ValueError: a sequence has another length or an unknown letter (the message says which and where), there
                are fewer than 10, scores are constant, not finite or not one for each sequence; or the model gives
                features that are not finite.
        """
        if isinstance(self.model, nn.Module) and self.model.training and any(True for _ in self.model.parameters()):
            raise ValueError("model is in training mode: call model.eval() first, its features must not be random")
        table, scores = check_table(self.space, sequences, scores)
        features = self.features(table, progress)
        check_finite("features of the model", features)
        self.feature_mean_ = features.mean(0) if self.center else torch.zeros_like(features[0])
        features = features - self.feature_mean_
        self.scores_ = Standardisation.of(scores)
        y = self.scores_.forth(scores).to(features.device)
        self.head_ = self._head(features, y)
        if isinstance(self.aux, str):
            draws = torch.Generator().manual_seed(self._seed(1))
            self.aux_: Auxiliary = RidgeEnsemble(self.n_aux).fit(features, y, generator=draws)
        else:
            self.aux_ = self.aux
        self._best_first = table[np.argsort(-scores, kind="stable")]
        return self

    def predict(self, sequences: Sequences) -> Float[ndarray, " n"]:
        """Scores by the proxy, in the units of the table."""
        self._check_fitted()
        h = self.features(self.space.encode(sequences)) - self.feature_mean_
        return self.scores_.back(self.head_.predict(h))

    def design(
        self,
        n: int | None = None,
        *,
        start: Sequences | None = None,
        resume: DesignResult | None = None,
        callback: Callback | None = None,
    ) -> DesignResult:
        """Change starting sequences until their scores are as asked for.

        Args:
            n: designs, default `n_designs`; at most as many as the table has rows, unless `start` is given.
            start: where to start, default the n best sequences of the table.
            resume: a result that was stopped; the loop goes on where it was, up to `steps`.
            callback: `callback(step, what)` sees every step and stops the loop by returning True.

        Raises:
            ValueError: the designer is not fitted, or an argument is out of range.
        """
        self._check_fitted()
        if resume is not None:
            if n is not None or start is not None:
                raise ValueError("resume goes on with its own designs: leave n and start out")
            return self._result(self._run(resume.state, callback), resume.start, resume.trace)
        chosen = self._start(n, start)
        draws = torch.Generator().manual_seed(self._seed(0))
        theta = initial_logits(
            torch.as_tensor(chosen), self.space.letters, scale=self.scale, generator=draws, dtype=self.dtype
        )
        return self._result(self._run(theta.to(self.device), callback), chosen, [])

    def features(
        self, indices: Int[ndarray, "n length"], progress: Callable[[float], None] | None = None
    ) -> Float[Tensor, "n p"]:
        """Of the model as it is, not centred, float64."""
        return embed(
            self.model,
            indices,
            self.space.letters,
            batch=self.batch,
            device=self.device,
            dtype=self.dtype,
            progress=progress,
        )

    def embedding(self) -> Embedding:
        """Logits (designs, length, letters) to centred features (designs, p) in float64, differentiable."""
        return lambda theta: self.model(tokens(theta, self.model.kmer)).double() - self.feature_mean_

    def _run(self, start: Tensor | AscentState, callback: Callback | None) -> AscentResult:
        return self.ascent.run(self.embedding(), self.head_, self.aux_, start, callback)

    def _head(self, features: Tensor, y: Tensor) -> Head:
        options: dict[str, Any] = {"target": self.target, "ridge": self.ridge, "tilt": self.tilt}
        if self.kernel == "linear":
            return LinearizedHead(features, y, **options)
        if self.kernel == "ntk":
            ntk = ReluTangentKernel()
            return KernelHead(ntk, features, y, diagonal=ntk.diagonal, **options)
        assert callable(self.kernel)
        return KernelHead(self.kernel, features, y, **options)

    def _start(self, n: int | None, start: Sequences | None) -> Int[ndarray, "n length"]:
        if start is not None:
            chosen = self.space.encode(start, "start")
            if n is not None and n != len(chosen):
                raise ValueError(f"n must be the number of starting sequences, {len(chosen)}, or be left out, got {n}")
            return chosen
        n = self.n_designs if n is None else n
        check_count("n", n)
        if n > len(self._best_first):
            raise ValueError(f"n must be at most the {len(self._best_first)} sequences of the table, got {n}")
        return self._best_first[:n]

    def _result(self, run: AscentResult, start: ndarray, before: list[Step]) -> DesignResult:
        indices = run.state.theta.argmax(2).cpu().numpy()
        h = self.features(indices) - self.feature_mean_
        return DesignResult(
            sequences=self.space.decode(indices),
            proxy=self.scores_.back(self.head_.predict(h)),
            auxiliary=self.scores_.back(self.aux_.predict(h)),
            gamma=run.state.gamma.cpu().double().numpy(),
            distance=(indices != start).sum(1),
            status=run.status,
            trace=before + run.trace,
            state=run.state,
            start=start,
        )

    def _seed(self, stream: int) -> int:
        source = (
            np.random.SeedSequence(self.random_state) if self.random_state is not None else np.random.SeedSequence()
        )
        return int(source.generate_state(stream + 1)[stream])

    def _check_fitted(self) -> None:
        if not hasattr(self, "head_"):
            raise ValueError("this designer is not fitted: call fit(sequences, scores) first")
