"""Masked diffusion language models of the LLaDA and Dream families, on the stacks of Transformers.

LLaDA is a Llama and Dream a Qwen2 whose attention sees both sides; what differs is the names of their weights and that
Dream's logits at position i predict token i + 1. No code that comes with a checkpoint is run.
Sources: LLaDA, arXiv 2502.09992; Dream, arXiv 2508.15487; block caches: Fast-dLLM, arXiv 2505.22618.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from locally.checks import check_count
from locally.errors import require

ATTENTION = "locally_bidirectional"
LLADA_NAMES = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
}
LLADA_BLOCK = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
# What a LLaDA configuration may say beside its sizes: the family of blocks has switches that no released model uses.
LLADA_SETTINGS: Mapping[str, Any] = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
}


class BlockCache:
    """Keys and values, of every layer, of all positions outside a window.

    The first forward pass fills it and is exact; later ones compute the window alone and attend to what is kept, which
    has not seen the tokens that the window has gained since.
    """

    def __init__(self, window: slice) -> None:
        self.window = window
        self.outside: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def filled(self) -> bool:
        """Whether keys and values outside the window are there."""
        return bool(self.outside)

    def complete(self, layer: int, key: Tensor, value: Tensor, filling: bool) -> tuple[Tensor, Tensor]:
        """All keys and values that the window attends to; positions outside it come first once they are kept."""
        if filling:
            self.outside[layer] = self.leave(key), self.leave(value)
            return key, value
        kept_key, kept_value = self.outside[layer]
        return torch.cat([kept_key, key], -2), torch.cat([kept_value, value], -2)

    def leave(self, x: Tensor, dim: int = -2) -> Tensor:
        """`x` without the window."""
        start, stop = self.window.start, self.window.stop
        return torch.cat([x.narrow(dim, 0, start), x.narrow(dim, stop, x.shape[dim] - stop)], dim)

    def keep(self, rows: Bool[Tensor, " rows"]) -> None:
        """Drop the rows that are False."""
        self.outside = {layer: (k[rows], v[rows]) for layer, (k, v) in self.outside.items()}


class BidirectionalLM(nn.Module):
    """A decoder stack of Transformers without its causal mask: a masked language model for `diffusion_generate`.

    Args:
        stack: a `LlamaForCausalLM` or `Qwen2ForCausalLM` whose attention implementation is `ATTENTION`.
        family: "LLaDAModelLM" or "DreamModel".
        source: the configuration in the family's own words, which goes with the weights when they are saved.
        mask_token_id, eos_token_id: of the vocabulary.

    Calling it with ids (rows, length), and an attention mask where rows are padded on the left, gives logits
    (rows, length, vocabulary), unshifted.
    """

    def __init__(
        self, stack: Any, family: str, source: Mapping[str, Any], mask_token_id: int, eos_token_id: int | None
    ) -> None:
        super().__init__()
        self.stack = stack
        self.family = family
        self.source = dict(source)
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.logits_shift = FAMILIES[family].logits_shift
        self.max_position_embeddings = int(stack.config.max_position_embeddings)

    def forward(
        self, input_ids: Int[Tensor, "rows length"], attention_mask: Int[Tensor, "rows length"] | None = None
    ) -> Float[Tensor, "rows length vocab"]:
        return self.stack.lm_head(self._hidden(input_ids, attention_mask, None))

    def new_cache(self, window: slice) -> BlockCache:
        """An empty cache for one window of positions."""
        return BlockCache(window)

    def logits_at(
        self,
        input_ids: Int[Tensor, "rows length"],
        positions: Int[Tensor, " n"],
        attention_mask: Int[Tensor, "rows length"] | None = None,
        cache: BlockCache | None = None,
    ) -> Float[Tensor, "rows n vocab"]:
        """Logits at some positions, which lie in the cache's window if there is a cache.

        A forward pass over the sequence, or over the window alone once the cache is filled.
        """
        offset = cache.window.start if cache is not None and cache.filled else 0
        return self.stack.lm_head(self._hidden(input_ids, attention_mask, cache)[:, positions - offset])

    def _hidden(self, ids: Tensor, mask: Tensor | None, cache: BlockCache | None) -> Tensor:
        within = cache is not None and cache.filled
        where = cache.window if cache is not None and within else slice(None)
        if mask is None:
            places, shown = torch.arange(ids.shape[1], device=ids.device)[None], None
        else:
            places = (mask.cumsum(1) - 1).clamp_min(0)  # as if there were no padding
            ordered = torch.cat([cache.leave(mask, 1), mask[:, where]], 1) if cache is not None and within else mask
            shown = ordered[:, None, None].bool()
        return self.stack.model(
            input_ids=ids[:, where],
            position_ids=places[:, where],
            use_cache=False,
            block_cache=cache,
            filling=not within,
            shown=shown,
        ).last_hidden_state


def attend_both_ways(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    block_cache: BlockCache | None = None,
    filling: bool = True,
    shown: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention to every shown key, as the attention interface of Transformers calls it. Its causal mask is ignored."""
    if block_cache is not None:
        key, value = block_cache.complete(module.layer_idx, key, value, filling)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # expanded by hand: kernels that take both a mask and grouped heads are rare
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    o = scaled_dot_product_attention(query, key, value, attn_mask=shown, dropout_p=dropout, scale=scaling)
    return o.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Family:
    """How one family of checkpoints is read."""

    logits_shift: int
    stack: Callable[[Mapping[str, Any]], Any]  # an empty stack of these sizes
    stored: Callable[[str], str]  # the name, in the checkpoint, of a weight of the stack
    model_type: str


