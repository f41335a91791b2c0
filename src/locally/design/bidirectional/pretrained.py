"""Pretrained language models from a local folder: DNABERT, ProtBERT, ESM and their like.

Reads config.json, vocab.txt (or tokenizer.json) and model.safetensors; BERT and ESM need no further package, any other
encoder goes through transformers (extra "llm"), from the same folder and never from the network. Nothing is unpickled.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from locally.checks import check_choice, check_count
from locally.design.bidirectional.encoder import WORDS, Architecture, Encoder, translate
from locally.design.bidirectional.sequences import ALPHABETS
from locally.errors import require

Backend = Literal["auto", "own", "transformers"]
FIRST = ("[CLS]", "<cls>", "<s>")
LAST = ("[SEP]", "<eos>", "</s>")
LONGEST_WORD = 6


class ModelFolderError(ValueError):
    """A folder does not hold a model that can be read here; the message names the folder and what is amiss."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"{folder}: {reason}")


class PretrainedLM(nn.Module):
    """Mean of a frozen encoder's last hidden states over the letters; the special tokens are read, not averaged.

    Tokens are mixtures over the letters or k-mers of the alphabet, in its own order whatever that of the vocabulary.

    Args:
        encoder: embedded tokens (n, tokens, width) to hidden states of the same shape.
        words: embeddings of letters or k-mers, in base-`letters` order.
        first, last: embeddings of the special tokens before and after, or None.
        kmer: letters in a token.

    Use `from_folder`.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        words: Float[Tensor, "vocabulary width"],
        first: Float[Tensor, " width"] | None,
        last: Float[Tensor, " width"] | None,
        kmer: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.kmer = kmer
        self.words = nn.Parameter(words.clone())
        self.first = None if first is None else nn.Parameter(first.clone())
        self.last = None if last is None else nn.Parameter(last.clone())
        self.eval().requires_grad_(False)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        alphabet: str,
        *,
        kmer: int | None = None,
        backend: Backend = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "PretrainedLM":
        """Read a model, in eval mode and frozen.

        Args:
            folder: holds config.json, vocab.txt or tokenizer.json, and model.safetensors (or its shards with
                model.safetensors.index.json).
            alphabet: "dna", "protein" or letters, as for `SequenceSpace`.
            kmer: letters in a token; default 1 if the vocabulary has every letter, else the shortest words that it has
                all of.
            backend: "own" reads BERT and ESM; "transformers" any encoder that it knows, and needs the extra "llm";
                "auto" takes the first where it can.
            dtype, device: of the weights.

        Raises:
            ModelFolderError: a file is missing, is not what it should be, or the vocabulary lacks a letter.
            MissingExtra: the model needs transformers, which is not installed.
            ValueError: an argument is out of range.
        """
        folder = Path(folder)
        check_choice("backend", backend, ("auto", "own", "transformers"))
        if kmer is not None:
            check_count("kmer", kmer)
        letters = ALPHABETS.get(alphabet.lower(), alphabet)
        config = read_json(folder, "config.json")
        if backend == "auto":
            backend = "own" if config.get("model_type") in ("bert", "esm") else "transformers"
        if backend == "own":
            encoder: nn.Module
            encoder, table = read_encoder(folder, config)
            vocabulary = read_vocabulary(folder)
        else:
            encoder, table, vocabulary = through_transformers(folder, config)
        kmer, rows = choose_words(folder, vocabulary, letters, kmer)
        if max(vocabulary.values()) >= len(table):
            reason = f"the vocabulary has token {max(vocabulary.values())}, the embedding {len(table)} rows"
            raise ModelFolderError(folder, reason)
        special = lambda names: next((table[vocabulary[name]] for name in names if name in vocabulary), None)
        return cls(encoder, table[rows], special(FIRST), special(LAST), kmer).to(device, dtype)

    def forward(self, tokens: Float[Tensor, "sequences positions vocabulary"]) -> Float[Tensor, "sequences features"]:
        x = tokens @ self.words
        n, positions, width = x.shape
        before = [] if self.first is None else [self.first.expand(n, 1, width)]
        after = [] if self.last is None else [self.last.expand(n, 1, width)]
        states = self.encoder(torch.cat([*before, x, *after], 1))
        return states[:, len(before) : len(before) + positions].mean(1)


def read_encoder(folder: Path, config: dict[str, Any]) -> tuple[Encoder, Tensor]:
    """The encoder with its weights, and the embeddings of all tokens."""
    try:
        shape = Architecture.read(config)
    except ValueError as error:
        raise ModelFolderError(folder, str(error)) from None
    weights = translate(read_weights(folder), shape.family)
    if WORDS not in weights:
        raise ModelFolderError(folder, f"the weights have no {WORDS}")
    table = weights.pop(WORDS)
    encoder = Encoder(shape)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelFolderError(folder, f"the weights do not fit config.json: {' '.join(str(error).split())}") from None
    return encoder, table


def read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(read_json(folder, index.name)["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    weights: dict[str, Tensor] = {}
    for name in files:
        path = folder / name
        if path.parent != folder or not path.exists():
            others = [p.name for p in folder.glob("*.bin")]
            hint = f"; {others[0]} is a pickle, which is never opened: convert it to safetensors" if others else ""
            raise ModelFolderError(folder, f"there is no {name}{hint}")
        try:
            weights |= load_file(path)
        except SafetensorError as error:
            raise ModelFolderError(folder, f"{name} is no safetensors file ({error})") from None
    return weights


def read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not folder.is_dir():
        raise ModelFolderError(folder, "there is no such folder; models are read from disk and never downloaded")
    if not path.exists():
        raise ModelFolderError(folder, f"there is no {name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFolderError(folder, f"{name} is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ModelFolderError(folder, f"{name} holds no object")
    return found


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and their numbers, from vocab.txt (one token a line) or tokenizer.json."""
    text = folder / "vocab.txt"
    if text.exists():
        return {token: i for i, token in enumerate(text.read_text(encoding="utf-8").splitlines())}
    if not (folder / "tokenizer.json").exists():
        raise ModelFolderError(folder, "there is neither vocab.txt nor tokenizer.json")
    found = read_json(folder, "tokenizer.json").get("model", {}).get("vocab")
    if isinstance(found, dict) and found:
        return found
    if isinstance(found, list) and found:  # unigram models: pairs of token and score
        return {token: i for i, (token, _) in enumerate(found)}
    raise ModelFolderError(folder, "tokenizer.json has no model.vocab")


