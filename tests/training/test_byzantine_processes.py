"""Real processes and real sockets: killed, frozen, late, cut-off and lying peers, and what is no message at all."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from locally.training.byzantine import (
    ALIE,
    BeyondBreakdown,
    Collaboration,
    Constant,
    Crash,
    CutOff,
    Dissensus,
    Freeze,
    Garbage,
    Lie,
    Membership,
    ModelProblem,
    MoNNA,
    NonFiniteModel,
    Processes,
    SignFlip,
    Simulation,
    Slow,
    SocketTransport,
    Status,
    TooFewPeers,
    split_dirichlet,
)
from locally.training.byzantine.processes import messages
from locally.training.byzantine.processes.drills import GARBAGE

STEPS = 40


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    inputs = torch.from_numpy(np.eye(3)[labels] + 0.3 * rng.standard_normal((400, 3))).float()
    torch.manual_seed(0)
    return ModelProblem(
        nn.Linear(3, 3), inputs, torch.from_numpy(labels), split_dirichlet(labels, 5, 2.0, rng), batch=16
    )


def collaboration(**changes):
    return Collaboration(**{"n": 5, "f": 1, "lr": 0.5, "beta": 0.8} | changes)


def worst_accuracy(problem, outcome, nodes):
    rows = [outcome.nodes.index(node) for node in nodes]
    return problem.accuracies(outcome.parameters[rows], problem.inputs, problem.labels).min()


@pytest.mark.parametrize(
    ("attack", "rounds"), [(ALIE(), 1), (SignFlip(), 2), (Dissensus(), 1)], ids=["ALIE", "SignFlip", "Dissensus"]
)
def test_processes_and_simulation_give_the_same_parameters(problem, attack, rounds):
    c = collaboration(rounds=rounds)
    real = Processes(c, {4: Lie(attack)}, order="seeded", patience=20.0).run(problem, 15)
    simulated = Simulation(c, attack).run(problem, 15)
    assert real.status is Status.FINISHED
    assert real.nodes == (0, 1, 2, 3)
    torch.testing.assert_close(real.parameters, simulated.parameters, rtol=0, atol=1e-6)
    assert real.gradients_used == simulated.gradients_used


@pytest.mark.parametrize(
    "drill",
    [Crash(10), Freeze(10), Slow(0.02), CutOff(10, (0, 1, 3, 4)), Lie(Constant()), *(Garbage(k) for k in GARBAGE)],
    ids=lambda d: getattr(d, "kind", type(d).__name__),
)
def test_honest_nodes_finish_and_have_learnt(problem, drill):
    """`Crash` is kill -9 in the middle of training; every fault hits node 2 of five, one of which may be faulty."""
    done = Processes(collaboration(), {2: drill}, timeout=20.0).run(problem, STEPS)
    assert done.status is Status.FINISHED
    assert {0, 1, 3, 4} <= set(done.nodes)
    assert worst_accuracy(problem, done, (0, 1, 3, 4)) > 0.9
    if isinstance(drill, Crash):
        assert done.lost == {2: "ended by SIGKILL after 10 steps"}
    if isinstance(drill, Slow):
        assert 2 in done.nodes  # late, but there


def test_killed_from_outside(problem):
    """The parent kills two of eight nodes by their process ids; the other six finish."""
    labels = problem.labels.numpy()
    parts = split_dirichlet(labels, 8, 2.0, np.random.default_rng(1))
    wide = ModelProblem(problem.model, problem.inputs, problem.labels, parts, batch=16)
    engine = Processes(collaboration(n=8, f=2), {0: Slow(0.0), 5: Slow(0.0)}, timeout=20.0)
    killed = []

    def kill_two(steps):
        if not killed and steps.min() >= 5:
            killed.extend([engine.pids[0], engine.pids[5]])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    done = engine.run(wide, 200, callback=kill_two)
    assert len(killed) == 2
    assert done.status is Status.FINISHED
    assert set(done.nodes) == {1, 2, 3, 4, 6, 7}
    assert worst_accuracy(wide, done, done.nodes) > 0.9


def test_more_silence_than_agreed_ends_in_a_status(problem):
    """A partition that leaves no side n - f nodes: nobody trains on alone, everybody says why."""
    engine = Processes(collaboration(), {1: Crash(5)}, timeout=1.0)
    engine.drills[2] = Crash(5)  # behind the constructor's back, which refuses two
    done = engine.run(problem, STEPS)
    assert done.status is Status.TOO_FEW_PEERS
    assert done.nodes == ()
    assert "TooFewPeers: node 0 heard [3, 4] in round 5, needs 3 others" in done.lost[0]


def test_the_callback_sees_progress_and_can_stop(problem):
    seen = []
    done = Processes(collaboration()).run(problem, 100_000, callback=lambda s: seen.append(s.min()) or s.min() > 3)
    assert done.status is Status.STOPPED
    assert seen == sorted(seen)


def test_no_message_is_unpickled(tmp_path):
    """The very bytes that would make a folder if anybody unpickled them, from a peer with a valid key."""
    trap = tmp_path / "made by pickle"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    one, two, liar = Membership.local(3)
    with SocketTransport(one, f=1, entries=4, timeout=5.0) as a, SocketTransport(two, f=1, entries=4, timeout=5.0) as b:
        call = socket.create_connection(one.addresses[0])
        call.sendall(messages.greeting(2, liar.keys_out[0]) + pickle.dumps(Trap()) * 5)
        helper = threading.Thread(target=b.exchange, args=(0, torch.ones(4)))
        helper.start()
        received = a.exchange(0, torch.zeros(4))
        helper.join()
        assert hung_up(call)
    np.testing.assert_array_equal(received, [[0, 0, 0, 0], [1, 1, 1, 1]])
    assert a.refused == {2: "no header where one was due"}
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap()))
    assert trap.exists()  # the trap was armed
    liar.listener.close()


def hung_up(connection):
    """An end, or a reset where the other side left bytes unread."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_source_holds_no_unpickling():
    folder = Path(messages.__file__).parent
    for name in ("messages.py", "sockets.py", "collectives.py", "node.py"):
        text = (folder / name).read_text()
        assert "import pickle" not in text
        assert "torch.load" not in text
        assert "_object" not in text  # torch.distributed's *_object calls unpickle


