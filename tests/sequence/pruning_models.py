"""Small models of every supported family, with weights large enough for their predictions to differ, and text."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY, LENGTH = 40, 16
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Llama": (LlamaConfig, LlamaForCausalLM, {}),
    "Llama with biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "Mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
    "Qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "Qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8, "tie_word_embeddings": True}),
}
# two iterations of a short search
SHORT: dict[str, Any] = {
    "iterations": 2,
    "generations": 2,
    "offspring": 4,
    "survivors": (2, 1),
    "tokens_per_stage": (32, 72),
    "least_steps": (1, 5),
    "batch": 4,
}


def small_model(family: str = "Llama", seed: int = 0, **sizes: Any) -> PreTrainedModel:
    config_class, model_class, options = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**SIZES | options | sizes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def small_text(sequences: int = 12, seed: int = 0) -> Tensor:
    """Token ids in which each follows from the one before, more often than not."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (sequences, LENGTH), generator=generator)
    for t in range(1, LENGTH):
        follows = torch.rand(sequences, generator=generator) < 0.7
        ids[:, t] = torch.where(follows, (3 * ids[:, t - 1] + 1) % VOCABULARY, ids[:, t])
    return ids


def small_tokenizer(words: int = VOCABULARY) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def small_checkpoint(folder: Path, family: str = "Llama", shard: str = "5GB", words: int = VOCABULARY) -> Path:
    """A model folder with its tokenizer."""
    small_model(family).save_pretrained(folder, max_shard_size=shard)
    small_tokenizer(words).save_pretrained(folder)
    return folder


def small_text_file(path: Path, sequences: int = 12) -> Path:
    path.write_text(" ".join(f"w{i}" for i in small_text(sequences).flatten().tolist()), encoding="utf-8")
    return path
