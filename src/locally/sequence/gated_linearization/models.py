"""Converted models of Transformers: Llama, Mistral, Qwen2 and Qwen3 with Liger attention, under names of their own.

A conversion replaces attention modules and adds no parameter, so that weights load from the original's folder
unchanged. Importing this module registers the architectures: `AutoModelForCausalLM.from_pretrained` then reads a
converted folder. Source: Lan et al., arXiv 2503.01496.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import Cache
from transformers.initialization import no_init_weights

from locally.sequence import checkpoints
from locally.sequence.gated_linearization.attention import LigerAttention
from locally.sequence.gated_linearization.cache import LigerCache
from locally.sequence.gated_linearization.settings import LigerConfig


class LigerCausalLM:
    """What the converted classes share; stands before the original class in their bases."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        liger = LigerConfig.from_dict(config.liger or {})
        layers = self.model.layers  # type: ignore[attr-defined]
        check_layers(liger, len(layers))
        for index, layer in enumerate(layers):
            if index not in liger.softmax_layers:
                layer.self_attn = LigerAttention(layer.self_attn, liger, index)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` leaves the cache to `forward`, which knows how to make one."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As for the original; by default with a cache outside training.

        Raises:
            ValueError: attention weights are asked for (the recurrence has none), the mask is not one number a token,
                or the cache is of another kind.
        """
        config: PreTrainedConfig = self.config  # type: ignore[attr-defined]
        if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
            raise ValueError("output_attentions must be False: a recurrence has no attention weights")
        cache = kwargs.pop("past_key_values", None) if cache is None else cache
        if cache is not None and not isinstance(cache, LigerCache):
            raise ValueError(f"cache must be a LigerCache, got {type(cache).__name__}")
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
            raise ValueError("attention_mask must have shape (batch, tokens), 0 for padding")
        if use_cache is None:
            use_cache = bool(config.use_cache) and not self.training  # type: ignore[attr-defined]
        if use_cache and cache is None:
            cache = LigerCache(config)
        given = inputs_embeds if input_ids is None else input_ids
        padding = None
        if attention_mask is not None and given is not None:
            padding = attention_mask[:, -given.shape[1] :].bool()
            padding = None if bool(padding.all()) else padding
        if not config.liger["softmax_layers"]:
            attention_mask = None  # nobody would read the quadratic mask
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            padding_mask=padding,
            **kwargs,
        )


def configuration(base: type[PreTrainedConfig]) -> Any:
    """The original's configuration and `liger`, a `LigerConfig` as a dictionary."""
    body = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} of a converted model: `liger` holds what `LigerConfig.to_dict` gives.",
        "__annotations__": {"liger": dict | None},
        "liger": None,
        "model_type": f"liger_{base.model_type}",
    }
    return type(f"Liger{base.__name__}", (base,), body)


LigerLlamaConfig = configuration(LlamaConfig)
LigerMistralConfig = configuration(MistralConfig)
LigerQwen2Config = configuration(Qwen2Config)
LigerQwen3Config = configuration(Qwen3Config)


class LigerLlamaForCausalLM(LigerCausalLM, LlamaForCausalLM):
    config_class = LigerLlamaConfig


class LigerMistralForCausalLM(LigerCausalLM, MistralForCausalLM):
    config_class = LigerMistralConfig


class LigerQwen2ForCausalLM(LigerCausalLM, Qwen2ForCausalLM):
    config_class = LigerQwen2Config


class LigerQwen3ForCausalLM(LigerCausalLM, Qwen3ForCausalLM):
    config_class = LigerQwen3Config


CONVERTED: Mapping[str, type[PreTrainedModel]] = {
    "LlamaForCausalLM": LigerLlamaForCausalLM,
    "MistralForCausalLM": LigerMistralForCausalLM,
    "Qwen2ForCausalLM": LigerQwen2ForCausalLM,
    "Qwen3ForCausalLM": LigerQwen3ForCausalLM,
}
LIGER = tuple(model.__name__ for model in CONVERTED.values())

for _model in CONVERTED.values():
    _config: Any = _model.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)


def linearize(
    model: PreTrainedModel | str | Path, config: LigerConfig | None = None, *, inplace: bool = False
) -> PreTrainedModel:
    """The same model with Liger attention: same parameters under the same names, none new.

    Before recovery training (`fit_lora`) a conversion is worse than the original; how much depends on the model.

    Args:
        model: a causal language model of Transformers (Llama, Mistral, Qwen2 or Qwen3), or its local folder.
        config: of the conversion; None for the paper's.
        inplace: let the conversion share the model's parameters instead of copying them. A folder's are never copied.

    Raises:
        ValueError: an architecture that is not supported, attention dropout, or a layer to keep that is not there;
            for folders also what `checkpoints.read` raises.
        TypeError: not a model of Transformers.

    Complexity:
        No arithmetic; the copy of the weights unless `inplace`.

    >>> small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    >>> original = LlamaForCausalLM(LlamaConfig(vocab_size=5, **small))
    >>> converted = linearize(original, LigerConfig(window=4))
    >>> type(converted).__name__, converted.num_parameters() == original.num_parameters()
    ('LigerLlamaForCausalLM', True)
    """
    config = LigerConfig() if config is None else config
    if isinstance(model, str | Path):
        return linearize(checkpoints.read(model, architectures=tuple(CONVERTED)).model, config, inplace=True)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of Transformers or a folder, got {type(model).__name__}")
    target = CONVERTED.get(type(model).__name__)
    if target is None:
        raise ValueError(f"model must be one of {', '.join(CONVERTED)}, got {type(model).__name__}")
    if getattr(model.config, "attention_dropout", 0):
        raise ValueError(
            f"attention_dropout must be 0: a recurrence has no weights, got {model.config.attention_dropout}"
        )
    check_layers(config, model.config.num_hidden_layers)
    fields = copy.deepcopy(model.config.to_dict())
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    target_config: Any = target.config_class
    new = target_config(**fields, liger=config.to_dict())
    new._attn_implementation = model.config._attn_implementation
    new.architectures = [target.__name__]
    with torch.device("meta"), no_init_weights():  # nothing is allocated: every weight is the original's
        converted: Any = target(new)
    converted.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # holds the only buffers
    if inplace:
        share_parameters(model, converted)
    else:
        converted.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    converted.tie_weights()
    if model.generation_config is not None:
        converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.train(model.training)


def share_parameters(source: nn.Module, target: nn.Module) -> None:
    for name, parameter in source.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(path), leaf, parameter)


def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> checkpoints.Checkpoint:
    """Read a converted model and its tokenizer from a local folder, with the errors of `checkpoints.read`."""
    return checkpoints.read(folder, architectures=LIGER, dtype=dtype, device=device)


def check_layers(config: LigerConfig, count: int) -> None:
    absent = [layer for layer in config.softmax_layers if layer >= count]
    if absent:
        raise ValueError(f"softmax_layers names layer {absent[0]}, but the model has {count}, counted from 0")