def test_duplicates_floods_and_other_names_count_for_nothing():
    one, two, liar = Membership.local(3)
    with SocketTransport(one, f=1, entries=2, timeout=5.0) as a, SocketTransport(two, f=1, entries=2, timeout=5.0) as b:
        call = socket.create_connection(one.addresses[0])
        call.sendall(messages.greeting(2, liar.keys_out[0]))
        for round, value in [(7, 9.0), (7, 8.0), (7, 7.0), *((10**9 + k, 1.0) for k in range(200))]:
            header, payload = messages.pack(2, round, torch.full((2,), value))
            call.sendall(header + bytes(payload))
        stranger = socket.create_connection(one.addresses[0])
        stranger.sendall(messages.greeting(1, b"\0" * 16) + b"".join(map(bytes, messages.pack(1, 0, torch.ones(2)))))
        b.send(0, 7, torch.tensor([4.0, 4.0]))
        received = a.gather(7, 2)
        assert {peer: v[0].item() for peer, v in received.items()} == {1: 4.0, 2: 9.0}  # the first counts
        assert sum(len(of_round) for of_round in a._inbox.values()) <= 3  # nothing of the flood is kept
        assert hung_up(stranger)
        b.timeout = 0.1
        with pytest.raises(TooFewPeers, match="node 1 heard"):
            b.gather(7, 1)
    liar.listener.close()


