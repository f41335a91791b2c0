"""LLaDA and Dream stacks: both sides are seen, caches are exact at first, folders are read, damage is named; text."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from locally.sequence.checkpoints import BadCheckpoint
from locally.sequence.diffusion_decoding import (
    DiffusionConfig,
    Kind,
    LocalLeap,
    Threshold,
    build,
    complete,
    diffusion_generate,
    load,
    save,
)
from locally.sequence.diffusion_decoding.bidirectional import named_weights
from locally.sequence.diffusion_decoding.text import readable

transformers = pytest.importorskip("transformers")

TOKENS = {"vocab_size": 13, "mask_token_id": 2, "eos_token_id": 1}
LLADA = {
    "architectures": ["LLaDAModelLM"],
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "max_sequence_length": 64,
    **TOKENS,
}
DREAM = {
    "architectures": ["DreamModel"],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    **TOKENS,
}


@pytest.fixture(params=[LLADA, DREAM], ids=["llada", "dream"])
def model(request):
    torch.manual_seed(0)
    made = build(request.param).eval()
    for p in made.parameters():  # far from uniform predictions, and biases that are not zero
        torch.nn.init.normal_(p, std=0.3)
    return made


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "<eos>", "[MASK]", *"abcdefghij"]
    words_only = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_only, unk_token="[UNK]", eos_token="<eos>", mask_token="[MASK]"
    )


def ids(rows=3, n=8, seed=1):
    return torch.randint(3, 13, (rows, n), generator=torch.Generator().manual_seed(seed))


def test_attention_is_the_stacks_own_without_the_causal_mask(model):
    """Against Transformers' eager attention, given an explicit mask that hides nothing."""
    config = type(model.stack.config).from_dict(model.stack.config.to_dict())
    config._attn_implementation = "eager"
    plain = type(model.stack)(config).eval()
    plain.load_state_dict(model.stack.state_dict())
    nothing_hidden = torch.zeros(1, 1, 8, 8)
    wanted = plain(input_ids=ids(), attention_mask=nothing_hidden, use_cache=False).logits
    torch.testing.assert_close(model(ids()), wanted, atol=1e-5, rtol=1e-4)


def test_padding_on_the_left_changes_nothing(model):
    padded = torch.cat([torch.full((3, 4), 1), ids()], 1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 8, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded, mask)[:, 4:], model(ids()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [slice(3, 6), slice(3, 8), slice(0, 8)])
@pytest.mark.parametrize("padding", [0, 2])
def test_a_cache_is_exact_until_the_window_changes(model, window, padding):
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1:, :padding] = 0
    mask = mask if padding else None
    at = torch.arange(window.start, window.stop)
    whole = model(ids(), mask)[:, at]
    cache = model.new_cache(window)
    torch.testing.assert_close(model.logits_at(ids(), at, mask, cache), whole)  # fills it
    torch.testing.assert_close(model.logits_at(ids(), at, mask, cache), whole, atol=1e-5, rtol=1e-4)
    changed = ids()
    changed[:, 4] = 2 + (changed[:, 4] - 1) % 11
    stale = model.logits_at(changed, at, mask, cache)
    fresh = model(changed, mask)[:, at]
    if window == slice(0, 8):  # nothing is kept
        torch.testing.assert_close(stale, fresh, atol=1e-5, rtol=1e-4)
    else:
        assert (stale - fresh).abs().max() > 1e-3
    cache.keep(torch.tensor([False, True, True]))
    left = model.logits_at(changed[1:], at, None if mask is None else mask[1:], cache)
    torch.testing.assert_close(left, stale[1:], atol=1e-5, rtol=1e-4)


def test_a_cache_computes_no_more_than_its_window(model):
    lengths = []
    model.stack.model.layers[0].mlp.register_forward_hook(lambda m, inputs, out: lengths.append(inputs[0].shape[1]))
    config = DiffusionConfig(16, 8, LocalLeap(0.5, 0.3, 2))
    shift = model.logits_shift
    widths = {None: [24], "prefix": [24, 16 + shift, 8 + shift], "dual": [24, 8 + shift]}
    for cache, wanted in widths.items():
        lengths.clear()
        out = diffusion_generate(model, ids(), replace(config, cache=cache))
        assert sorted(set(lengths), reverse=True) == wanted
        assert lengths.count(24) >= 2  # both blocks begin with the whole sequence
        assert len(lengths) == out.forward_calls


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_with_a_cache_batches_are_still_their_rows(model, cache):
    config = DiffusionConfig(16, 8, LocalLeap(0.5, 0.3, 2), cache=cache)
    together = diffusion_generate(model, ids(), config)
    for r in range(3):
        alone = diffusion_generate(model, ids()[r : r + 1], config)
        assert torch.equal(together.sequences[r], alone.sequences[0])
        assert together.nfe[r] == alone.nfe[0]


