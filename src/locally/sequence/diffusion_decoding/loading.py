"""Language models in local folders: masked diffusion models, other masked models, and causal ones for comparison."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from locally.errors import require
from locally.sequence import checkpoints
from locally.sequence.checkpoints import BadCheckpoint
from locally.sequence.diffusion_decoding.bidirectional import FAMILIES, BidirectionalLM, named_weights, with_weights
from locally.sequence.diffusion_decoding.generation import special_token

SUPPORTED = f"{', '.join(FAMILIES)}, and the ...ForMaskedLM and ...ForCausalLM classes of Transformers"


class Kind(StrEnum):
    """How a language model in a folder writes; told from its config.json."""

    DIFFUSION = "masked diffusion"  # LLaDA, Dream: left padding and caches
    MASKED = "masked"  # any other masked model
    CAUSAL = "causal"  # one token after the other


@dataclass(frozen=True)
class LanguageModel:
    """A model with what is needed to speak with it."""

    folder: Path
    architecture: str
    kind: Kind
    model: nn.Module
    tokenizer: Any | None
    mask_token_id: int | None
    eos_token_id: int | None


def kind_of(folder: str | Path) -> tuple[str, Kind]:
    """Architecture and kind of the checkpoint in a folder, from its config.json alone; BadCheckpoint otherwise."""
    named = checkpoints.read_config(Path(folder)).get("architectures") or ["none"]
    architecture = str(named[0])
    if architecture in FAMILIES:
        return architecture, Kind.DIFFUSION
    known = hasattr(require("transformers", "llm"), architecture)
    if known and architecture.endswith("ForMaskedLM"):
        return architecture, Kind.MASKED
    if known and architecture.endswith("ForCausalLM"):
        return architecture, Kind.CAUSAL
    raise BadCheckpoint(f"{folder} holds {architecture}; supported are {SUPPORTED}")


def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> LanguageModel:
    """Read a model and its tokenizer, if it has one, from a local folder.

    Args:
        folder: config.json, weights in one or many safetensors files, tokenizer files; as Transformers writes them, or
            a LLaDA or Dream checkpoint as published, whose own code is not run.
        dtype: of the weights; None for the stored one.
        device: where the model goes.

    Raises:
        BadCheckpoint: a folder, configuration or shard that is missing or corrupt, an architecture that is not
            supported, weights that are missing or have wrong shapes, a tokenizer that does not match, no mask token.
        MissingExtra: Transformers is not installed.

    Reads the weights once, after checks that read headers only.
    """
    folder = Path(folder)
    architecture, kind = kind_of(folder)
    if kind is Kind.CAUSAL:
        read = checkpoints.read(folder, architectures=(architecture,), dtype=dtype, device=device)
        eos = special_token(read.model, "eos_token_id", None)
        return LanguageModel(folder, architecture, kind, read.model, read.tokenizer, None, eos)
    config, weights = checkpoints.read_config(folder), checkpoints.open_weights(folder)
    tokenizer = _tokenizer(folder, architecture)
    if kind is Kind.DIFFUSION:
        model: Any = _bidirectional(folder, config, weights, dtype)
        vocabulary = model.stack.config.vocab_size
    else:
        model = checkpoints.read_model("AutoModelForMaskedLM", folder, dtype)
        vocabulary = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > vocabulary:
        raise BadCheckpoint(f"the tokenizer of {folder} knows {len(tokenizer)} tokens, its model only {vocabulary}")
    mask = special_token(model, "mask_token_id", None)
    mask = getattr(tokenizer, "mask_token_id", None) if mask is None else mask
    if mask is None:
        raise BadCheckpoint(f"{folder} names no mask token, neither in config.json nor in its tokenizer")
    eos = special_token(model, "eos_token_id", None)
    eos = getattr(tokenizer, "eos_token_id", None) if eos is None else eos
    return LanguageModel(folder, architecture, kind, model.to(device).eval(), tokenizer, mask, eos)


def save(model: BidirectionalLM, folder: str | Path, *, tokenizer: Any = None, overwrite: bool = False) -> None:
    """Write a LLaDA or Dream model as `load` reads it; the folder is there whole or not at all.

    Raises BadCheckpoint when it exists and `overwrite` is not set.
    """
    import json

    from safetensors.torch import save_file

    with checkpoints.writing(folder, overwrite=overwrite) as beside:
        config = {"model_type": FAMILIES[model.family].model_type, **model.source, "architectures": [model.family]}
        (beside / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        save_file(dict(named_weights(model)), beside / checkpoints.SINGLE, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)


def _bidirectional(
    folder: Path, config: Mapping[str, Any], weights: checkpoints.Weights, dtype: torch.dtype | None
) -> BidirectionalLM:
    try:
        return with_weights(config, weights, dtype)
    except BadCheckpoint:
        raise
    except (ValueError, TypeError) as error:
        raise BadCheckpoint(f"{folder}: {error}") from None


def _tokenizer(folder: Path, architecture: str) -> Any | None:
    """The folder's tokenizer. Dream's is Qwen2's under a name of its own, which only code of the checkpoint knows."""
    if architecture != "DreamModel" or (folder / "tokenizer.json").exists() or not (folder / "vocab.json").exists():
        return checkpoints.read_tokenizer(folder)
    transformers = require("transformers", "llm")
    try:
        return transformers.Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizer library raises bare Exception for a damaged file
        raise BadCheckpoint(f"the tokenizer of {folder} cannot be read: {str(error).splitlines()[0]}") from None
