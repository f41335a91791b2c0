"""`locally prune`: a smaller checkpoint from a checkpoint, with a searched share of pruning for every layer."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locally.errors import UsageError, require

if TYPE_CHECKING:
    from torch import Tensor

    from locally.sequence.structured_pruning import Network, Team

PAPER_STAGES = (2048, 16384, 131072)
Say = Callable[[float, str], None]


def prune(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="Folder of a Llama, Mistral, Qwen2 or Qwen3 model.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pruned model; must not exist.")],
    calibration: Annotated[Path, typer.Option(help="Text file like what the model will be used on, UTF-8.")],
    sparsity: Annotated[float, typer.Option(help="Share of all heads and of all neurons to remove, in [0, 1).")] = 0.5,
    method: Annotated[str, typer.Option(help="tyr, or local, obs, flap, wanda-sp, magnitude, layer-drop.")] = "tyr",
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
    iterations: Annotated[int, typer.Option(help="Supernets, from coarse to fine.")] = 4,
    generations: Annotated[int, typer.Option(help="Of each search.")] = 50,
    offspring: Annotated[int, typer.Option(help="Mutants in a generation.")] = 128,
    patience: Annotated[int, typer.Option(help="End a search after so many generations without change; 0: never.")] = 0,
    unit: Annotated[str, typer.Option(help="query_head, or kv_group to save cache too.")] = "query_head",
    evaluate: Annotated[Path | None, typer.Option(help="Other text, for the perplexity before and after.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for supernets, kept; default beside the output.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda:0; auto spreads the model over all devices.")] = "cpu",
    processes: Annotated[
        int, typer.Option(help="That share the work of tyr on this machine; on several, start them with torchrun.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Prune heads and neurons of a language model; the same command again goes on where it was stopped."""
    require("transformers", "llm")
    from locally.sequence.structured_pruning import launch, processes_started, team_of_environment
    from locally.sequence.structured_pruning.baselines import METHODS

    if method not in ("tyr", *METHODS):
        raise UsageError(f"--method must be one of tyr, {', '.join(METHODS)}, got {method!r}")
    if not 0 <= sparsity < 1:
        raise UsageError(f"--sparsity must lie in [0, 1), got {sparsity}")
    if processes < 1:
        raise UsageError(f"--processes must be at least 1, got {processes}")
    settings = {
        "iterations": iterations,
        "generations": generations,
        "offspring": offspring,
        "patience": patience or None,
        "unit": unit,
        "random_state": seed,
    }
    task = Task(
        model,
        output,
        calibration,
        sparsity,
        method,
        sequences,
        length,
        settings,
        evaluate,
        work,
        device,
        overwrite,
        as_json,
    )
    started = processes_started()
    _check_together(task, max(processes, started))
    if processes > 1 and started > 1:
        raise UsageError(f"give --processes or start them with torchrun, not both: {started} were started")
    if processes > 1:
        launch(processes, partial(carry_out, task))
        return
    with team_of_environment() as team:
        carry_out(task, team)


@dataclass(frozen=True)
class Task:
    """What one command asks for, as each of its processes is told."""

    model: Path
    output: Path
    calibration: Path
    sparsity: float
    method: str
    sequences: int
    length: int
    settings: dict[str, Any]
    evaluate: Path | None
    work: Path | None
    device: str
    overwrite: bool
    as_json: bool


def _check_together(task: Task, processes: int) -> None:
    if processes == 1:
        return
    if task.method != "tyr":
        raise UsageError(f"--processes goes with --method tyr alone, got {task.method!r}, which one process does soon")
    if task.device == "auto":
        raise UsageError("give --processes or --device auto, not both: each process has the whole model at hand")


