"""Pruned models as Transformers models: configuration with sizes for each layer, registered with the Auto classes.

Importing `locally.sequence.structured_pruning` is what it takes for `AutoModelForCausalLM.from_pretrained(folder)` to
open a pruned checkpoint; no code travels with it. Llama, Mistral, Qwen2 and Qwen3 each have a pruned sibling.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from locally.sequence.checkpoints import INDEX, Checkpoint, read, writing
from locally.sequence.structured_pruning.cuts import Plan, Shape, biases_of, narrow, shape_of, shaped
from locally.sequence.structured_pruning.network import Network, StreamedNetwork, open_network

DENSE = {
    "Llama": (LlamaConfig, LlamaForCausalLM),
    "Mistral": (MistralConfig, MistralForCausalLM),
    "Qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "Qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
BESIDE_THE_WEIGHTS = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "generation_config.json",
    "chat_*",
)


class PrunedSizes:
    """What a pruned model's configuration says beside the dense one's, whose widths it keeps for reference."""

    query_heads_per_layer: list[int] | None = None
    kv_heads_per_layer: list[int] | None = None
    kv_index_per_layer: list[list[int]] | None = None  # of each query head
    neurons_per_layer: list[int] | None = None
    attention_output_bias: bool | None = None  # None: as in the dense model
    mlp_output_bias: bool | None = None

    num_hidden_layers: int

    def shapes(self) -> list[Shape]:
        """Sizes of every block.

        Raises:
            ValueError: a list is missing, has another length than there are blocks, or contradicts another.
        """
        lists = (self.query_heads_per_layer, self.kv_heads_per_layer, self.kv_index_per_layer, self.neurons_per_layer)
        if any(given is None or len(given) != self.num_hidden_layers for given in lists):
            raise ValueError(f"the configuration must give sizes of {self.num_hidden_layers} layers, got {lists}")
        shapes = []
        for queries, kv_heads, index, neurons in zip(*lists):  # type: ignore[arg-type]
            if len(index) != queries or set(index) != set(range(kv_heads)) or neurons < 0:
                raise ValueError(f"{queries} query heads cannot take {kv_heads} key and value heads in order {index}")
            shapes.append(Shape(tuple(index), kv_heads, neurons))
        return shapes


class PrunedLayers:
    """Gives every block of a dense class the sizes that the configuration says."""

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)  # type: ignore[call-arg]
        if config.query_heads_per_layer is None:  # Transformers makes configurations without arguments, for comparison
            return
        layers = self.model.layers  # type: ignore[attr-defined]
        biases = (config.attention_output_bias, config.mlp_output_bias)
        for b, shape in enumerate(config.shapes()):
            layers[b] = shaped(layers[b], shape, layers[b].self_attn.head_dim, biases)


def _sibling(name: str) -> tuple[Any, Any]:
    dense_config: Any
    dense_config, dense_model = DENSE[name]
    fields = {key: value for key, value in vars(PrunedSizes).items() if key in PrunedSizes.__annotations__}
    annotations = {key: PrunedSizes.__annotations__[key] for key in fields}
    model_type = f"pruned_{dense_config.model_type}"
    config = type(
        f"Pruned{name}Config",
        (PrunedSizes, dense_config),
        {"model_type": model_type, "__annotations__": annotations, "__module__": __name__, **fields},
    )
    model = type(
        f"Pruned{name}ForCausalLM",
        (PrunedLayers, dense_model),
        {"config_class": config, "__annotations__": {"config": config}, "__module__": __name__},
    )
    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    return config, model


PrunedLlamaConfig, PrunedLlamaForCausalLM = _sibling("Llama")
PrunedMistralConfig, PrunedMistralForCausalLM = _sibling("Mistral")
PrunedQwen2Config, PrunedQwen2ForCausalLM = _sibling("Qwen2")
PrunedQwen3Config, PrunedQwen3ForCausalLM = _sibling("Qwen3")
SIBLINGS = {
    LlamaConfig: (PrunedLlamaConfig, PrunedLlamaForCausalLM),
    MistralConfig: (PrunedMistralConfig, PrunedMistralForCausalLM),
    Qwen2Config: (PrunedQwen2Config, PrunedQwen2ForCausalLM),
    Qwen3Config: (PrunedQwen3Config, PrunedQwen3ForCausalLM),
}
PRUNED = tuple(model.__name__ for _, model in SIBLINGS.values())


def compress(model: "PreTrainedModel | Network | str | Path", plan: Plan) -> PreTrainedModel:
    """A pruned model in memory, with weights of its own; see `save_compressed` for one that does not fit.

    Args:
        model: dense; Llama, Mistral, Qwen2 or Qwen3.
        plan: a cut for every block, such as `TyrPruner.plan_` or what `prune_uniform` returns.

    Raises:
        ValueError: the plan has not one entry a block, or its widths are not those of the model.
    """
    network = open_network(model)
    tensors: dict[str, Tensor] = {}
    shapes, biases = [], []
    for b, state, shape, bias in _pieces(network, plan):
        tensors |= {f"model.layers.{b}.{name}": tensor.clone() for name, tensor in state.items()}
        shapes.append(shape)
        biases.append(bias)
    for name, part in _ends(network).items():
        tensors[name] = part.clone()
    config = pruned_config(network, shapes, biases)
    with torch.device("meta"):
        small = SIBLINGS[type(network.config)][1](config)
    small.model.rotary_emb = type(small.model.rotary_emb)(config=config)
    small.load_state_dict(tensors, strict=False, assign=True)
    small.tie_weights()
    assert not any(p.is_meta for p in small.parameters())
    small.generation_config = getattr(getattr(network, "model", None), "generation_config", small.generation_config)
    return small.eval()


def save_compressed(
    model: "PreTrainedModel | Network | str | Path",
    plan: Plan,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a pruned checkpoint block by block, one shard each; the folder appears when it is complete.

    Raises:
        BadCheckpoint: `folder` is there already and not empty.
        ValueError: as `compress`.
    """
    network = open_network(model)
    with writing(folder, overwrite=overwrite) as beside:
        count, size = network.depth + 1, 0
        where: dict[str, str] = {}
        shapes, biases = [], []

        def write(number: int, tensors: dict[str, Tensor]) -> int:
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, beside / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(tensors, file))
            return sum(t.numel() * t.element_size() for t in tensors.values())

        size += write(1, _ends(network))
        for b, state, shape, bias in _pieces(network, plan):
            size += write(b + 2, {f"model.layers.{b}.{name}": tensor for name, tensor in state.items()})
            shapes.append(shape)
            biases.append(bias)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (beside / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        pruned_config(network, shapes, biases).save_pretrained(beside)
        _accompany(network, beside, tokenizer)


def load_pruned(folder: str | Path, **options: Any) -> Checkpoint:
    """Open a pruned checkpoint, with the checks and options of `locally.sequence.checkpoints.read`."""
    return read(folder, architectures=PRUNED, **options)


def pruned_config(network: Network, shapes: Sequence[Shape], biases: Sequence[tuple[Any, Any]]) -> Any:
    """The configuration of the pruned sibling."""
    config_class, model_class = SIBLINGS[type(network.config)]
    settings = network.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        settings.pop(key, None)
    attention, mlp = (_agreed(kind) for kind in zip(*biases))
    config = config_class(
        **settings,
        query_heads_per_layer=[s.query_heads for s in shapes],
        kv_heads_per_layer=[s.kv_heads for s in shapes],
        kv_index_per_layer=[list(s.kv_index) for s in shapes],
        neurons_per_layer=[s.neurons for s in shapes],
        attention_output_bias=attention,
        mlp_output_bias=mlp,
    )
    config.architectures = [model_class.__name__]
    config._attn_implementation = network.config._attn_implementation or "sdpa"
    return config


def _agreed(biases: Sequence[bool | None]) -> bool | None:
    if len(set(biases)) > 1:
        raise ValueError(f"plan must give all blocks an output bias of a kind, or none of them, got {list(biases)}")
    return biases[0]


def _pieces(network: Network, plan: Plan) -> Iterator[tuple[int, dict[str, Tensor], Shape, tuple[Any, Any]]]:
    if len(plan) != network.depth:
        raise ValueError(f"plan must have {network.depth} entries, one a block, got {len(plan)}")
    for b in range(network.depth):
        cut, block = plan[b], network.block(b)
        dense = (block.self_attn.o_proj.bias is not None, block.mlp.down_proj.bias is not None)
        biases = tuple(d if given is None else given for d, given in zip(dense, biases_of(cut)))
        state = dict(narrow(network, block, cut).state_dict())
        del block  # before the next is read: one at a time
        yield b, state, shape_of(network, cut)[0], biases  # type: ignore[misc]


def _ends(network: Network) -> dict[str, Tensor]:
    names = {"embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight", "lm_head": "lm_head.weight"}
    if network.config.tie_word_embeddings:
        del names["lm_head"]
    return {stored: network.weight_of(name) for name, stored in names.items()}


def _accompany(network: Network, folder: Path, tokenizer: Any) -> None:
    if isinstance(network, StreamedNetwork):
        for pattern in BESIDE_THE_WEIGHTS:
            for file in network.folder.glob(pattern):
                if file.is_file():
                    shutil.copy(file, folder)
    else:
        generation = getattr(getattr(network, "model", None), "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
