"""Týr-the-Pruner: supernets and searches in turn, from coarse to fine, with a work folder that survives a kill.

Source: arXiv 2503.09657, sections 3.1 to 3.4.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Int
from torch import Tensor

from locally.checks import check_choice, check_count, check_positive
from locally.errors import UsageError
from locally.sequence.structured_pruning.levels import KINDS, Removed, Space, step_sizes, uniform
from locally.sequence.structured_pruning.local import SCORES
from locally.sequence.structured_pruning.network import UNITS, Network, open_network
from locally.sequence.structured_pruning.scoring import FITNESS, Scorer
from locally.sequence.structured_pruning.search import Progress, Schedule, search
from locally.sequence.structured_pruning.supernet import (
    LocalSettings,
    Supernet,
    SupernetPlan,
    build_supernet,
    write_json,
)
from locally.sequence.structured_pruning.team import Team
from locally.sequence.structured_pruning.validity import check_ids, check_sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1  # of the work folder


class WorkFolderMismatch(UsageError, ValueError):
    """A work folder belongs to another model, other data or other settings; the message says which field differs."""


class TyrPruner:
    """Remove heads and neurons from a language model, with a share for every layer that a search finds.

    Args:
        sparsity: share of all heads and of all neurons to remove, in [0, 1).
        iterations: supernets, each with half the interval of the one before and around what the last search found.
        interval: between levels of the first, as a share of a sub-layer's groups, in (0, 1].
        levels: at most so many a sub-layer, odd; 9 reach four intervals to each side.
        least_steps: smallest step in heads and in neurons.
        generations, offspring, survivors, tokens_per_stage, patience: see `Schedule`.
        fitness, top_k: see `Scorer`.
        score, damping, rounds, accumulation, sequential, batch: see `LocalSettings`.
        prune: kinds of groups that may go.
        unit: "query_head", or "kv_group": a key and value head with all its queries, which saves cache too.
        workdir: kept, and taken up again by the next `fit` with the same input. None for a folder that is thrown away
            with this object.
        keep_iterations: leave finished supernets in the work folder.
        device, dtype: for a model that is given as a folder.
        random_state: seed of the search.
        callback: called with (fraction done in [0, 1], what is being done).
        team: processes that do this together, each with the same other arguments, and calls `fit` with the same; only
            the first of them calls back. `workdir` is a folder that all of them see. Statistics are then summed in
            another order, so that figures agree with those of one process to rounding.

    Attributes:
        removed_: groups removed, for the name of each sub-layer.
        sparsity_: the same as shares.
        history_: a record for every generation: iteration, generation, and the scores of its last stage.
        plan_: the cuts, for `compress` and `save_compressed`.

    Source: arXiv 2503.09657; published code differs where the defaults say so (signed block score).

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).eval()
    >>> text = torch.randint(0, 32, (8, 16))
    >>> pruner = TyrPruner(0.5, iterations=1, generations=2, offspring=4, least_steps=(1, 4),
    ...                    survivors=(2, 1), tokens_per_stage=(32, 64))
    >>> small = pruner.fit(model, text).transform(model)
    >>> sum(small.config.query_heads_per_layer), sum(small.config.neurons_per_layer)
    (4, 32)
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        *,
        iterations: int = 4,
        interval: float = 0.125,
        levels: int = 9,
        least_steps: tuple[int, int] = (1, 32),
        generations: int = 50,
        offspring: int = 128,
        survivors: tuple[int, ...] = (16, 4, 1),
        tokens_per_stage: tuple[int, ...] = (2048, 16384, 131072),
        patience: int | None = None,
        fitness: str = "kl",
        top_k: int = 8192,
        score: str = "obs+grad",
        damping: float = 1e-2,
        rounds: int = 16,
        accumulation: str = "expectation",
        sequential: bool = False,
        batch: int = 8,
        prune: tuple[str, ...] = KINDS,
        unit: str = "query_head",
        workdir: str | Path | None = None,
        keep_iterations: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        random_state: int = 0,
        callback: Callable[[float, str], None] | None = None,
        team: Team | None = None,
    ) -> None:
        check_sparsity(sparsity)
        check_count("iterations", iterations)
        check_positive("interval", interval, below=1 + 1e-12)
        check_count("levels", levels)
        if levels % 2 == 0:
            raise ValueError(f"levels must be odd, got {levels}")
        if len(least_steps) != 2:
            raise ValueError(f"least_steps must be of heads and of neurons, got {least_steps}")
        for step in least_steps:
            check_count("least_steps", step)
        check_choice("fitness", fitness, FITNESS)
        check_choice("score", score, SCORES)
        check_choice("unit", unit, UNITS)
        if not prune or not set(prune) <= set(KINDS):
            raise ValueError(f"prune must name some of {', '.join(KINDS)}, got {prune!r}")
        check_count("random_state", random_state, at_least=0)
        self.sparsity, self.iterations, self.interval, self.levels = sparsity, iterations, interval, levels
        self.least_steps, self.fitness, self.top_k = least_steps, fitness, top_k
        self.prune, self.unit, self.random_state = tuple(prune), unit, random_state
        self.schedule = Schedule(
            generations=generations,
            offspring=offspring,
            survivors=tuple(survivors),
            tokens_per_stage=tuple(tokens_per_stage),
            patience=patience,
        )
        self.local = LocalSettings(
            score=score,
            damping=damping,
            rounds=rounds,
            accumulation=accumulation,
            sequential=sequential,
            batch=batch,
            seed=random_state,
        )
        self.workdir = None if workdir is None else Path(workdir)
        self.keep_iterations, self.device, self.dtype, self.callback = keep_iterations, device, dtype, callback
        self.team = team or Team()
        if self.team.size > 1 and workdir is None:
            raise ValueError(f"workdir must be given: the {self.team.size} processes of a team share it")
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def fit(
        self,
        model: "PreTrainedModel | Network | str | Path",
        calibration: Int[Tensor, "N T"],
        search_ids: Int[Tensor, "M U"] | None = None,
    ) -> "TyrPruner":
        """Find what to remove, or go on where an earlier call with the same input was stopped.

        Args:
            model: Llama, Mistral, Qwen2 or Qwen3, in memory, dispatched by Accelerate, or the folder of one, of which
                one block at a time is then in memory.
            calibration: token ids of text like that on which the model will be used, for the local fits.
            search_ids: for the search; default the same.

        Raises:
            ValueError: of `calibration`, or of a stage that asks for more tokens than there are.
            BadCheckpoint: the folder cannot be read.
            WorkFolderMismatch: `workdir` holds work on something else, or another process works in it.
            LostMember: another process of the team has ended. What is finished is kept.
        """
        network = open_network(model, device=self.device, dtype=self.dtype)
        check_ids("calibration", calibration, network.config)
        chosen = calibration if search_ids is None else search_ids
        check_ids("search_ids", chosen, network.config)
        most = max(self.schedule.tokens_per_stage)
        if most > chosen.numel():
            raise ValueError(f"calibration is too short: tokens_per_stage asks for {most} tokens, got {chosen.numel()}")
        if len(calibration) < self.team.size:
            raise ValueError(
                f"calibration must have a sequence for each of the {self.team.size} processes, got {len(calibration)}"
            )
        if self.workdir is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="locally-prune-")
            return self._fit(network, calibration, chosen, Path(self._temporary.name))
        self.workdir.mkdir(parents=True, exist_ok=True)
        if not self.team.leads:  # whose first process holds the lock
            return self._fit(network, calibration, chosen, self.workdir)
        try:
            with FileLock(self.workdir / ".lock", timeout=0):
                return self._fit(network, calibration, chosen, self.workdir)
        except Timeout:
            raise WorkFolderMismatch(f"another process works in {self.workdir}") from None

    def _fit(self, network: Network, ids: Tensor, search_ids: Tensor, work: Path) -> "TyrPruner":
        self._agree(work / "manifest.json", self._manifest(network, ids, search_ids))
        sublayers = network.sublayers(self.unit)
        centres = uniform(sublayers, self.sparsity, self.prune)
        self.history_: list[dict[str, float | int]] = []
        for t in range(self.iterations):
            space = self._space(sublayers, centres, t)
            supernet, progress = self._iteration(network, ids, search_ids, space, work / f"iteration_{t}", t)
            self.history_ += [{"iteration": t, **record} for record in progress.history]
            centres = space.removed(progress.parent)
            if t > 0 and self.team.leads and not self.keep_iterations:  # nothing of it is needed but what it found
                for old in (work / f"iteration_{t - 1}").glob("*.safetensors"):
                    old.unlink()
        self.removed_ = {s.name: r for s, r in zip(sublayers, centres)}
        self.sparsity_ = {s.name: r / s.groups for s, r in zip(sublayers, centres)}
        self.plan_: SupernetPlan = supernet.plan(centres)
        self._say(1.0, "done")
        return self

    def _agree(self, path: Path, manifest: dict[str, Any]) -> None:
        """All members have the same before them, in one folder."""
        if self.team.leads:
            check_manifest(path, manifest)
        self.team.wait()
        if not self.team.leads:
            if not path.exists():
                raise WorkFolderMismatch(
                    f"process {self.team.rank} does not see the {path.name} of process 0 in {path.parent}: "
                    "the work folder must be one that all processes share"
                )
            check_manifest(path, manifest)

    def _space(self, sublayers: tuple[Any, ...], centres: Removed, t: int) -> Space:
        steps = step_sizes(sublayers, self.interval / 2**t, least=self.least_steps)
        return Space(sublayers, centres, steps, self.levels // 2, self.prune)

    def _iteration(
        self, network: Network, ids: Tensor, search_ids: Tensor, space: Space, folder: Path, t: int
    ) -> tuple[Supernet, Progress]:
        """One supernet and one search, each from where it stands."""
        self.team.wait()  # nobody reads what another is about to write
        stored = folder / "search.json"
        progress = Progress.from_dict(json.loads(stored.read_text("utf-8"))) if stored.exists() else None
        finished = progress is not None and self._ended(progress)
        if finished and t + 1 < self.iterations and (folder.parent / f"iteration_{t + 1}" / "search.json").exists():
            assert progress is not None
            return Supernet(network, space, folder, self.unit), progress  # its files may be gone: a later one has begun
        share = 1 / self.iterations

        def on_block(done: int, of: int) -> None:
            self._say(share * (t + 0.5 * done / of), f"iteration {t + 1}: supernet, block {done} of {of}")

        def on_generation(now: Progress) -> None:
            if self.team.leads:
                write_json(stored, now.to_dict())
            done = now.generation / self.schedule.generations
            self._say(share * (t + 0.5 + 0.5 * done), f"iteration {t + 1}: search, generation {now.generation}")

        supernet = build_supernet(
            network, ids, space, folder, self.local, unit=self.unit, on_block=on_block, team=self.team
        )
        scorer = Scorer(supernet, search_ids, fitness=self.fitness, top_k=self.top_k, team=self.team)
        rng = np.random.default_rng([self.random_state, t])
        progress = search(
            space,
            scorer,
            self.schedule,
            sequences=len(search_ids),
            length=search_ids.shape[1],
            rng=rng,
            progress=progress,
            on_generation=on_generation,
        )
        return supernet, progress

    def _ended(self, progress: Progress) -> bool:
        patience = self.schedule.patience
        return progress.generation >= self.schedule.generations or (
            patience is not None and progress.unchanged >= patience
        )

    def transform(self, model: "PreTrainedModel | Network | str | Path") -> "PreTrainedModel":
        """The pruned model in memory; `model` is the dense one that `fit` saw."""
        from locally.sequence.structured_pruning.pruned_model import compress

        self._check_fitted()
        return compress(open_network(model, device=self.device, dtype=self.dtype), self.plan_)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        tokenizer: Any = None,
        overwrite: bool = False,
    ) -> None:
        """Write the pruned checkpoint, block by block; the folder appears when it is complete."""
        from locally.sequence.structured_pruning.pruned_model import save_compressed

        self._check_fitted()
        save_compressed(self.plan_.supernet.network, self.plan_, folder, tokenizer=tokenizer, overwrite=overwrite)

    def discard(self) -> None:
        """Remove the supernets; what was found stays in the attributes, except for `plan_`."""
        if self._temporary is not None:
            self._temporary.cleanup()
        elif self.workdir is not None:
            shutil.rmtree(self.workdir, ignore_errors=True)

    def _check_fitted(self) -> None:
        if not hasattr(self, "plan_"):
            raise ValueError("this TyrPruner is not fitted: call fit first")

    def _say(self, fraction: float, what: str) -> None:
        if self.callback is not None and self.team.leads:
            self.callback(fraction, what)

    def _manifest(self, network: Network, ids: Tensor, search_ids: Tensor) -> dict[str, Any]:
        """All that the result depends on."""
        own = ("sparsity", "iterations", "interval", "levels", "least_steps", "fitness", "top_k", "prune", "unit")
        settings = {name: getattr(self, name) for name in (*own, "random_state")}
        settings |= vars(self.schedule) | vars(self.local)
        return {
            "format": FORMAT,
            "model": network.fingerprint(),
            "calibration": _hash(ids),
            "search": _hash(search_ids),
            "dtype": str(network.embed(ids[:1, :1]).dtype),
            "torch": torch.__version__,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        }


def check_manifest(path: Path, expected: dict[str, Any]) -> None:
    """Write it where there is none; otherwise refuse work on something else, and say in which field it differs."""
    if not path.exists():
        if any(path.parent.glob("iteration_*")):
            raise WorkFolderMismatch(
                f"{path.parent} has no {path.name}, but work of an unknown origin: name another folder"
            )
        write_json(path, expected)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WorkFolderMismatch(f"{path} cannot be read: {error}") from None
    for name, value in expected.items():
        if found.get(name) != value:
            raise WorkFolderMismatch(
                f"{path.parent} holds work with another {name} ({found.get(name)!r}, not {value!r}): "
                "name another folder, or remove this one"
            )


def _hash(ids: Tensor) -> str:
    data = ids.cpu().contiguous().to(torch.int64)
    return hashlib.sha256(str(tuple(data.shape)).encode() + data.numpy().tobytes()).hexdigest()
