"""Converted models: what a conversion keeps, decoding against one pass, masks, folders, refusals."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from locally.sequence.checkpoints import BadCheckpoint
from locally.sequence.gated_linearization import LigerCache, LigerConfig, cache_bytes, linearize, load

SIZES = {
    "vocab_size": 33,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, scaled rotation": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama, tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 10}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
}
CONVERSIONS = {
    "gla": {},
    "hgrn2": {"variant": "hgrn2"},
    "gsa": {"variant": "gsa", "slots": 4},
    "gates from queries": {"gate_source": "q"},
    "hybrid": {"softmax_layers": (1,)},
    "hybrid, last": {"softmax_layers": (2,)},
    "recurrence alone": {"alpha": 1.0, "beta": 0.0},
    "window alone": {"alpha": 0.0, "beta": 1.0},
    "window of one": {"window": 1},
}


def original(family="llama", seed=0, **changes):
    model, config, own = FAMILIES[family]
    torch.manual_seed(seed)
    made = model(config(**SIZES | own | changes)).eval()
    with torch.no_grad():  # the default of 0.02 leaves attention nearly uniform
        for name, p in made.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                p.normal_(std=0.3)
            elif name.endswith("bias"):
                p.normal_(std=0.5)
    return made


def tokens(T=40, batch=2, seed=0):
    return torch.randint(2, 33, (batch, T), generator=torch.Generator().manual_seed(seed))


def converted(family="llama", **settings):
    return linearize(original(family), LigerConfig(**{"window": 8, "chunk_size": 16} | settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_over_everything_is_the_original(family):
    model = original(family, **({"sliding_window": None} if family == "mistral" else {}))
    if family == "qwen2":
        model = original(family, use_sliding_window=False)
    same = linearize(model, LigerConfig(window=40, alpha=0.0, beta=1.0))
    x = tokens()
    torch.testing.assert_close(same(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversion_adds_nothing(family):
    model = original(family)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    new = linearize(model, LigerConfig())
    assert {n: x.shape for n, x in new.state_dict().items()} == {n: x.shape for n, x in before.items()}
    assert new.num_parameters() == model.num_parameters()
    with torch.no_grad():
        for p in new.parameters():
            p.zero_()
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert model.config.model_type == family.split(",")[0]


def test_inplace_shares_the_parameters():
    model = original("llama, tied")
    new = linearize(model, LigerConfig(), inplace=True)
    theirs = dict(model.named_parameters())
    assert all(p is theirs[name] for name, p in new.named_parameters())
    assert new.lm_head.weight is new.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("family", "conversion"),
    [(f, c) for f in ("llama", "qwen2") for c in CONVERSIONS]
    + [(f, c) for f in ("mistral", "qwen3") for c in ("gla", "hybrid", "hybrid, last")],
)
def test_prefill_and_decoding_are_one_pass(family, conversion):
    model = converted(family, **CONVERSIONS[conversion])
    x = tokens()
    whole = model(x, use_cache=False).logits
    cache = LigerCache(model.config)
    ends = (5, 20, *range(21, 41))  # inside the window, a chunk later, token by token
    pieces = [model(x[:, start:end], cache=cache).logits for start, end in zip((0, *ends), ends)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=2e-4)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("conversion", ["gla", "hgrn2", "gsa", "hybrid", "gates from queries"])
def test_left_padding_changes_nothing(conversion):
    model = converted(**CONVERSIONS[conversion])
    x = tokens(30, batch=1)
    alone = model.generate(x, max_new_tokens=12, do_sample=False)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), x], 1)
    both = torch.cat([padded, tokens(37, batch=1, seed=1)])
    mask = torch.ones_like(both)
    mask[0, :7] = 0
    together = model.generate(both, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(together[0, 7:], alone[0])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(both, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[0, 7:], model(x, use_cache=False).logits[0], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("conversion", ["gla", "hgrn2", "gsa"])
def test_padding_that_comes_token_by_token_is_not_seen(conversion):
    model = converted(**CONVERSIONS[conversion])
    x = tokens(20, batch=1)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), x], 1)
    mask = (torch.arange(25) >= 5).long()[None]
    cache = LigerCache(model.config)
    steps = [model(padded[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache).logits for t in range(25)]
    wanted = model(x, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps[5:], 1), wanted, rtol=1e-3, atol=2e-4)
    assert all(bool(step.isfinite().all()) for step in steps)


@pytest.mark.parametrize("conversion", ["gla", "gsa", "hybrid"])
def test_generation_with_and_without_cache_agree(conversion):
    model = converted(**CONVERSIONS[conversion])
    x = tokens(20)
    mask = torch.ones_like(x)
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        cached = model.generate(x, attention_mask=mask, max_new_tokens=15, **options)
        assert torch.equal(
            cached, model.generate(x, attention_mask=mask, max_new_tokens=15, use_cache=False, **options)
        )


@pytest.mark.parametrize("conversion", ["gla", "hgrn2", "gsa", "recurrence alone"])
def test_memory_does_not_grow(conversion):
    model = converted(**CONVERSIONS[conversion])
    cache = LigerCache(model.config)
    sizes = []
    with torch.no_grad():
        for T in (16, 1024, 16384, 1):
            model(tokens(T, batch=1), cache=cache, logits_to_keep=1)
            sizes.append(cache_bytes(cache))
    assert len(set(sizes)) == 1
    # three layers: state of two key heads in float32, ring of eight keys and values, one flag each
    state = {"gla": 64, "hgrn2": 64, "gsa": 64, "recurrence alone": 64}[conversion] * 2 * 4
    ring = 0 if conversion == "recurrence alone" else 8 * (2 * 2 * 8 * 4 + 1)
    assert sizes[0] == 3 * (state + ring)


def test_caches_can_be_rearranged():
    model = converted("llama")
    x = tokens(20)
    cache = LigerCache(model.config)
    model(x, cache=cache)
    wide = copy.deepcopy(cache)
    wide.batch_repeat_interleave(2)
    order = torch.tensor([3, 0])
    wide.reorder_cache(order)  # second text, first text
    swapped = model(x[:, :1].flip(0), cache=wide).logits.flip(0)
    torch.testing.assert_close(swapped, model(x[:, :1], cache=cache).logits)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[0].state[0].shape[0] == 1
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(x, cache=cache).logits, model(x, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.layers[0].crop(-1)


def test_half_precision_keeps_its_state_in_single():
    model = converted("llama").to(torch.bfloat16)
    x = tokens()
    cache = LigerCache(model.config)
    for start in range(0, 40, 10):
        last = model(x[:, start : start + 10], cache=cache).logits
    assert cache.layers[0].state[0].dtype == torch.float32
    assert cache.layers[0].keys.dtype == torch.bfloat16
    whole = model(x, use_cache=False).logits[:, 30:]
    assert bool((last - whole).abs().max() < 0.05 * whole.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_comes_back(family, tmp_path):
    model = converted(family, softmax_layers=(1,), variant="gsa", slots=4)
    model.save_pretrained(tmp_path / "new")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new", trust_remote_code=False).eval()
    assert type(again) is type(model)
    x = tokens()
    torch.testing.assert_close(again(x).logits, model(x).logits)
    torch.testing.assert_close(load(tmp_path / "new").model(x).logits, model(x).logits)
    held = json.loads((tmp_path / "new" / "config.json").read_text())
    assert held["liger"]["softmax_layers"] == [1]
    assert held["model_type"] == f"liger_{family.split(',')[0]}"


def test_a_fresh_process_loads_it_after_one_import(tmp_path):
    model = converted()
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, locally.sequence.gated_linearization; from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(m).__name__, float(m(torch.arange(2, 30)[None]).logits.sum()))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    name, value = out.split()[-2:]
    assert name == "LigerLlamaForCausalLM"
    assert float(value) == pytest.approx(model(torch.arange(2, 30)[None]).logits.sum().item(), rel=1e-5, abs=1e-3)


def test_sharded_folders_convert_and_damaged_ones_are_named(tmp_path):
    model = original()
    source = tmp_path / "source"
    model.save_pretrained(source, max_shard_size="20KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 2
    x = tokens()
    wanted = linearize(model, LigerConfig(window=8))(x).logits
    torch.testing.assert_close(linearize(source, LigerConfig(window=8))(x).logits, wanted)

    whole = shards[1].read_bytes()
    shards[1].unlink()  # a new file: models that were read map the old one
    shards[1].write_bytes(whole[:100])
    with pytest.raises(BadCheckpoint, match=shards[1].name):
        linearize(source)
    shards[1].unlink()
    with pytest.raises(BadCheckpoint, match=f"{shards[1].name} is missing"):
        linearize(source)
    shards[1].write_bytes(whole)
    torch.testing.assert_close(linearize(source, LigerConfig(window=8))(x).logits, wanted)


def test_other_architectures_are_refused_by_name(tmp_path, without_shape_checks):
    other = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*got GPT2LMHeadModel"):
        linearize(other)
    other.save_pretrained(tmp_path)
    with pytest.raises(BadCheckpoint, match=r"GPT2LMHeadModel; supported are .*Qwen3ForCausalLM"):
        linearize(tmp_path)
    with pytest.raises(BadCheckpoint, match="no folder"):
        linearize(tmp_path / "absent")
    with pytest.raises(TypeError, match="folder"):
        linearize(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LigerLlamaForCausalLM"):
        linearize(converted())


def test_what_a_conversion_cannot_carry_over_is_refused():
    with pytest.raises(ValueError, match="attention_dropout"):
        linearize(original(attention_dropout=0.1))
    with pytest.raises(ValueError, match="names layer 3"):
        linearize(original(), LigerConfig(softmax_layers=(3,)))


def test_what_a_converted_model_cannot_do_is_refused():
    model, x = converted(), tokens(5)
    with pytest.raises(ValueError, match="output_attentions"):
        model(x, output_attentions=True)
    with pytest.raises(ValueError, match="LigerCache, got DynamicCache"):
        model(x, cache=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="attention_mask"):
        model(x, attention_mask=torch.ones(2, 1, 5, 5))


def test_training_reaches_every_projection_and_makes_no_cache():
    model = converted().train()
    x = tokens()
    out = model(x, labels=x)
    assert out.cache is None
    out.loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
    model.gradient_checkpointing_enable()
    before = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    model(x, labels=x).loss.backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.k_proj.weight.grad, before, rtol=1e-3, atol=1e-6)