def test_nothing_is_sent_to_a_peer_that_is_cut_off():
    one, two, three = (SocketTransport(m, f=1, entries=2, timeout=2.0) for m in Membership.local(3))
    with one as a, two as b, three as c:
        a.cut_off([1])
        a.send(1, 0, torch.full((2,), 9.0))
        a.broadcast(0, torch.full((2,), 8.0))
        a.send(2, 1, torch.full((2,), 7.0))  # to others still
        c.send(1, 0, torch.full((2,), 1.0))
        assert c.gather(1, 1)[0].tolist() == [7.0, 7.0]
        with pytest.raises(TooFewPeers, match=r"heard \[2\]"):
            b.gather(0, 2)


def test_the_optimizer_trains_any_model_in_any_loop():
    """Four threads as four nodes with plain torch code; the same figures as the simulation on the same gradients."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(4, 32, 3), torch.randn(4, 32, 2)
    start = nn.Linear(3, 2).state_dict()
    members, finals = Membership.local(4), {}

    def node(rank):
        model = nn.Linear(3, 2)
        model.load_state_dict(start)
        with SocketTransport(members[rank], f=0, entries=8, timeout=10.0) as transport:
            optimizer = MoNNA(model.parameters(), lr=0.1, transport=transport, f=0, beta=0.5)
            for _ in range(10):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(inputs[rank]), targets[rank]).backward()
                optimizer.step()
        finals[rank] = nn.utils.parameters_to_vector(model.parameters()).detach()

    threads = [threading.Thread(target=node, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    single = nn.Linear(3, 2)
    single.load_state_dict(start)
    momentum = [torch.zeros_like(p) for p in single.parameters()]
    for _ in range(10):  # f = 0: the same as one node with the mean of all gradients
        losses = torch.stack([nn.functional.mse_loss(single(x), y) for x, y in zip(inputs, targets)])
        gradients = torch.autograd.grad(losses.mean(), list(single.parameters()))
        with torch.no_grad():
            for p, m, g in zip(single.parameters(), momentum, gradients):
                m.mul_(0.5).add_(g, alpha=0.5)
                p.sub_(0.1 * m)
    expected = nn.utils.parameters_to_vector(single.parameters()).detach()
    for rank in range(4):
        torch.testing.assert_close(finals[rank], expected)


def test_the_optimizer_stops_before_it_sends_nan():
    class Alone:
        rank, n = 0, 5

        def exchange(self, round, vector, prefer=None):
            raise AssertionError("sent")

    model = nn.Linear(2, 1)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer = MoNNA(model.parameters(), lr=0.1, transport=Alone(), f=1)
    for p in model.parameters():
        p.grad = torch.full_like(p, np.nan)
    with pytest.raises(NonFiniteModel, match="node 0"):
        optimizer.step()
    torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()).detach(), before)
    with pytest.raises(BeyondBreakdown, match="n >= 3 f"):
        MoNNA(model.parameters(), lr=0.1, transport=Alone(), f=2)


@pytest.mark.parametrize("transport", ["sockets", "gloo"])
def test_under_torchrun(transport):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        "-m", "locally.training.byzantine.processes", "--f", "0", "--steps", "60", "--transport", transport,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    accuracies = [float(line.split()[3]) for line in done.stdout.splitlines() if line.startswith("node")]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.8


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_bad_arguments_are_named(problem):
    with pytest.raises(BeyondBreakdown, match="drills must be at most f = 1"):
        Processes(collaboration(), {1: Crash(3), 2: Crash(3)})
    with pytest.raises(ValueError, match="ranks below n = 5"):
        Processes(collaboration(), {7: Crash(3)})
    with pytest.raises(ValueError, match="order"):
        Processes(collaboration(), order="random")
    with pytest.raises(TypeError, match="picklable"):
        Processes(collaboration(lr=lambda step: 0.1)).run(problem, 2)
    (member, other) = Membership.local(2)
    with pytest.raises(TypeError, match="dtype must be one of"):
        SocketTransport(member, f=0, entries=3, dtype=torch.int64)
    member.listener.close()
    other.listener.close()
