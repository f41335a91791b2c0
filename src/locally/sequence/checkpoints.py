"""Transformers checkpoints in local folders: read with named errors, written whole or not at all.

What the methods for pretrained language models share. Nothing is downloaded, no code of a checkpoint is run, and
weights come from safetensors files only. A folder under its final name is complete: it is written beside, then renamed.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from locally.errors import UsageError, require

__all__ = [
    "BadCheckpoint",
    "Checkpoint",
    "Weights",
    "check_architecture",
    "check_free",
    "open_weights",
    "read",
    "read_config",
    "read_tokenizer",
    "writing",
]

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
CAUSAL = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class BadCheckpoint(UsageError, ValueError):
    """A folder that cannot be read as a checkpoint, or cannot be written; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A model with what belongs to it."""

    folder: Path
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder; each is read from its file when asked for."""

    folder: Path
    files: Mapping[str, str]  # of each tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            with safe_open(self.folder / self.files[name], framework="pt") as shard:
                return shard.get_tensor(name)
        except KeyError:
            raise BadCheckpoint(f"{self.folder} holds no tensor {name}") from None
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"{self.folder / self.files[name]} cannot be read: {error}") from None


def read(
    folder: str | Path,
    *,
    architectures: Sequence[str] = CAUSAL,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Read a causal language model and its tokenizer, if it has one, from a local folder.

    Args:
        folder: as `save_pretrained` writes it: config.json, weights in one or many safetensors files.
        architectures: names of model classes that the caller can work with.
        dtype: of the weights; None for the stored one.
        device: where the model goes.

    Raises:
        BadCheckpoint: folder, configuration or a shard is missing or corrupt, the architecture is another, tensors are
            missing or have wrong shapes, or the tokenizer knows more tokens than the model. A `ValueError` too.
        MissingExtra: Transformers is not installed.

    Complexity:
        Reads the weights once; the checks before it read headers only.
    """
    folder = Path(folder)
    check_architecture(folder, architectures)
    open_weights(folder)
    tokenizer = read_tokenizer(folder)
    model = read_model("AutoModelForCausalLM", folder, dtype)
    known, rows = len(tokenizer) if tokenizer is not None else 0, model.get_input_embeddings().weight.shape[0]
    if known > rows:
        raise BadCheckpoint(f"the tokenizer of {folder} knows {known} tokens, its model only {rows}: they do not match")
    return Checkpoint(folder, model.to(device).eval(), tokenizer)


def read_model(auto: str, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model alone, by one of Transformers' Auto classes, with every weight; `dtype` None for the stored one."""
    auto_class = getattr(require("transformers", "llm"), auto)
    try:
        model, report = auto_class.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadCheckpoint(f"{folder} cannot be loaded: {_first_line(error)}") from error
    if report["missing_keys"]:
        raise BadCheckpoint(f"{folder} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}")
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands."""
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"{folder} has no config.json: it is not a checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{folder / 'config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{folder / 'config.json'} must hold an object, got a {type(config).__name__}")
    return config


def check_architecture(folder: Path, architectures: Sequence[str]) -> str:
    """The folder's architecture, which must be one of those named."""
    named = read_config(folder).get("architectures") or ["none"]
    if named[0] not in architectures:
        raise BadCheckpoint(f"{folder} holds {named[0]}; supported are {', '.join(architectures)}")
    return str(named[0])


def open_weights(folder: Path) -> Weights:
    """Find every tensor of a folder and check that its file is there and has a sound header.

    Complexity:
        Opens every shard once and reads its header, no tensor.
    """
    if (folder / INDEX).exists():
        files = _indexed(folder)
    elif (folder / SINGLE).exists():
        files = dict.fromkeys(_names(folder / SINGLE), SINGLE)
    else:
        pickled = next(folder.glob("*.bin"), None)
        hint = f"; {pickled.name} is pickled and not read: save it again as safetensors" if pickled else ""
        raise BadCheckpoint(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
    return Weights(folder, files)


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    """The folder's tokenizer; None when it has none."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    transformers = require("transformers", "llm")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizer library raises bare Exception for a damaged file
        raise BadCheckpoint(f"the tokenizer of {folder} cannot be read: {_first_line(error)}") from None


@contextmanager
def writing(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes its name `folder` when the block ends well and is removed when it does not.

    What a killed process has left of an earlier attempt is removed first.

    Raises:
        BadCheckpoint: `folder` exists and is not empty, its parent cannot be written, or another process writes it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as here:
    ...     with writing(f"{here}/model") as beside:
    ...         _ = (beside / "config.json").write_text("{}")
    ...     print([p.name for p in Path(here, "model").iterdir()])
    ['config.json']
    """
    folder = Path(folder).absolute()
    check_free(folder, overwrite=overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside, aside = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "replaced"))
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BadCheckpoint(f"another process is writing {folder}") from None
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        yield beside
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        beside.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def check_free(folder: str | Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder that would lose something: call it before long work."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise BadCheckpoint(f"cannot write {folder}: it is a file")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise BadCheckpoint(f"{folder} exists already and is not empty")


def _indexed(folder: Path) -> dict[str, str]:
    try:
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{folder / INDEX} cannot be read: {error!r}") from None
    if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
        raise BadCheckpoint(f"{folder / INDEX} must map tensors to files of its folder")
    for shard in sorted(set(files.values())):
        held = _names(folder / shard)
        absent = [name for name, file in files.items() if file == shard and name not in held]
        if absent:
            raise BadCheckpoint(f"{folder / shard} lacks {absent[0]}, which {INDEX} places there")
    return files


def _names(shard: Path) -> set[str]:
    if not shard.is_file():
        raise BadCheckpoint(f"the shard {shard} is missing")
    try:
        with safe_open(shard, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(f"{shard} is not a sound safetensors file: {error}") from None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