def build(config: Mapping[str, Any], *, device: str | torch.device = "cpu") -> BidirectionalLM:
    """A model with fresh weights from a LLaDA or Dream configuration, in that family's own words.

    Args:
        config: as config.json of a checkpoint says it; `architectures` names the family.
        device: where the weights are made; "meta" makes none.

    Raises:
        ValueError: an unknown family, a size or `mask_token_id` that is missing or no positive integer, a LLaDA
            switch that no released model uses.
        MissingExtra: Transformers is not installed.

    >>> sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 32, "max_sequence_length": 64}
    >>> tokens = {"vocab_size": 12, "mask_token_id": 11, "eos_token_id": 10}
    >>> model = build({"architectures": ["LLaDAModelLM"], **sizes, **tokens}).eval()
    >>> model(torch.zeros(1, 5, dtype=torch.long)).shape
    torch.Size([1, 5, 12])
    """
    (family, *_) = config.get("architectures") or [None]
    if family not in FAMILIES:
        raise ValueError(f"architectures must name one of {', '.join(FAMILIES)}, got {family!r}")
    require("transformers", "llm")
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend_both_ways)
    vocabulary = sized(config, "vocab_size")
    mask, eos = config.get("mask_token_id"), config.get("eos_token_id")
    if mask is None:
        raise ValueError("mask_token_id is not in the configuration: without a mask nothing can be generated")
    check_count("mask_token_id", mask, at_least=0)
    if mask >= (config.get("embedding_size") or vocabulary):
        raise ValueError(f"mask_token_id must be below {vocabulary} = vocab_size, got {mask}")
    with torch.device(device):
        stack = FAMILIES[family].stack(config)
    return BidirectionalLM(stack, family, config, mask, eos)


def with_weights(config: Mapping[str, Any], weights: Mapping[str, Tensor] | Any, dtype: torch.dtype | None) -> Any:
    """The model of `config` with tensors of a checkpoint, read one after the other under the family's names.

    Raises ValueError for a tensor that is missing or has another shape than the configuration says.
    """
    model = build(config, device="meta")
    tied = model.stack.config.tie_word_embeddings
    found = {}
    for name, empty in model.stack.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stored = FAMILIES[model.family].stored(name)
        tensor = weights[stored]
        if tensor.shape != empty.shape:
            raise ValueError(f"{stored} must have shape {tuple(empty.shape)}, got {tuple(tensor.shape)}")
        found[name] = tensor.to(dtype) if dtype else tensor
    model.stack.load_state_dict(found, assign=True, strict=not tied)
    if tied:
        model.stack.tie_weights()
    # Not among the weights, hence still without data.
    model.stack.model.rotary_emb = type(model.stack.model.rotary_emb)(config=model.stack.config)
    return model.eval()


def named_weights(model: BidirectionalLM) -> Iterator[tuple[str, Tensor]]:
    """The model's weights under the names that its family stores them by."""
    for name, tensor in model.stack.state_dict().items():
        if not (model.stack.config.tie_word_embeddings and name == "lm_head.weight"):
            yield FAMILIES[model.family].stored(name), tensor.contiguous()


def sized(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{name} is not in the configuration")
    check_count(name, value)
    return int(value)


def configured(kind: Callable[..., Any], **sizes: Any) -> Any:
    """A configuration of Transformers: rotary settings in the words that all its versions take, and our attention."""
    return kind(**sizes, pad_token_id=None, attn_implementation=ATTENTION)


def _llada_stack(config: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, wanted in LLADA_SETTINGS.items():
        if config.get(name, wanted) != wanted:
            raise ValueError(f"{name} must be {wanted!r} in a LLaDA configuration, got {config[name]!r}")
    width, heads = sized(config, "d_model"), sized(config, "n_heads")
    return LlamaForCausalLM(
        configured(
            LlamaConfig,
            vocab_size=sized(config, "embedding_size", sized(config, "vocab_size")),
            hidden_size=width,
            intermediate_size=sized(config, "mlp_hidden_size", width * config.get("mlp_ratio", 4)),
            num_hidden_layers=sized(config, "n_layers"),
            num_attention_heads=heads,
            num_key_value_heads=sized(config, "n_kv_heads", heads),
            max_position_embeddings=sized(config, "max_sequence_length"),
            rms_norm_eps=config.get("rms_norm_eps", 1e-5),
            rope_theta=config.get("rope_theta", 10000.0),
            tie_word_embeddings=bool(config.get("weight_tying", False)),
        )
    )


def _dream_stack(config: Mapping[str, Any]) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads = sized(config, "num_attention_heads")
    return Qwen2ForCausalLM(
        configured(
            Qwen2Config,
            vocab_size=sized(config, "vocab_size"),
            hidden_size=sized(config, "hidden_size"),
            intermediate_size=sized(config, "intermediate_size"),
            num_hidden_layers=sized(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=sized(config, "num_key_value_heads", heads),
            max_position_embeddings=sized(config, "max_position_embeddings"),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=config.get("rope_theta", 10000.0),
            rope_scaling=config.get("rope_scaling"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    )


def _llada_name(name: str) -> str:
    """The checkpoint's name of a weight of the Llama stack."""
    module, _, kind = name.rpartition(".")
    for theirs, ours in LLADA_NAMES.items():
        if module == ours:
            return f"{theirs}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    (part,) = (theirs for theirs, ours in LLADA_BLOCK.items() if ours == inner)
    return f"model.transformer.blocks.{layer}.{part}.{kind}"


FAMILIES: Mapping[str, Family] = {
    "LLaDAModelLM": Family(0, _llada_stack, _llada_name, "llada"),
    "DreamModel": Family(1, _dream_stack, lambda name: name, "Dream"),
}
