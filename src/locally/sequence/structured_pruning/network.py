"""A causal language model one block at a time, wherever its weights are.

In memory, dispatched by Accelerate over GPUs, memory and disk, or in a folder: a block is put together when it is asked
for, run, and dropped, so that at most one has to fit. Llama, Mistral, Qwen2 and Qwen3 share the layout that this needs.
"""

import copy
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from locally.errors import require
from locally.sequence.checkpoints import CAUSAL, BadCheckpoint, check_architecture, open_weights
from locally.sequence.structured_pruning.levels import HEADS, NEURONS, SubLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

UNITS = ("query_head", "kv_group")
FRAMES_KEPT = 8
PAGES, PAGE_BYTES = 256, 4096  # of a shard, for its fingerprint
Block = Any  # a decoder block, with self_attn.{q,k,v,o}_proj and mlp.{gate,up,down}_proj
INPUTS_OF_BLOCK = ("attention_mask", "position_ids", "position_embeddings")


class Network:
    """What pruning needs to know and to run of a model; `open_network` makes the right one.

    Attributes:
        config: of the dense model.
        depth, hidden, heads, kv_heads, head_dim, neurons: its sizes; the last four of every block.
    """

    def __init__(self, config: "PretrainedConfig") -> None:
        self.config = config
        self.depth, self.hidden = config.num_hidden_layers, config.hidden_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or self.hidden // self.heads
        self.neurons = config.intermediate_size
        self._frames: dict[tuple[Any, ...], list[dict[str, Any]]] = {}

    def block(self, b: int) -> Block:
        """Block b with its weights, without hooks of others; not to be changed."""
        raise TypeError(f"{type(self).__name__} is an interface")

    def part(self, name: str) -> nn.Module:
        """The embedding ("embed_tokens"), the last norm ("norm") or the output layer ("lm_head")."""
        raise TypeError(f"{type(self).__name__} is an interface")

    def weight_of(self, name: str) -> Tensor:
        """Of the same parts."""
        return _with_weights(self.part(name))["weight"]

    def fingerprint(self) -> str:
        """Changes when the weights do."""
        raise TypeError(f"{type(self).__name__} is an interface")

    def sublayers(self, unit: str = "query_head") -> tuple[SubLayer, ...]:
        """Heads and neurons of every block, block by block.

        Args:
            unit: "query_head", or "kv_group": heads then go with all that share their keys and values.
        """
        heads = self.heads if unit == "query_head" else self.kv_heads
        kinds = ((HEADS, heads), (NEURONS, self.neurons))
        return tuple(SubLayer(b, kind, groups) for b in range(self.depth) for kind, groups in kinds)

    def embed(self, ids: Int[Tensor, "batch T"]) -> Float[Tensor, "batch T hidden"]:
        """Hidden states before the first block."""
        embedding = self.part("embed_tokens")
        with torch.no_grad():
            return embedding(ids.to(_device_of(embedding)))

    def run(self, b: int, block: Block, hidden: Float[Tensor, "batch T hidden"]) -> Float[Tensor, "batch T hidden"]:
        """One block, with the mask and positions that the model itself would give it."""
        device = _device_of(block)
        with torch.no_grad():
            out = block(hidden.to(device), **self._frame(hidden.shape[1], hidden.dtype, device)[b])
        return out[0] if isinstance(out, tuple) else out

    def logits(self, hidden: Float[Tensor, "batch T hidden"]) -> Float[Tensor, "batch T vocabulary"]:
        """Logits from the hidden states after the last block."""
        norm, head = self.part("norm"), self.part("lm_head")
        with torch.no_grad():
            return head(norm(hidden.to(_device_of(norm))).to(_device_of(head)))

    def _frame(self, length: int, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
        key = (length, dtype, device)
        if key not in self._frames:
            if len(self._frames) >= FRAMES_KEPT:
                self._frames.clear()
            self._frames[key] = inputs_of_blocks(self.config, length, dtype, device)
        return self._frames[key]


class ResidentNetwork(Network):
    """A model that is in memory, or that Accelerate has dispatched."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__(model.config)
        self.model = model

    def block(self, b: int) -> Block:
        layer = self.model.model.layers[b]
        return collected(layer, self.config) if _has_hooks(layer) else layer

    def part(self, name: str) -> nn.Module:
        return self.model.lm_head if name == "lm_head" else getattr(self.model.model, name)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.config.to_json_string().encode())
        for b in range(self.depth):
            for name, tensor in self.block(b).state_dict().items():
                _digest(digest, f"{b}.{name}", tensor)
        for name in ("embed_tokens", "norm", "lm_head"):
            _digest(digest, name, self.weight_of(name))
        return digest.hexdigest()


class StreamedNetwork(Network):
    """A folder of safetensors, one file or many; reads a block when it is asked for."""

    def __init__(
        self, folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        self.folder = Path(folder)
        check_architecture(self.folder, CAUSAL)
        self.weights = open_weights(self.folder)
        transformers = require("transformers", "llm")
        try:
            config = transformers.AutoConfig.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise BadCheckpoint(f"{self.folder / 'config.json'} cannot be used: {error}") from error
        super().__init__(config)
        self.device = torch.device(device)
        self.dtype = dtype or getattr(config, "dtype", None) or torch.float32
        self._parts: dict[str, nn.Module] = {}

    def block(self, b: int) -> Block:
        layer = empty_block(self.config, b)
        prefix = f"model.layers.{b}."
        return _filled(layer, {name: self._read(prefix + name) for name in layer.state_dict()}, self.folder)

    def part(self, name: str) -> nn.Module:
        if name not in self._parts:
            tied = name == "lm_head" and "lm_head.weight" not in self.weights.files
            stored = "model.embed_tokens.weight" if tied else ("" if name == "lm_head" else "model.") + name + ".weight"
            with torch.device("meta"):
                part: nn.Module
                if name == "embed_tokens":
                    part = nn.Embedding(self.config.vocab_size, self.hidden)
                elif name == "lm_head":
                    part = nn.Linear(self.hidden, self.config.vocab_size, bias=False)
                else:
                    part = classes(self.config.model_type)[1](self.hidden, eps=self.config.rms_norm_eps)
            self._parts[name] = _filled(part, {"weight": self._read(stored)}, self.folder)
        return self._parts[name]

    def fingerprint(self) -> str:
        """Of the configuration, and of each shard its size, its header and pages all over it."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted(set(self.weights.files.values())):
            size = (self.folder / file).stat().st_size
            with (self.folder / file).open("rb") as shard:
                header = int.from_bytes(shard.read(8), "little")
                digest.update(f"{file} {size}".encode() + shard.read(header))
                for page in range(PAGES):
                    shard.seek(8 + header + page * max(size - 8 - header - PAGE_BYTES, 0) // (PAGES - 1))
                    digest.update(shard.read(PAGE_BYTES))
        return digest.hexdigest()

    def _read(self, name: str) -> Tensor:
        return self.weights[name].to(self.device, self.dtype)


def open_network(
    model: "PreTrainedModel | Network | str | Path", *, device: torch.device | str = "cpu", dtype: Any = None
) -> Network:
    """A model as it is, or a folder to be read block by block on `device`.

    Raises:
        BadCheckpoint: see `locally.sequence.checkpoints.read`.
        ValueError: the architecture of a model is not supported.
        MissingExtra: Transformers is not installed.
    """
    if isinstance(model, Network):
        return model
    if isinstance(model, str | Path):
        return StreamedNetwork(model, device=device, dtype=dtype)
    if type(model).__name__ not in CAUSAL:
        raise ValueError(f"model must be one of {', '.join(CAUSAL)}, got {type(model).__name__}")
    return ResidentNetwork(model)


# The model's own classes, without its weights -------------------------------------------------------------------------


def empty_model(config: "PretrainedConfig") -> Any:
    """The decoder of `config` with all blocks, but next to no width: for its masks, positions and classes."""
    transformers = require("transformers", "llm")
    narrow = copy.deepcopy(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {"vocab_size": 1, "hidden_size": 2, "intermediate_size": 1, "num_attention_heads": 1}
    for name, value in {**sizes, "num_key_value_heads": 1, "head_dim": head_dim, "pad_token_id": None}.items():
        setattr(narrow, name, value)
    narrow._attn_implementation = config._attn_implementation or "sdpa"
    return transformers.AutoModel.from_config(narrow)


def empty_block(config: "PretrainedConfig", b: int) -> Block:
    """Block b of `config` on the meta device."""
    if config._attn_implementation is None:
        config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return classes(config.model_type)[0](config, b).eval()


@cache
def classes(model_type: str) -> tuple[Any, Any]:
    """Of a block and of the norms."""
    decoder = empty_model(require("transformers", "llm").AutoConfig.for_model(model_type, num_hidden_layers=1))
    return type(decoder.layers[0]), type(decoder.norm)


def inputs_of_blocks(
    config: "PretrainedConfig", length: int, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """What the model hands to each block beside hidden states, for unpadded sequences of one length."""
    decoder = empty_model(config).to(device)
    seen: list[dict[str, Any]] = []
    decoder.layers = nn.ModuleList(_Recorder(layer, seen) for layer in decoder.layers)
    with torch.no_grad():
        decoder(inputs_embeds=torch.zeros(1, length, 2, dtype=dtype, device=device), use_cache=False)
    return seen


class _Recorder(nn.Module):
    """Stands where a block stood and notes what it would have been given."""

    def __init__(self, layer: nn.Module, seen: list[dict[str, Any]]) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.seen = seen

    def forward(self, hidden_states: Tensor, *_: Any, **given: Any) -> Tensor:
        self.seen.append({name: given[name] for name in INPUTS_OF_BLOCK if name in given})
        return hidden_states


# Weights that Accelerate keeps elsewhere ------------------------------------------------------------------------------


def collected(layer: Block, config: "PretrainedConfig") -> nn.Module:
    """A copy of a dispatched block on its execution device, free of hooks."""
    tensors = {
        f"{name}.{key}" if name else key: value
        for name, module in layer.named_modules()
        for key, value in _with_weights(module).items()
    }
    return _filled(empty_block(config, layer.self_attn.layer_idx), tensors, None)


def _with_weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters; copies of them where they are kept elsewhere."""
    if not hasattr(module, "_hf_hook"):
        return {name: p.detach() for name, p in module.named_parameters(recurse=False)}
    with require("accelerate", "llm").utils.align_module_device(module):
        return {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}


def _has_hooks(layer: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") for module in layer.modules())


def _filled(module: nn.Module, tensors: dict[str, Tensor], folder: Path | None) -> nn.Module:
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise BadCheckpoint(f"{name} in {folder} has shape {tuple(tensor.shape)}, not {expected[name]}")
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def _device_of(module: nn.Module) -> torch.device:
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _digest(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
