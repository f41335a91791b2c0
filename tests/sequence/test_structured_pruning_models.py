"""Blocks one at a time, cuts of any shape, and pruned checkpoints that Transformers opens."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from locally.sequence.checkpoints import BadCheckpoint
from locally.sequence.structured_pruning import (
    BlockCut,
    Cut,
    Network,
    compress,
    load_pruned,
    open_network,
    perplexity,
    save_compressed,
    size_of,
    tokens_per_second,
)
from locally.sequence.structured_pruning.pruned_model import PrunedLlamaConfig
from tests.sequence.pruning_models import FAMILIES, small_model, small_text

# no head at all in the first block, uneven use of key and value heads, even use, and one key and value head gone
HEADS = ([], [0, 1, 3], [1, 3])
UNTOUCHED = list(range(40))
NEURONS = ([1, 5, 7], UNTOUCHED, [])


def cut_like(model, heads=HEADS, neurons=NEURONS) -> tuple[list[BlockCut], torch.nn.Module]:
    """Cuts with the dense weights, and the same model in its dense shape with zeros where something is gone."""
    plan, zeroed = [], copy.deepcopy(model)
    size = open_network(model).head_dim
    for layer, zero, kept_heads, kept_neurons in zip(model.model.layers, zeroed.model.layers, heads, neurons):
        columns = [h * size + i for h in kept_heads for i in range(size)]
        cuts = []
        for output, silent, kept, inputs in (
            (layer.self_attn.o_proj, zero.self_attn.o_proj, kept_heads, columns),
            (layer.mlp.down_proj, zero.mlp.down_proj, kept_neurons, kept_neurons),
        ):
            bias = None if output.bias is None else output.bias.detach()
            cuts.append(Cut(torch.tensor(kept, dtype=torch.long), output.weight.detach()[:, inputs], bias))
            gone = torch.ones(output.in_features, dtype=torch.bool)
            gone[inputs] = False
            silent.weight.data[:, gone] = 0
        plan.append(BlockCut(*cuts))
    return plan, zeroed


def logits(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def through(network: Network, ids: Tensor) -> Tensor:
    hidden = network.embed(ids)
    for b in range(network.depth):
        hidden = network.run(b, network.block(b), hidden)
    return network.logits(hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_is_the_model(family, tmp_path):
    model, ids = small_model(family), small_text()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    for network in (open_network(model), open_network(tmp_path)):
        torch.testing.assert_close(through(network, ids), logits(model, ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_checkpoints_load_and_say_what_the_zeroed_model_says(family, tmp_path):
    model, ids = small_model(family), small_text()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan, zeroed = cut_like(model)
    save_compressed(model, plan, tmp_path / "pruned")
    compress(model, plan).save_pretrained(tmp_path / "again")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=False).eval()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    for small in (compress(model, plan), opened, again, load_pruned(tmp_path / "pruned").model):
        torch.testing.assert_close(logits(small, ids), logits(zeroed, ids), rtol=0, atol=1e-5)
        assert sum(p.numel() for p in small.parameters()) == size_of(model, plan).parameters
    assert perplexity(model, ids, plan=plan) == pytest.approx(perplexity(opened, ids, plan=None), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # a search's block is a twin of the dense one; filling it must not have written into it
    full = [
        BlockCut(*(Cut(c.kept, c.weight * 0, c.bias) for c in cut)) for cut in cut_like(model, [[0, 1, 2, 3]] * 3)[0]
    ]
    compress(model, full)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache_where_the_first_block_has_no_head(family, cache, tmp_path):
    model, ids = small_model(family), small_text(2)
    plan, zeroed = cut_like(model)
    small = compress(model, plan)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    wanted = zeroed.generate(ids, **options)
    assert len(set(wanted[0].tolist())) > 5  # not the same token for ever
    assert torch.equal(small.generate(ids, **options), wanted)


def test_padding_on_the_left():
    model, ids = small_model(), small_text(2)
    plan, zeroed = cut_like(model)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        ours, theirs = (m(ids, attention_mask=mask).logits for m in (compress(model, plan), zeroed))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=0, atol=1e-5)


def test_gradients_reach_a_pruned_model(tmp_path):
    model, ids = small_model(), small_text()
    plan, _ = cut_like(model)
    save_compressed(model, plan, tmp_path / "pruned")
    small = load_pruned(tmp_path / "pruned").model.train()
    small(ids, labels=ids).loss.backward()
    without = {name for name, p in small.named_parameters() if p.grad is None}
    assert without == {"model.layers.0.input_layernorm.weight", "model.layers.2.post_attention_layernorm.weight"}
    assert all(p.grad.isfinite().all() for p in small.parameters() if p.grad is not None)


def test_sizes():
    model = small_model()
    dense = size_of(model)
    assert dense.parameters == sum(p.numel() for p in model.parameters())
    assert (dense.query_heads, dense.kv_heads, dense.neurons) == (12, 6, 120)
    plan, _ = cut_like(model)
    gone = dense - size_of(model, plan)
    assert (gone.query_heads, gone.kv_heads, gone.neurons) == (7, 2, 77)
    assert gone.block_parameters == 24 * 6 * (2 * 7 + 2 * 2) + 3 * 24 * 77
    assert size_of(model, [BlockCut(None, None)] * 3) == dense


def test_speed_is_measured():
    speed = tokens_per_second(small_model(), small_text(1), new_tokens=2, repeats=1)
    assert speed.prefill > 0
    assert speed.decode > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"neurons_per_layer": [1, 2]}, "sizes of 3 layers"),
        ({"neurons_per_layer": None}, "sizes of 3 layers"),
        ({"kv_index_per_layer": [[0, 1], [0], [0]]}, "cannot take"),
        ({"kv_heads_per_layer": [2, 1, 1]}, "cannot take"),
    ],
)
def test_a_configuration_that_contradicts_itself(change, says):
    sizes = {
        "num_hidden_layers": 3,
        "query_heads_per_layer": [1, 1, 1],
        "kv_heads_per_layer": [1, 1, 1],
        "kv_index_per_layer": [[0], [0], [0]],
        "neurons_per_layer": [4, 4, 4],
    }
    with pytest.raises(ValueError, match=says):
        PrunedLlamaConfig(**sizes | change).shapes()


def test_the_configuration_travels_as_json(tmp_path):
    model = small_model("Qwen2")
    plan, _ = cut_like(model)
    save_compressed(model, plan, tmp_path / "pruned")
    config = AutoConfig.from_pretrained(tmp_path / "pruned")
    assert config.model_type == "pruned_qwen2"
    assert config.kv_index_per_layer == [[], [0, 0, 1], [0, 1]]
    assert config.neurons_per_layer == [3, 40, 0]


def test_a_dense_class_refuses_a_pruned_folder(tmp_path):
    model = small_model()
    save_compressed(model, cut_like(model)[0], tmp_path / "pruned")
    with pytest.raises((RuntimeError, ValueError)):
        type(model).from_pretrained(tmp_path / "pruned")


def test_plans_that_do_not_fit():
    model = small_model()
    plan, _ = cut_like(model)
    with pytest.raises(ValueError, match="plan must have 3 entries, one a block, got 2"):
        compress(model, plan[:2])
    mixed = [plan[0], BlockCut(Cut(plan[1].heads.kept, plan[1].heads.weight, torch.zeros(24)), None), plan[2]]
    with pytest.raises(ValueError, match="all blocks an output bias"):
        compress(model, mixed)


def test_nothing_is_left_of_a_checkpoint_that_could_not_be_written(tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match="plan"):
        save_compressed(model, [], tmp_path / "pruned")
    assert list(tmp_path.iterdir()) == []


class TestRefusals:
    """What is said of models and folders that cannot be worked with."""

    def test_other_architectures(self, tmp_path):
        other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=10))
        with pytest.raises(ValueError, match=r"LlamaForCausalLM.*Qwen3ForCausalLM, got GPT2LMHeadModel"):
            open_network(other)
        other.save_pretrained(tmp_path)
        with pytest.raises(BadCheckpoint, match=r"holds GPT2LMHeadModel; supported are LlamaForCausalLM"):
            open_network(tmp_path)

    def test_a_missing_shard(self, tmp_path):
        small_model().save_pretrained(tmp_path, max_shard_size="10KB")
        shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(BadCheckpoint, match=f"{shard.name} is missing"):
            open_network(tmp_path)

    def test_a_truncated_shard(self, tmp_path):
        small_model().save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(BadCheckpoint, match=r"model\.safetensors is not a sound"):
            open_network(tmp_path)

    def test_weights_of_another_shape(self, tmp_path):
        small_model().save_pretrained(tmp_path)
        config = tmp_path / "config.json"
        config.write_text(config.read_text().replace('"intermediate_size": 40', '"intermediate_size": 44'))
        network = open_network(tmp_path)
        with pytest.raises(BadCheckpoint, match=r"gate_proj.*has shape \(40, 24\), not \(44, 24\)"):
            network.block(0)

    def test_pruned_folders_are_not_pruned_again(self, tmp_path):
        model = small_model()
        save_compressed(model, cut_like(model)[0], tmp_path / "pruned")
        with pytest.raises(BadCheckpoint, match="holds PrunedLlamaForCausalLM"):
            open_network(tmp_path / "pruned")
