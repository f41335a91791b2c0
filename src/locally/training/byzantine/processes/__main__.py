"""A node that classifies scikit-learn's digits together with its peers: a smoke test for a cluster.

    torchrun --nproc-per-node 5 -m locally.training.byzantine.processes --f 1
    RANK=0 WORLD_SIZE=5 MASTER_ADDR=host MASTER_PORT=29500 python -m locally.training.byzantine.processes --f 1

torchrun ends all workers of its machine when one of them dies; to survive a dead worker give each machine one, or
start the nodes one by one as in the second line.
"""

import argparse
import os
import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from locally.training.byzantine.collaboration import Collaboration
from locally.training.byzantine.problems import ModelProblem, split_dirichlet
from locally.training.byzantine.processes.collectives import CollectiveTransport
from locally.training.byzantine.processes.node import Transport, train
from locally.training.byzantine.processes.sockets import Membership, SocketTransport


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m locally.training.byzantine.processes", description=__doc__)
    parser.add_argument("--f", type=int, default=1, help="bound on the faulty nodes")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--transport", choices=["sockets", "gloo"], default="sockets")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    n = int(os.environ["WORLD_SIZE"])
    collaboration = Collaboration(n=n, f=arguments.f, lr=0.5, beta=0.9)
    problem, inputs, labels = digits(n)
    transport: Transport
    if arguments.transport == "gloo":
        torch.distributed.init_process_group("gloo")
        transport = CollectiveTransport(f=arguments.f)
        trained = train(transport, collaboration, problem, arguments.steps)
        torch.distributed.destroy_process_group()
    else:
        entries = problem.start().numel()
        with SocketTransport(Membership.from_environment(), f=arguments.f, entries=entries) as transport:
            trained = train(transport, collaboration, problem, arguments.steps)
    (accuracy,) = problem.accuracies(trained.parameters[None], inputs, labels)
    # one write a line: the nodes share an output, and `print` would write the end of the line apart
    sys.stdout.write(f"node {transport.rank}: accuracy {accuracy:.3f} after {arguments.steps} steps\n")
    sys.stdout.flush()


def digits(n: int) -> tuple[ModelProblem, torch.Tensor, torch.Tensor]:
    """A linear classifier, data of different kinds at each of n nodes, and 360 test images."""
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(classes))
    inputs = torch.from_numpy(images[order] / 16).float()
    labels = torch.from_numpy(classes[order])
    parts = split_dirichlet(classes[order[360:]], n, 5.0, np.random.default_rng(1))
    torch.manual_seed(0)
    problem = ModelProblem(nn.Linear(64, 10), inputs[360:], labels[360:], parts, batch=16)
    return problem, inputs[:360], labels[:360]


if __name__ == "__main__":
    main()
