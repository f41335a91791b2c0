"""Two real processes prune one model: as one would, and one of them killed."""

import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from locally.cli import app
from locally.errors import UsageError
from locally.sequence.structured_pruning import (
    Batch,
    LostMember,
    Scorer,
    Space,
    Team,
    TyrPruner,
    WorkFolderMismatch,
    build_supernet,
    launch,
    load_pruned,
    open_network,
)
from locally.sequence.structured_pruning import team as team_module
from locally.sequence.structured_pruning.levels import step_sizes, uniform
from tests.sequence.pruning_models import LENGTH, SHORT, small_checkpoint, small_model, small_text, small_text_file

TEXT = small_text()
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "in sequence": {"sequential": True, "unit": "kv_group"},
    "nothing handed on": {"accumulation": "none", "prune": ("neurons",)},
}
# whole sequences in several pieces, a rest, one piece for more candidates than processes, fewer candidates than these
BATCHES = [(Batch(np.arange(9), 9 * LENGTH), 5), (Batch(np.array([3, 1]), LENGTH + 7), 4), (Batch(np.array([2]), 9), 1)]


def scores(supernet: Any, space: Space, team: Team) -> list[list[float]]:
    rng = np.random.default_rng(0)
    found = []
    for fitness in ("kl", "hidden"):
        scorer = Scorer(supernet, TEXT, fitness=fitness, tokens_at_once=4 * LENGTH, team=team)
        for batch, count in BATCHES:
            candidates = [space.removed(space.mutant(space.start, rng)) for _ in range(count)]
            found.append(scorer(candidates, batch).tolist())
    return found


def a_space(network: Any) -> Space:
    sublayers = network.sublayers()
    return Space(sublayers, uniform(sublayers, 0.5), step_sizes(sublayers, 0.125, least=(1, 5)))


def everything(folder: Path, team: Team) -> None:
    """Score on a supernet that one process has made, and prune in every variant; what came out, as a file."""
    network = open_network(folder / "dense")
    space = a_space(network)
    found: dict[str, Any] = {"scores": scores(build_supernet(network, TEXT, space, folder / "supernet"), space, team)}
    for name, options in VARIANTS.items():
        found[name] = prune(folder / "dense", folder / name, team, options)
    (folder / f"found_{team.rank}.json").write_text(json.dumps(found))


def prune(dense: Path, work: Path, team: Team, options: dict[str, Any], pause: float = 0.0) -> dict[str, Any]:
    steps = []

    def said(fraction: float, what: str) -> None:
        steps.append(what)
        time.sleep(pause)

    pruner = TyrPruner(0.5, **SHORT | options, workdir=work, callback=said, team=team).fit(dense, TEXT)
    if team.leads:
        pruner.save_pretrained(work.with_name(f"{work.name} pruned"), overwrite=True)
    return {"removed": pruner.removed_, "history": pruner.history_, "steps": steps}


def slowly(folder: Path, team: Team) -> None:
    found = prune(folder / "dense", folder / "work", team, {}, pause=0.05)
    (folder / f"resumed_{team.rank}.json").write_text(json.dumps(found))


