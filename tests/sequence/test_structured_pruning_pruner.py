"""The whole method: budgets, resumption after a kill, models that are not in memory, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from safetensors.torch import load_file

from locally.sequence.structured_pruning import (
    TyrPruner,
    WorkFolderMismatch,
    load_pruned,
    open_network,
    perplexity,
    prune_uniform,
    size_of,
)
from locally.sequence.structured_pruning.network import StreamedNetwork
from tests.sequence.pruning_models import SHORT, small_checkpoint, small_model, small_text

TEXT = small_text()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_weights(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A checkpoint, and what pruning it without interruption gives."""
    folder = tmp_path_factory.mktemp("reference")
    dense = small_checkpoint(folder / "dense")
    pruner = TyrPruner(0.5, **SHORT, workdir=folder / "work").fit(dense, TEXT)
    pruner.save_pretrained(folder / "pruned")
    return folder, pruner


@pytest.mark.parametrize("family", ["Llama with biases", "Qwen3"])
def test_every_family(family):
    model = small_model(family)
    pruner = TyrPruner(0.5, **SHORT).fit(model, TEXT)
    small = pruner.transform(model)
    gone = size_of(model) - size_of(model, pruner.plan_)
    assert (gone.query_heads, gone.neurons) == (6, 60)
    assert perplexity(small, TEXT) == pytest.approx(perplexity(model, TEXT, plan=pruner.plan_), rel=1e-5)
    assert sum(pruner.removed_[f"blocks.{b}.heads"] for b in range(3)) == 6
    assert pruner.sparsity_["blocks.0.neurons"] == pruner.removed_["blocks.0.neurons"] / 40
    assert [record["iteration"] for record in pruner.history_] == [0] * 2 + [1] * 2


@pytest.mark.parametrize(
    "option", [{"prune": ("heads",)}, {"prune": ("neurons",)}, {"unit": "kv_group"}, {"sparsity": 0.0}]
)
def test_what_may_go(option):
    model = small_model()
    pruner = TyrPruner(**{"sparsity": 0.5, **SHORT, **option}).fit(model, TEXT)
    gone = size_of(model) - size_of(model, pruner.plan_)
    wanted = {"heads": (6, 0), "neurons": (0, 60), "kv_group": (6, 60)}
    key = option.get("unit") or (option["prune"][0] if "prune" in option else None)
    assert (gone.query_heads, gone.neurons) == (wanted[key] if key else (0, 0))
    if key == "kv_group":
        assert gone.kv_heads == 3