def test_one_block_and_a_prefix_cache_differ_only_by_the_prompts_view(model):
    """With one block and no prompt there is no prefix: the cache keeps nothing, and nothing may change."""
    empty = torch.empty(2, 0, dtype=torch.long)
    config = DiffusionConfig(16, 16, Threshold(0.5))
    plain = diffusion_generate(model, empty, config)
    assert torch.equal(plain.sequences, diffusion_generate(model, empty, replace(config, cache="prefix")).sequences)


def test_the_dream_family_reads_to_the_left():
    model = build(DREAM).eval()
    assert model.logits_shift == 1
    seen = []

    def unshifted(x):
        logits = model(x)
        seen.append(logits)
        return torch.cat([logits[:, :1], logits[:, :-1]], 1)

    config = DiffusionConfig(8, 8, LocalLeap(0.3, 0.2, 2), mask_token_id=2)
    wanted = diffusion_generate(unshifted, ids(), config)
    assert torch.equal(diffusion_generate(model, ids(), config).sequences, wanted.sequences)


def test_a_folder_gives_the_model_back(model, tokenizer, tmp_path):
    save(model, tmp_path / "m", tokenizer=tokenizer)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    name = {
        "LLaDAModelLM": "model.transformer.blocks.1.ff_out.weight",
        "DreamModel": "model.layers.1.mlp.down_proj.weight",
    }
    assert torch.equal(stored[name[model.family]], model.stack.model.layers[1].mlp.down_proj.weight)
    read = load(tmp_path / "m")
    assert (read.kind, read.mask_token_id, read.eos_token_id) == (Kind.DIFFUSION, 2, 1)
    assert torch.equal(read.model(ids()), model(ids()))
    assert not read.model.training
    half = load(tmp_path / "m", dtype=torch.bfloat16)
    assert half.model(ids()).dtype == torch.bfloat16
    with pytest.raises(BadCheckpoint, match="exists already"):
        save(model, tmp_path / "m")


def test_published_llada_names_are_read_from_shards(tmp_path):
    """The layout of a published checkpoint: an index, shards, weights tied or not, switches of the configuration."""
    model = build(LLADA)
    names = dict(named_weights(model))
    assert {n.rsplit(".", 1)[0] for n in names if ".blocks." not in n} == {
        "model.transformer.wte",
        "model.transformer.ln_f",
        "model.transformer.ff_out",
    }
    block = {"q_proj", "k_proj", "v_proj", "attn_out", "attn_norm", "ff_norm", "ff_proj", "up_proj", "ff_out"}
    assert {n.split(".")[4] for n in names if ".blocks.0." in n} == block
    folder = sharded(tmp_path / "m", LLADA | {"rope_theta": 500000.0, "block_type": "llama", "alibi": False}, names)
    read = load(folder).model
    assert read.stack.config.rope_parameters["rope_theta"] == 500000.0
    tied = {n: t for n, t in names.items() if n != "model.transformer.ff_out.weight"}
    read = load(sharded(tmp_path / "tied", LLADA | {"weight_tying": True}, tied)).model
    assert torch.equal(read.stack.lm_head.weight, names["model.transformer.wte.weight"])


