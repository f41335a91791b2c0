"""Real processes instead of a simulation: links that no peer can break, the node's loop, a launcher, drills."""

from locally.training.byzantine.processes.collectives import CollectiveTransport
from locally.training.byzantine.processes.drills import Crash, CutOff, Drill, Freeze, Garbage, Lie, Slow
from locally.training.byzantine.processes.launch import Processes
from locally.training.byzantine.processes.messages import MalformedMessage
from locally.training.byzantine.processes.node import NonFiniteModel, Trained, Transport, train
from locally.training.byzantine.processes.sockets import Membership, SocketTransport, TooFewPeers

__all__ = [
    "CollectiveTransport",
    "Crash",
    "CutOff",
    "Drill",
    "Freeze",
    "Garbage",
    "Lie",
    "MalformedMessage",
    "Membership",
    "NonFiniteModel",
    "Processes",
    "Slow",
    "SocketTransport",
    "TooFewPeers",
    "Trained",
    "Transport",
    "train",
]
