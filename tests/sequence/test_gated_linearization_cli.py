"""`locally linearize`: a folder in, a folder out; killed, resumed, refused."""

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from locally.cli.linearize import linearize
from locally.errors import UsageError
from locally.sequence.gated_linearization import load
from tests.sequence.test_gated_linearization_models import original
from tests.sequence.test_gated_linearization_recovery import tokenizer


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    original(vocab_size=40).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc abd. " * 30)
    return path


OPTIONS = {"length": 16, "batch_size": 2, "accumulation": 1, "evaluate_every": 5, "save_every": 3, "window": 8}


def convert(folder, output, **options):
    """As typer calls it, with its defaults filled in."""
    defaults = {
        name: p.default for name, p in inspect.signature(linearize).parameters.items() if p.default is not p.empty
    }
    linearize(folder, **defaults | OPTIONS | {"output": output} | options)


def left_behind(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_a_folder_in_a_folder_out(source, text, tmp_path, capsys):
    convert(source, tmp_path / "out", data=text)
    said = capsys.readouterr().err
    assert "none of them new" in said
    assert "step 14/14, loss" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(model).__name__ == "LigerLlamaForCausalLM"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc")["input_ids"] == tokenizer()("abc")["input_ids"]
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {n: x.shape for n, x in before.items()} == {n: x.shape for n, x in after.items()}
    assert {n.split(".")[-2] for n in before if not torch.equal(before[n], after[n])} == {"q_proj", "k_proj", "v_proj"}
    assert left_behind(tmp_path) == []


def test_without_data_weights_stay_as_they_are(source, tmp_path):
    convert(source, tmp_path / "out", variant="gsa", slots=4, softmax_layers="0, 2", alpha=0.25)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    held = load(tmp_path / "out").model.config.liger
    assert (held["slots"], held["softmax_layers"], held["alpha"], held["beta"]) == (4, [0, 2], 0.25, 0.75)


def test_a_killed_run_goes_on_to_the_same_weights(source, text, tmp_path):
    convert(source, tmp_path / "whole", data=text, epochs=8)
    command = [sys.executable, "-m", "locally.cli", "linearize", str(source), "--output", str(tmp_path / "out")]
    command += ["--data", str(text), "--epochs", "8"]
    command += [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    state = tmp_path / ".out.recovery.safetensors"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while not state.exists() and running.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    said = running.communicate()[1]
    assert running.returncode == -signal.SIGKILL, said
    assert not (tmp_path / "out").exists()
    assert state.exists(), said
    convert(source, tmp_path / "out", data=text, epochs=8)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert left_behind(tmp_path) == []


def test_an_interrupt_keeps_the_state_and_other_settings_are_refused(source, text, tmp_path, monkeypatch):
    module = importlib.import_module("locally.cli.linearize")  # the package has a function of that name
    said = []

    def say(message):
        said.append(message)
        if message.startswith("step 6/"):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_say", say)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", data=text)
    assert left_behind(tmp_path) == [".out.recovery.safetensors"]
    with pytest.raises(UsageError, match="another run: schedule"):
        convert(source, tmp_path / "out", data=text, lr=5e-3)
    monkeypatch.setattr(module, "_say", said.append)
    convert(source, tmp_path / "out", data=text)
    assert any(message.startswith("resumed after step 3") for message in said)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "rnn"}, "variant must be one of"),
        ({"window": 0}, "window"),
        ({"alpha": 1.5}, "beta"),
        ({"softmax_layers": "a"}, "--softmax-layers"),
        ({"softmax_layers": "9"}, "names layer 9"),
        ({"lr": 0.0}, "lr"),
        ({"device": "nowhere"}, "--device nowhere"),
        ({"length": 5000}, "fewer than one sequence"),
    ],
)
def test_bad_options_are_named_and_leave_nothing(source, text, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        convert(source, tmp_path / "out", data=text, **options)
    assert not (tmp_path / "out").exists()
    assert left_behind(tmp_path) == []


def test_bad_folders_are_named_and_leave_nothing(source, text, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        convert(source, tmp_path / "taken")
    with pytest.raises(UsageError, match="no folder"):
        convert(tmp_path / "absent", tmp_path / "out")
    held = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(held | {"architectures": ["BloomForCausalLM"]}))
    with pytest.raises(UsageError, match=r"BloomForCausalLM; supported are LlamaForCausalLM"):
        convert(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(held))
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match="no tokenizer"):
        convert(source, tmp_path / "out", data=text)
    (source / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken" / "mine").exists()


def test_a_tokenizer_of_another_model_is_refused(source, text, tmp_path):
    small = original(vocab_size=20)
    small.save_pretrained(source)
    with pytest.raises(UsageError, match="do not match"):
        convert(source, tmp_path / "out", data=text)


def test_diverged_recovery_writes_nothing(source, text, tmp_path):
    with pytest.raises(UsageError, match="diverged"):
        convert(source, tmp_path / "out", data=text, lr=1e30)
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces(source, text, tmp_path):
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", variant="hgrn2", overwrite=True)
    assert load(tmp_path / "out").model.config.liger["variant"] == "hgrn2"