def carry_out(task: Task, team: "Team") -> None:
    """The whole command, in one process or in each of a team; the first of them writes and reports."""
    from locally.sequence.checkpoints import check_free
    from locally.sequence.structured_pruning import WorkFolderMismatch
    from locally.sequence.structured_pruning.calibration import read_windows

    check_free(task.output, overwrite=task.overwrite)
    device = _device_of(task.device, team)
    network, tokenizer = _open(task.model, device)
    try:
        ids = read_windows(task.calibration, tokenizer, network, length=task.length, sequences=task.sequences)
        held_out = (
            None if task.evaluate is None else read_windows(task.evaluate, tokenizer, network, length=task.length)
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    with _progress(shown=team.leads) as say:
        try:
            if task.method == "tyr":
                summary = _prune_by_search(network, ids, task, tokenizer, team, say)
            else:
                summary = _prune_at_once(
                    network, ids, task.sparsity, task.method, task.output, tokenizer, task.overwrite
                )
        except WorkFolderMismatch:
            raise
        except ValueError as error:
            raise UsageError(str(error)) from error
        if not team.leads:
            return
        if held_out is not None:
            say(1.0, "measuring perplexity")
            summary["perplexity"] = _perplexities(network, task.output, held_out, device)
    _print(summary, task.output, task.as_json)


def _device_of(name: str, team: "Team") -> str:
    """Of one process: "cuda" is then a GPU of its own, as far as there are enough."""
    if name != "cuda" or team.size == 1:
        return name
    import torch

    return f"cuda:{int(os.environ.get('LOCAL_RANK', team.rank)) % max(torch.cuda.device_count(), 1)}"


def _open(folder: Path, device: str) -> tuple["Network", Any]:
    from locally.sequence.checkpoints import BadCheckpoint, read, read_tokenizer
    from locally.sequence.structured_pruning import open_network

    if device == "auto":
        require("accelerate", "llm")
        from accelerate import dispatch_model, infer_auto_device_map

        checkpoint = read(folder)
        model = checkpoint.model
        places = infer_auto_device_map(model, no_split_module_classes=list(model._no_split_modules or ()))
        network, tokenizer = open_network(dispatch_model(model, places)), checkpoint.tokenizer
    else:
        network, tokenizer = open_network(folder, device=device), read_tokenizer(folder)
    if tokenizer is None:
        raise BadCheckpoint(f"{folder} has no tokenizer, which the calibration text needs")
    if len(tokenizer) > network.config.vocab_size:
        raise BadCheckpoint(
            f"the tokenizer of {folder} knows {len(tokenizer)} tokens, its model only {network.config.vocab_size}: "
            "they do not match"
        )
    return network, tokenizer


def _prune_by_search(
    network: "Network", ids: "Tensor", task: Task, tokenizer: Any, team: "Team", say: Say
) -> dict[str, Any]:
    from locally.sequence.structured_pruning import TyrPruner, size_of

    folder = task.work or task.output.absolute().with_name(f".{task.output.name}.work")
    stages = tuple(min(tokens, ids.numel()) for tokens in PAPER_STAGES)
    pruner = TyrPruner(task.sparsity, **task.settings, tokens_per_stage=stages, workdir=folder, callback=say, team=team)
    pruner.fit(network, ids)
    if not team.leads:
        return {}
    pruner.save_pretrained(task.output, tokenizer=tokenizer, overwrite=task.overwrite)
    summary = {
        "method": "tyr",
        "sparsity": task.sparsity,
        "removed": pruner.removed_,
        "dense": vars(size_of(network)),
        "pruned": vars(size_of(network, pruner.plan_)),
        "history": pruner.history_,
    }
    if task.work is None:
        shutil.rmtree(folder, ignore_errors=True)
    return summary


def _prune_at_once(
    network: "Network", ids: "Tensor", sparsity: float, method: str, output: Path, tokenizer: Any, overwrite: bool
) -> dict[str, Any]:
    from locally.sequence.structured_pruning import prune_uniform, save_compressed, size_of

    plan = prune_uniform(network, ids, sparsity, method=method)
    save_compressed(network, plan, output, tokenizer=tokenizer, overwrite=overwrite)
    sizes = {"dense": vars(size_of(network)), "pruned": vars(size_of(network, plan))}
    return {"method": method, "sparsity": sparsity, **sizes}


def _perplexities(network: "Network", output: Path, ids: "Tensor", device: str) -> dict[str, float]:
    from locally.sequence.structured_pruning import load_pruned, perplexity

    pruned = load_pruned(output, device="cpu" if device == "auto" else device).model
    return {"dense": perplexity(network, ids), "pruned": perplexity(pruned, ids)}


@contextmanager
def _progress(*, shown: bool) -> Iterator[Say]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not shown) as bars:
        task = bars.add_task("reading the model", total=1.0)
        yield lambda fraction, what: bars.update(task, completed=fraction, description=what)


def _print(summary: dict[str, Any], output: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**summary, "output": str(output)}))
        return
    print(f"{output}: {summary['method']}, sparsity {summary['sparsity']:g}")
    for name, before in summary["dense"].items():
        after = summary["pruned"][name]
        print(f"  {name.replace('_', ' '):18s} {before:>16,} -> {after:>16,}  ({1 - after / before:6.1%} less)")
    if "perplexity" in summary:
        print("  perplexity         {dense:16.3f} -> {pruned:16.3f}".format(**summary["perplexity"]))