def sharded(folder, config, weights):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    places = {}
    for i, part in enumerate((list(weights)[:5], list(weights)[5:])):
        save_file({n: weights[n].clone() for n in part}, folder / f"part-{i}.safetensors")
        places |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_damage_is_named(tmp_path, tokenizer):
    names = dict(named_weights(build(LLADA)))

    def refuses(message, config=LLADA, weights=names, damage=lambda folder: None):
        folder = sharded(tmp_path / str(len(list(tmp_path.iterdir()))), config, weights)
        damage(folder)
        with pytest.raises(BadCheckpoint, match=message):
            load(folder)

    def with_tokenizer(folder):
        tokenizer.save_pretrained(folder)

    refuses("part-1.safetensors is missing", damage=lambda f: (f / "part-1.safetensors").unlink())
    refuses("part-0.safetensors is not a sound", damage=lambda f: (f / "part-0.safetensors").write_bytes(b"\x01" * 40))
    refuses("holds no tensor model.transformer.ln_f", weights={n: t for n, t in names.items() if "ln_f" not in n})
    short = names | {"model.transformer.ln_f.weight": torch.ones(31)}
    refuses(r"ln_f.weight must have shape \(32,\), got \(31,\)", weights=short)
    refuses("mask_token_id is not in the configuration", {**LLADA, "mask_token_id": None})
    refuses("mask_token_id must be below 13", {**LLADA, "mask_token_id": 13})
    refuses("n_layers is not in the configuration", {n: v for n, v in LLADA.items() if n != "n_layers"})
    refuses("alibi must be False in a LLaDA configuration", {**LLADA, "alibi": True})
    small = {n: t[:11] if t.shape[0] == 13 else t for n, t in names.items()}
    refuses("tokenizer of .* knows 13 tokens, its model only 11", {**LLADA, "vocab_size": 11}, small, with_tokenizer)
    refuses("LLaDAMoEModelLM; supported are LLaDAModelLM, DreamModel", {**LLADA, "architectures": ["LLaDAMoEModelLM"]})
    with pytest.raises(BadCheckpoint, match="there is no folder"):
        load(tmp_path / "nowhere")


def test_dreams_tokenizer_is_read_without_its_code(tmp_path):
    model = build({**DREAM, "mask_token_id": 9, "eos_token_id": 8})
    save(model, tmp_path / "dream")
    vocabulary = {c: i for i, c in enumerate("abcdefĠ")} | {"ab": 7}
    (tmp_path / "dream" / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "dream" / "merges.txt").write_text("#version: 0.2\na b\n")
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    added = {"8": plain | {"content": "<|endoftext|>"}, "9": plain | {"content": "<|mask|>"}}
    remote = {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.X", None]}}
    said = remote | {"mask_token": "<|mask|>", "eos_token": "<|endoftext|>", "added_tokens_decoder": added}
    (tmp_path / "dream" / "tokenizer_config.json").write_text(json.dumps(said))
    (tmp_path / "dream" / "tokenization_dream.py").write_text("raise SystemExit('code of a checkpoint was run')")
    assert load(tmp_path / "dream").tokenizer("abf<|mask|>c")["input_ids"] == [7, 5, 9, 2]


def small_bert():
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=13, max_position_embeddings=40, **sizes))


def test_other_masked_models_take_their_mask_from_the_tokenizer(tmp_path, tokenizer):
    small_bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(BadCheckpoint, match="names no mask token"):
        load(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    read = load(tmp_path / "bert")
    assert (read.kind, read.mask_token_id) == (Kind.MASKED, 2)
    prompts = list(enumerate(["a b", "c d", "e f g", "a b"]))
    config = DiffusionConfig(8, 4, LocalLeap(0.3, 0.2, 2))
    together = list(complete(read, prompts, config, batch_size=4))
    alone = [next(complete(read, [p], config)) for p in prompts]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.index for a in together] == [0, 1, 2, 3]


def test_text_is_the_decoded_response(model, tokenizer, tmp_path):
    save(model, tmp_path / "m", tokenizer=tokenizer)
    read = load(tmp_path / "m")
    config = DiffusionConfig(12, 4, LocalLeap(0.5, 0.3, 2), early_stop=True)
    prompts = [(0, "a b c"), (7, "d e f g h")]
    wanted = diffusion_generate(model, torch.tensor([[3, 4, 5]]), config).responses[0].tolist()
    wanted = wanted[: wanted.index(1)] if 1 in wanted else wanted
    told = []
    first, second = complete(read, prompts, config, on_text=told.append)
    assert first.text == tokenizer.decode(wanted, skip_special_tokens=True)
    assert "".join(told) == first.text + second.text
    shares = []
    together = list(complete(read, prompts, config, batch_size=2, on_progress=shares.append))  # padded on the left
    assert shares == sorted(shares)
    assert len(set(shares)) > 2
    assert shares[-1] == 1
    assert [a.text for a in together] == [first.text, second.text]
    assert [a.calls for a in together] == [first.calls, second.calls]