def choose_words(folder: Path, vocabulary: dict[str, int], letters: str, kmer: int | None) -> tuple[int, list[int]]:
    """Letters in a token, and the row of every k-mer in base-`letters` order."""
    for k in range(1, LONGEST_WORD + 1) if kmer is None else (kmer,):
        words = ["".join(word) for word in itertools.product(letters, repeat=k)]
        rows = [vocabulary.get(word, vocabulary.get(f"▁{word}", -1)) for word in words]
        if min(rows) >= 0:
            return k, rows
        missing = words[rows.index(-1)]
        if any(word in vocabulary for word in words):
            break
    raise ModelFolderError(folder, f"the vocabulary has no token {missing!r} for the alphabet {letters!r}")


def through_transformers(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, Tensor, dict[str, int]]:
    if config.get("model_type") == "esm":
        # there embedded tokens skip the positions and the rescaling that token numbers get
        raise ModelFolderError(folder, 'transformers reads ESM by token numbers only: use backend="own"')
    transformers = require("transformers", "llm")
    safe = {"local_files_only": True, "trust_remote_code": False}
    encoder_only = config.get("model_type") in ("t5", "mt5", "umt5")
    kind = transformers.T5EncoderModel if encoder_only else transformers.AutoModel
    try:
        model = kind.from_pretrained(folder, use_safetensors=True, **safe)
        vocabulary = transformers.AutoTokenizer.from_pretrained(folder, **safe).get_vocab()
    except (OSError, ValueError) as error:
        raise ModelFolderError(folder, " ".join(str(error).split())) from None
    return InputsEmbedded(model.eval()), model.get_input_embeddings().weight.detach(), vocabulary


class InputsEmbedded(nn.Module):
    """A transformers model called with embedded tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        return self.model(inputs_embeds=words).last_hidden_state