def refuse(team: Team) -> None:
    if team.rank == 1:
        raise UsageError("no")
    team.wait()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes have left, in a folder."""
    folder = tmp_path_factory.mktemp("two")
    small_checkpoint(folder / "dense")
    network = open_network(folder / "dense")
    build_supernet(network, TEXT, a_space(network), folder / "supernet")
    launch(2, partial(everything, folder))
    return folder


def found_by(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"found_{rank}.json").read_text())


def test_scores_are_those_of_one_process_to_the_bit(two):
    network = open_network(two / "dense")
    space = a_space(network)
    alone = scores(build_supernet(network, TEXT, space, two / "supernet"), space, Team())
    assert found_by(two, 0)["scores"] == alone
    assert found_by(two, 1)["scores"] == alone


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_prune_as_one_does(two, variant, tmp_path):
    alone = prune(two / "dense", tmp_path / "alone", Team(), VARIANTS[variant])
    first, second = (found_by(two, rank)[variant] for rank in (0, 1))
    assert first["removed"] == second["removed"] == alone["removed"]
    assert first["history"] == second["history"]
    for ours, theirs in zip(first["history"], alone["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert first["steps"] == alone["steps"]
    assert second["steps"] == []  # the first speaks for both
    of_two, of_one = weights(two / f"{variant} pruned"), weights(tmp_path / "alone pruned")
    assert of_two.keys() == of_one.keys()
    for name, weight in of_one.items():  # single precision, summed in another order
        torch.testing.assert_close(of_two[name], weight, rtol=1e-4, atol=1e-5)
    assert not list((two / variant).rglob("hidden_*"))


def test_a_killed_process_ends_all_and_what_is_finished_is_kept(two, tmp_path):
    (tmp_path / "dense").symlink_to(two / "dense")
    state = tmp_path / "work" / "iteration_0" / "state.json"
    pids: list[int] = []

    def kill_one() -> None:
        while not (state.exists() and json.loads(state.read_text())["blocks_done"] == 2):
            time.sleep(0.002)
        os.kill(pids[1], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(LostMember, match=r"process 1 of 2 was ended by SIGKILL.*kept.*same call goes on"):
        launch(2, partial(slowly, tmp_path), on_start=pids.extend)
    killer.join()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not (tmp_path / "resumed_0.json").exists()
    launch(2, partial(slowly, tmp_path))
    resumed, whole = json.loads((tmp_path / "resumed_0.json").read_text()), found_by(two, 0)["as published"]
    assert resumed["removed"] == whole["removed"]
    assert resumed["history"] == whole["history"]
    assert resumed["steps"] == whole["steps"][2:]  # two blocks were done
    ours, theirs = weights(tmp_path / "work pruned"), weights(two / "as published pruned")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_hidden_states_of_another_number_of_processes_are_not_taken_up(tmp_path):
    """They may be of an earlier block: the supernet is begun again."""

    class Stopped(Exception):
        pass

    def leave(done, of):
        raise Stopped

    network = open_network(small_model())
    space = a_space(network)
    with pytest.raises(Stopped):
        build_supernet(network, TEXT, space, tmp_path, on_block=leave)
    state = json.loads((tmp_path / "state.json").read_text())
    assert state == {"blocks_done": 1, "processes": 1}
    (tmp_path / "state.json").write_text(json.dumps(state | {"processes": 2}))
    blocks: list[int] = []
    build_supernet(network, TEXT, space, tmp_path, on_block=lambda done, of: blocks.append(done))
    assert blocks == [1, 2, 3]


def test_what_one_process_refuses_is_said_by_the_one_that_started_it():
    with pytest.raises(UsageError, match=r"^no$"):
        launch(2, refuse)


@given(items=st.integers(0, 50), size=st.integers(1, 9))
def test_shares_are_a_division(items, size):
    members = [Team() for _ in range(size)]
    for rank, member in enumerate(members):
        member.rank, member.size = rank, size
    shares = [range(items)[member.share(items)] for member in members]
    assert [i for share in shares for i in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_a_team():
    numbers = torch.arange(3)
    team = Team()
    team.sum(numbers)
    team.broadcast(numbers, 0)
    team.wait()
    assert (team.least(4), numbers.tolist()) == (4, [0, 1, 2])


def test_source_holds_no_unpickling():
    text = Path(team_module.__file__).read_text()
    assert "pickle" not in text.replace("unpickled", "")
    assert "_object" not in text  # torch.distributed's *_object calls unpickle


def imagined(size: int, rank: int = 0) -> Team:
    team = Team()
    team.rank, team.size = rank, size
    return team


def test_what_a_team_cannot_do_is_refused(tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match="workdir must be given: the 2 processes"):
        TyrPruner(0.5, **SHORT, team=imagined(2))
    with pytest.raises(ValueError, match="a sequence for each of the 13 processes, got 12"):
        TyrPruner(0.5, **SHORT, workdir=tmp_path, team=imagined(13)).fit(model, TEXT)
    with pytest.raises(ValueError, match="a sequence for each of the 13 processes, got 12"):
        build_supernet(open_network(model), TEXT, a_space(open_network(model)), tmp_path, team=imagined(13))
    with pytest.raises(WorkFolderMismatch, match=r"process 1 does not see the manifest\.json of process 0"):
        TyrPruner(0.5, **SHORT, workdir=tmp_path / "mine", team=imagined(2, rank=1)).fit(model, TEXT)
    with pytest.raises(ValueError, match="processes must be at least 1"):
        launch(0, refuse)


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        (("--processes", "0"), {}, "--processes must be at least 1, got 0"),
        (("--processes", "2", "--method", "flap"), {}, "--processes goes with --method tyr alone, got 'flap'"),
        (("--processes", "2", "--device", "auto"), {}, "give --processes or --device auto, not both"),
        (("--processes", "2"), {"WORLD_SIZE": "2"}, "give --processes or start them with torchrun, not both"),
        ((), {"WORLD_SIZE": "2"}, "this process cannot join the others"),
        ((), {"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number of processes, got 'two'"),
        (("--processes", "2", "--sequences", "1"), {}, "a sequence for each of the 2 processes, got 1"),
    ],
)
def test_bad_commands_are_one_sentence(two, tmp_path, monkeypatch, words, environment, says):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = small_text_file(tmp_path / "text.txt")
    command = ["prune", two / "dense", "-o", tmp_path / "out", "--calibration", text, "--sequences", 12]
    with pytest.raises(UsageError, match=says):
        app([*map(str, command), "--length", "16", *words], standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_the_command_with_two_processes(two, tmp_path):
    text = small_text_file(tmp_path / "text.txt")
    command = ["prune", two / "dense", "-o", tmp_path / "out", "--calibration", text, "--processes", 2, "--json"]
    short = ["--iterations", 1, "--generations", 1, "--offspring", 2, "--sequences", 12, "--length", 16]
    app([str(word) for word in (*command, *short)], standalone_mode=False)
    config = load_pruned(tmp_path / "out").model.config
    assert sum(config.query_heads_per_layer) == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"]