def test_a_stop_string_ends_the_text_before_it(model, tokenizer, tmp_path):
    save(model, tmp_path / "m", tokenizer=tokenizer)
    read = load(tmp_path / "m")
    config = DiffusionConfig(24, 4, LocalLeap(0.5, 0.3, 2))
    (whole,) = complete(read, [(0, "a b c")], config)
    letters = whole.text.split()
    mark = " ".join(letters[4:6])
    told = []
    (cut,) = complete(read, [(0, "a b c")], config, stop=[mark], on_text=told.append)
    assert cut.text == whole.text[: whole.text.index(mark)]
    assert "".join(told) == cut.text
    assert cut.status == "stop sequence"
    assert cut.calls < whole.calls


def test_special_tokens_can_end_a_text(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["a", "b", "[UNK]", "c", "<eos>", "d"])
    assert readable(tokenizer, ids, (), 1) == "a b c"
    assert readable(tokenizer, ids, ("[UNK]",), 1) == "a b"
    assert readable(tokenizer, ids, ("b",), 1) == "a "
    assert readable(tokenizer, ids, ("nothing of the kind",), None) == "a b c d"


def test_causal_models_go_through_transformers(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=13, max_position_embeddings=40, eos_token_id=1, **sizes)
    )
    made.save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    read = load(tmp_path / "causal")
    assert read.kind is Kind.CAUSAL
    prompts = [(0, "a b c"), (1, "d e")]
    told = []
    alone = list(complete(read, prompts, DiffusionConfig(8, 8), on_text=told.append))
    assert "".join(told) == alone[0].text + alone[1].text
    for answer, (_, prompt) in zip(alone, prompts):
        x = torch.tensor([tokenizer(prompt)["input_ids"]])
        for _ in range(answer.tokens):
            x = torch.cat([x, made.eval()(x).logits[:, -1:].argmax(-1)], 1)
        wanted = x[0, len(tokenizer(prompt)["input_ids"]) :]
        assert answer.text == tokenizer.decode(wanted, skip_special_tokens=True)
    together = list(complete(read, prompts, DiffusionConfig(8, 8), batch_size=2))
    assert [a.text for a in together] == [a.text for a in alone]
    drawn = [
        list(complete(read, prompts, DiffusionConfig(8, 8, temperature=2.0), seed=3, batch_size=b)) for b in (1, 2)
    ]
    assert [a.text for a in drawn[0]] == [a.text for a in drawn[1]]
    assert [a.text for a in drawn[0]] != [a.text for a in alone]


def test_prompts_are_checked_before_any_work(tokenizer, tmp_path):
    model = build(LLADA)
    save(model, tmp_path / "m", tokenizer=tokenizer)
    read = load(tmp_path / "m")
    long = " ".join("abcdefghij" * 6)
    with pytest.raises(ValueError, match=r"prompt 2 has 60 tokens: .* at most 64 tokens, got 68"):
        complete(read, [(0, "a"), (1, long)], DiffusionConfig(8, 8))
    with pytest.raises(ValueError, match="no chat template"):
        complete(read, [(0, "a")], DiffusionConfig(8, 8), chat=True)
    with pytest.raises(ValueError, match="prompt must not be empty"):
        complete(read, [(0, " ")], DiffusionConfig(8, 8))
    with pytest.raises(ValueError, match="stop must not hold"):
        complete(read, [(0, "a")], DiffusionConfig(8, 8), stop=[""])
    with pytest.raises(ValueError, match="has no tokenizer"):
        complete(replace(read, tokenizer=None), [(0, "a")], DiffusionConfig(8, 8))
    tokenizer_chat = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    tokenizer_chat.chat_template = "{% for m in messages %}g {{ m.content }} h{% endfor %}"
    (answer,) = complete(replace(read, tokenizer=tokenizer_chat), [(0, "a b")], DiffusionConfig(8, 8), chat=True)
    (same,) = complete(read, [(0, "g a b h")], DiffusionConfig(8, 8))
    assert answer.text == same.text


def test_unknown_configurations_are_named():
    with pytest.raises(ValueError, match="architectures must name one of LLaDAModelLM, DreamModel"):
        build({"architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(ValueError, match="architectures"):
        build({})
