"""`locally linearize`: a pretrained checkpoint into a gated recurrence, with recovery training on a local file."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from locally.errors import UsageError

if TYPE_CHECKING:
    from locally.sequence.gated_linearization import Examples, Recovery, Schedule


def linearize(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a Llama, Mistral, Qwen2 or Qwen3 checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the converted checkpoint; must be new.")],
    data: Annotated[
        Path | None, typer.Option(help="Text, instructions (.json, .jsonl) or tokens (.npy) for recovery training.")
    ] = None,
    variant: Annotated[str, typer.Option(help="gla, hgrn2, gsa, mamba2, mlstm, rwkv6 or linear.")] = "gla",
    window: Annotated[int, typer.Option(help="Keys that the softmax window sees.")] = 64,
    alpha: Annotated[float, typer.Option(help="Share of the recurrence; the window has the rest.")] = 0.5,
    slots: Annotated[int, typer.Option(help="Slots of gsa; 0 for the head dimension.")] = 0,
    softmax_layers: Annotated[str, typer.Option(help="Layers that stay softmax attention, such as 7,15,23,31.")] = "",
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 2,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Batches a step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    held_out: Annotated[float, typer.Option(help="Share of the data for validation.")] = 0.02,
    evaluate_every: Annotated[int, typer.Option(help="Steps between validations.")] = 200,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Of adapters and order.")] = 0,
    restart: Annotated[bool, typer.Option(help="Throw away the checkpoint of a run that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an output folder that is there.")] = False,
    device: Annotated[str, typer.Option(help="A torch device, such as cpu or cuda:0.")] = "cpu",
) -> None:
    """Convert a checkpoint to Liger attention: constant memory in decoding.

    With --data, low-rank adapters recover the original's quality and are merged. A run that was stopped or killed goes
    on where it was when the same command is given again. The output is loaded by Transformers after
    `import locally.sequence.gated_linearization`, without code from the folder.
    """
    from locally.errors import require

    require("transformers", "llm")
    if data is not None:
        require("peft", "llm")
    from locally.sequence import checkpoints
    from locally.sequence.gated_linearization import LigerConfig, Schedule, read_examples
    from locally.sequence.gated_linearization import linearize as convert
    from locally.sequence.gated_linearization.models import CONVERTED

    _check_device(device)
    try:
        config = LigerConfig(
            variant=variant,
            window=window,
            alpha=alpha,
            beta=1 - alpha,
            slots=slots or None,
            softmax_layers=_layers(softmax_layers),
        )
        schedule = Schedule(
            lr=lr,
            epochs=epochs,
            batch_size=batch_size,
            accumulation=accumulation,
            evaluate_every=evaluate_every,
            seed=seed,
        )
        checkpoints.check_free(output, overwrite=overwrite)
        checkpoint = checkpoints.read(model_dir, architectures=tuple(CONVERTED), device=device)
        examples = None if data is None else read_examples(data, checkpoint.tokenizer, length, held_out=held_out)
        model = convert(checkpoint.model, config, inplace=True)
        _say(f"{type(model).__name__}: {model.num_parameters():,} parameters, none of them new")
        if examples is not None:
            state = output.absolute().with_name(f".{output.name}.recovery.safetensors")
            if restart:
                state.unlink(missing_ok=True)
            recovery = _recover(model, examples, schedule, rank, state, save_every)
            model = recovery.merged()
        with checkpoints.writing(output, overwrite=overwrite) as beside:
            model.save_pretrained(beside)
            if checkpoint.tokenizer is not None:
                checkpoint.tokenizer.save_pretrained(beside)
        if examples is not None:
            state.unlink(missing_ok=True)
    except (ValueError, TypeError) as error:
        raise error if isinstance(error, UsageError) else UsageError(str(error)) from None
    _say(f"written to {output}")


def _recover(
    model: object,
    examples: "tuple[Examples, Examples | None]",
    schedule: "Schedule",
    rank: int,
    state: Path,
    save_every: int,
) -> "Recovery":
    from locally.sequence.gated_linearization import Status, fit_lora

    train, validation = examples
    total = schedule.steps(len(train))
    _say(f"recovery: {len(train)} sequences, {total} steps; state in {state}")
    start, first, every = time.monotonic(), [0], max(1, min(save_every, total // 10))

    def progress(step: int, total: int, loss: float) -> None:
        if not first[0]:
            first[0] = step
            if step > 1:
                _say(f"resumed after step {step - 1}")
        if step % every == 0 or step == total:
            left = (time.monotonic() - start) / (step - first[0] + 1) * (total - step)
            _say(f"step {step}/{total}, loss {loss:.4f}, {left:.0f} s left")

    found = fit_lora(
        model,  # type: ignore[arg-type]
        train,
        validation,
        schedule,
        rank=rank,
        alpha=float(rank),
        checkpoint=state,
        save_every=save_every,
        callback=progress,
    )
    if found.status is not Status.FINISHED:
        raise UsageError(f"recovery {found.status}; nothing was written: try a smaller --lr with --restart")
    if found.validation and validation is not None:
        best = min(loss for _, loss in found.validation)
        _say(f"validation loss {best:.4f} after step {found.best_step}; {found.trainable:,} numbers were trained")
    return found


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"--softmax-layers must be numbers with commas between, got {text!r}") from None


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
