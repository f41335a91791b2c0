"""`locally prune`: a folder and a text in, a smaller folder out, or one clear sentence."""

import json

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from locally.cli import app
from locally.errors import UsageError
from locally.sequence.structured_pruning import load_pruned
from tests.sequence.pruning_models import small_checkpoint, small_text_file, small_tokenizer

SHORT = ["--iterations", "2", "--generations", "2", "--offspring", "4", "--sequences", "12", "--length", "16"]


@pytest.fixture
def dense(tmp_path):
    return small_checkpoint(tmp_path / "dense", shard="10KB")


@pytest.fixture
def text(tmp_path):
    return small_text_file(tmp_path / "text.txt")


def prune(*words) -> None:
    app(["prune", *map(str, words)], standalone_mode=False)


def refused(*words) -> str:
    with pytest.raises(UsageError) as caught:
        prune(*words)
    return str(caught.value)


def test_a_smaller_checkpoint(dense, text, tmp_path, capsys):
    out = tmp_path / "out"
    prune(dense, "-o", out, "--calibration", text, "--sparsity", 0.5, "--evaluate", text, "--json", *SHORT)
    summary = json.loads(capsys.readouterr().out)
    assert summary["pruned"]["query_heads"] == 6
    assert summary["pruned"]["neurons"] == 60
    assert summary["perplexity"]["dense"] > 1
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == summary["pruned"]["parameters"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out", "text.txt"]  # no work folder is left


@pytest.mark.parametrize("method", ["flap", "layer-drop"])
def test_other_methods_and_words_for_people(dense, text, tmp_path, capsys, method):
    prune(dense, "-o", tmp_path / "out", "--calibration", text, "--method", method, "--evaluate", text, *SHORT)
    said = capsys.readouterr().out
    assert f"{method}, sparsity 0.5" in said
    assert "query heads" in said
    assert "perplexity" in said
    assert load_pruned(tmp_path / "out").tokenizer is not None


def test_over_all_devices(dense, text, tmp_path):
    prune(dense, "-o", tmp_path / "out", "--calibration", text, "--device", "auto", "--work", tmp_path / "work", *SHORT)
    assert (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "work" / "manifest.json").exists()


class Stopped(Exception):
    pass


def stop(*_, **__):
    raise Stopped


def test_what_stopped_is_taken_up_again(dense, text, tmp_path, monkeypatch):
    from locally.sequence.structured_pruning import TyrPruner

    out = tmp_path / "out"
    words = (dense, "-o", out, "--calibration", text, *SHORT)
    with monkeypatch.context() as broken:
        broken.setattr(TyrPruner, "save_pretrained", stop)
        with pytest.raises(Stopped):
            prune(*words)
    assert not out.exists()
    work = tmp_path / ".out.work"
    stamp = (work / "iteration_0" / "search.json").stat().st_mtime_ns
    assert "another sparsity" in refused(*words, "--sparsity", 0.25)
    assert (work / "iteration_0" / "search.json").stat().st_mtime_ns == stamp
    prune(*words)
    assert load_pruned(out).model.config.neurons_per_layer
    assert not work.exists()


class TestRefusals:
    """One sentence each, and nothing under the output's name."""

    @pytest.fixture(autouse=True)
    def nothing_written(self, tmp_path):
        yield
        assert not (tmp_path / "out").exists()

    def test_sparsity(self, dense, text, tmp_path):
        for sparsity in (1.0, -0.1):
            said = refused(dense, "-o", tmp_path / "out", "--calibration", text, "--sparsity", sparsity)
            assert said == f"--sparsity must lie in [0, 1), got {sparsity}"

    def test_method(self, dense, text, tmp_path):
        said = refused(dense, "-o", tmp_path / "out", "--calibration", text, "--method", "best")
        assert "--method must be one of tyr, magnitude" in said

    def test_folder(self, text, tmp_path):
        assert "there is no folder" in refused(tmp_path / "no", "-o", tmp_path / "out", "--calibration", text)

    def test_missing_shard(self, dense, text, tmp_path):
        sorted(dense.glob("model-*"))[0].unlink()
        assert "is missing" in refused(dense, "-o", tmp_path / "out", "--calibration", text)

    def test_corrupt_shard(self, dense, text, tmp_path):
        sorted(dense.glob("model-*"))[0].write_bytes(b"not tensors")
        assert "not a sound safetensors file" in refused(dense, "-o", tmp_path / "out", "--calibration", text)

    def test_architecture(self, text, tmp_path):
        GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=10)).save_pretrained(tmp_path / "gpt2")
        said = refused(tmp_path / "gpt2", "-o", tmp_path / "out", "--calibration", text)
        assert "GPT2LMHeadModel; supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM" in said

    def test_tokenizer(self, dense, text, tmp_path):
        small_tokenizer(60).save_pretrained(dense)
        assert "knows 60 tokens, its model only 40" in refused(dense, "-o", tmp_path / "out", "--calibration", text)
        for file in dense.glob("tokenizer*"):
            file.unlink()
        assert "has no tokenizer" in refused(dense, "-o", tmp_path / "out", "--calibration", text)

    def test_text(self, dense, text, tmp_path):
        said = refused(dense, "-o", tmp_path / "out", "--calibration", text)
        assert "is too short: it has 192 tokens, and 128 sequences of 512 take 65536" in said
        assert "cannot be read" in refused(dense, "-o", tmp_path / "out", "--calibration", tmp_path / "no.txt")
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        assert "UTF-8" in refused(dense, "-o", tmp_path / "out", "--calibration", tmp_path / "binary")
        long = refused(dense, "-o", tmp_path / "out", "--calibration", text, "--length", 96, "--sequences", 2)
        assert "at most the model's 64 positions" in long


def test_an_output_that_is_there_is_kept(dense, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    assert "exists already and is not empty" in refused(dense, "-o", out, "--calibration", text)
    assert (out / "mine").read_text() == "precious"
    prune(dense, "-o", out, "--calibration", text, "--method", "magnitude", "--overwrite", *SHORT)
    assert not (out / "mine").exists()