def test_search_beats_equal_shares_where_layers_differ():
    """Two of four blocks do almost nothing: the search has to find them."""
    model = small_model(num_hidden_layers=4)
    for b in (1, 3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[b].get_submodule(name).weight.data.mul_(0.02)
    settings = SHORT | {"generations": 12, "offspring": 12, "iterations": 1}
    pruner = TyrPruner(0.5, **settings).fit(model, TEXT)
    unseen = small_text(24, seed=1)
    dense = perplexity(model, unseen)
    drift = {
        "searched": abs(perplexity(model, unseen, plan=pruner.plan_) - dense),
        "uniform": abs(perplexity(model, unseen, plan=prune_uniform(model, TEXT, 0.5)) - dense),
    }
    removed = pruner.removed_
    idle, busy = ([removed[f"blocks.{b}.heads"] for b in which] for which in ((1, 3), (0, 2)))
    assert sum(idle) > sum(busy)
    assert drift["searched"] < 0.5 * drift["uniform"]


def test_same_seed_same_result_and_other_seed_other_search(reference):
    folder, pruner = reference
    again = TyrPruner(0.5, **SHORT).fit(folder / "dense", TEXT)
    assert again.removed_ == pruner.removed_
    assert again.history_ == pruner.history_
    other = TyrPruner(0.5, **SHORT, random_state=1).fit(folder / "dense", TEXT)
    assert other.history_ != pruner.history_


def test_shards_and_memory_make_no_difference(reference, tmp_path):
    folder, pruner = reference
    sharded = small_checkpoint(tmp_path / "sharded", shard="5KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    for source in (sharded, small_model()):
        found = TyrPruner(0.5, **SHORT).fit(source, TEXT)
        assert found.history_ == pruner.history_
        found.save_pretrained(tmp_path / "pruned", overwrite=True)
        assert same_weights(tmp_path / "pruned", folder / "pruned")


@pytest.mark.parametrize("offload", ["cpu", "disk", "some"])
def test_models_that_accelerate_dispatched(reference, offload, tmp_path):
    folder, pruner = reference
    model = small_model()
    if offload == "cpu":
        model = cpu_offload(model, execution_device=torch.device("cpu"))
    elif offload == "disk":
        disk_offload(model, tmp_path / "offloaded", execution_device=torch.device("cpu"))
    else:
        places = {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.layers.2": "disk",
        }
        places |= {"model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "offloaded", force_hooks=True)
    assert any(p.is_meta for p in model.parameters())
    found = TyrPruner(0.5, **SHORT).fit(model, TEXT)
    assert found.history_ == pruner.history_
    found.save_pretrained(tmp_path / "pruned")
    assert same_weights(tmp_path / "pruned", folder / "pruned")
    assert any(p.is_meta for p in model.parameters())  # it is still where it was


KILLED = """
import sys
import torch
from tests.sequence.pruning_models import SHORT, small_text
from locally.sequence.structured_pruning import TyrPruner
dense, work = sys.argv[1:]
say = lambda fraction, what: print(f"{fraction:.4f} {what}", flush=True)
TyrPruner(0.5, **SHORT, workdir=work, callback=say).fit(dense, small_text())
"""


@pytest.mark.parametrize("moments", [(2, 2), (7,)])
def test_killed_and_resumed_is_as_never_killed(reference, moments, tmp_path):
    """SIGKILL after so many messages: in the first supernet, then in its search; in the second supernet."""
    folder, pruner = reference
    work = tmp_path / "work"
    for moment in moments:
        command = [sys.executable, "-c", KILLED, str(folder / "dense"), str(work)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for _ in range(moment):
                assert process.stdout.readline()
            time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    resumed = TyrPruner(0.5, **SHORT, workdir=work).fit(folder / "dense", TEXT)
    assert resumed.removed_ == pruner.removed_
    assert resumed.history_ == pruner.history_
    resumed.save_pretrained(tmp_path / "pruned")
    assert same_weights(tmp_path / "pruned", folder / "pruned")


def test_finished_work_is_taken_as_it_is(reference):
    folder, pruner = reference
    steps = []
    again = TyrPruner(0.5, **SHORT, workdir=folder / "work", callback=lambda _, what: steps.append(what))
    assert again.fit(folder / "dense", TEXT).history_ == pruner.history_
    assert steps == ["done"]


@pytest.mark.parametrize(
    ("change", "field"),
    [({"sparsity": 0.25}, "sparsity"), ({"random_state": 3}, "random_state"), ({"generations": 3}, "generations")],
)
def test_work_with_other_settings_is_refused(reference, change, field):
    folder, _ = reference
    with pytest.raises(WorkFolderMismatch, match=f"another {field} "):
        TyrPruner(**{"sparsity": 0.5, **SHORT, **change}, workdir=folder / "work").fit(folder / "dense", TEXT)


def test_work_on_another_model_or_text_is_refused(reference, tmp_path):
    folder, _ = reference
    pruner = TyrPruner(0.5, **SHORT, workdir=folder / "work")
    with pytest.raises(WorkFolderMismatch, match="another calibration"):
        pruner.fit(folder / "dense", small_text(seed=5))
    other = small_model(seed=1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(WorkFolderMismatch, match="another model"):
        pruner.fit(tmp_path / "other", TEXT)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "manifest.json").write_text("{")
    with pytest.raises(WorkFolderMismatch, match="cannot be read"):
        TyrPruner(0.5, **SHORT, workdir=tmp_path / "work").fit(other, TEXT)


def test_fingerprints_tell_models_apart(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "a")
    first = StreamedNetwork(tmp_path / "a").fingerprint()
    resident = open_network(model).fingerprint()
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "b")
    assert StreamedNetwork(tmp_path / "b").fingerprint() != first
    assert open_network(model).fingerprint() != resident


def test_a_folder_of_levels_is_all_that_is_kept(reference):
    folder, _ = reference
    first, last = (folder / "work" / f"iteration_{t}" for t in (0, 1))
    assert not list(first.glob("*.safetensors"))
    assert list(last.glob("block_0002_neurons_*.safetensors"))
    assert json.loads((first / "search.json").read_text())["generation"] == SHORT["generations"]


def test_pruned_folder_brings_its_tokenizer(reference):
    folder, _ = reference
    assert load_pruned(folder / "pruned").tokenizer("w3 w5")["input_ids"] == [3, 5]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.5}, "sparsity"),
        ({"iterations": 0}, "iterations"),
        ({"interval": 0.0}, "interval"),
        ({"levels": 8}, "levels"),
        ({"least_steps": (0, 1)}, "least_steps"),
        ({"fitness": "loss"}, "fitness"),
        ({"score": "loss"}, "score"),
        ({"accumulation": "some"}, "accumulation"),
        ({"unit": "row"}, "unit"),
        ({"prune": ("columns",)}, "prune"),
        ({"random_state": -1}, "random_state"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_bad_settings_are_named(change, names):
    with pytest.raises(ValueError, match=names):
        TyrPruner(**{"sparsity": 0.5, **change})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (torch.zeros(0, 8, dtype=torch.long), "calibration must have shape"),
        (torch.zeros(3, 1, dtype=torch.long), "calibration must have shape"),
        (torch.zeros(3, 99, dtype=torch.long), "at most the model's 64 positions"),
        (torch.full((3, 8), 40), "tokenizer does not match"),
        (torch.full((3, 8), -1), "tokenizer does not match"),
        (torch.zeros(3, 8, dtype=torch.long), "calibration is too short: tokens_per_stage asks for 72 tokens, got 24"),
    ],
)
def test_bad_text_is_named(text, says):
    with pytest.raises(ValueError, match=says):
        TyrPruner(0.5, **SHORT).fit(small_model(), text)


def test_not_fitted():
    with pytest.raises(ValueError, match="fit first"):
        TyrPruner(0.5).transform(small_model())
