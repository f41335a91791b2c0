"""Checkpoints in local folders: what is read, what is refused and in which words, and that nothing is half written."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from locally.sequence.checkpoints import BadCheckpoint, open_weights, read, writing

transformers = pytest.importorskip("transformers", reason="needs the extra llm")


def tiny() -> "transformers.LlamaForCausalLM":
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    )


def word_tokenizer(words: int) -> "transformers.PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, models, pre_tokenizers

    engine = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=engine, unk_token="w0")


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_reads_one_and_many_shards(tmp_path, shard_size):
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    word_tokenizer(64).save_pretrained(tmp_path)
    back = read(tmp_path)
    assert back.tokenizer("w3 w5")["input_ids"] == [3, 5]
    assert not back.model.training
    ids = torch.arange(10)[None]
    torch.testing.assert_close(back.model(ids).logits, model.eval()(ids).logits)
    weights = open_weights(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(weights[name], model.state_dict()[name])
    assert (len(set(weights.files.values())) > 1) == (shard_size == "20KB")


def test_a_folder_without_a_tokenizer_has_none(folder):
    assert read(folder, dtype=torch.float64).tokenizer is None
    assert read(folder, dtype=torch.float64).model.dtype == torch.float64


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(BadCheckpoint, match="there is no folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        read(tmp_path / "empty")
    with pytest.raises(BadCheckpoint, match="holds LlamaForCausalLM; supported are GPT2LMHeadModel"):
        read(folder, architectures=("GPT2LMHeadModel",))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match="is pickled and not read"):
        read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="is not JSON"):
        read(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(BadCheckpoint, match="must hold an object"):
        read(folder)


def test_damaged_shards_are_named(tmp_path):
    tiny().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadCheckpoint, match=f"{shards[1].name} is not a sound safetensors file"):
        read(tmp_path)
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(BadCheckpoint, match=f"{shards[1].name} lacks"):
        read(tmp_path)
    shards[1].unlink()
    with pytest.raises(BadCheckpoint, match=f"{shards[1].name} is missing"):
        read(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(BadCheckpoint, match="must map tensors to files of its folder"):
        read(tmp_path)
    index.write_text("{}")
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        read(tmp_path)


def test_weights_that_do_not_fit_the_configuration_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(BadCheckpoint, match=r"lacks the weights model\.layers\.2"):
        read(folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(BadCheckpoint, match="cannot be loaded"):
        read(folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    word_tokenizer(65).save_pretrained(folder)
    with pytest.raises(BadCheckpoint, match="knows 65 tokens, its model only 64"):
        read(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"tokenizer of .* cannot be read"):
        read(folder)


def test_no_code_of_a_checkpoint_runs(folder):
    config = json.loads((folder / "config.json").read_text())
    hostile = config | {"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "strange.Strange"}}
    (folder / "config.json").write_text(json.dumps(hostile))
    (folder / "strange.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    with pytest.raises(BadCheckpoint):
        read(folder)
    assert not (folder / "ran").exists()


def test_an_output_folder_is_whole_or_absent(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError), writing(out) as beside:
        (beside / "half" / "deeper").touch()
    assert list(tmp_path.iterdir()) == []
    with writing(out) as beside:
        (beside / "first").touch()
        assert not out.exists()
    with pytest.raises(BadCheckpoint, match="exists already"), writing(out):
        pass
    with writing(out, overwrite=True) as beside:
        (beside / "second").touch()
        with pytest.raises(BadCheckpoint, match="another process"), writing(out, overwrite=True):
            pass
    assert [p.name for p in out.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(BadCheckpoint, match="it is a file"), writing(out / "second"):
        pass


def test_a_kill_leaves_nothing_under_the_final_name(tmp_path):
    program = (
        "import sys, time; from locally.sequence.checkpoints import writing\n"
        f"with writing({str(tmp_path / 'out')!r}) as beside:\n"
        "    (beside / 'half').touch(); print('in', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    with writing(tmp_path / "out") as beside:
        (beside / "whole").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
