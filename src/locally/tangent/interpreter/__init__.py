"""The exact linear system that a network is at one input: F x + r = N(x).

Freezes every unit at what it does to x and replays the network on other inputs, forwards and backwards: columns are
impulse responses, rows what an output looks at, singular images what it passes on best, votes how pixels and biases
decide. For any network of piecewise linear and smooth units, gates, normalisations and attention. Source: Navarrete
Michelini, Liu, Lu & Jiang, arXiv 1908.05168.
"""

from locally.tangent.interpreter.actions import NormMean
from locally.tangent.interpreter.analysis import Band, Gaze, band, gaze, support, template_share
from locally.tangent.interpreter.decomposition import SVD, Method, Status
from locally.tangent.interpreter.replay import Constant
from locally.tangent.interpreter.scope import LinearScope, biases, convert
from locally.tangent.interpreter.system import LinearInterpreter, Mode
from locally.tangent.interpreter.votes import PixelVotes, Votes

__all__ = [
    "SVD",
    "Band",
    "Constant",
    "Gaze",
    "LinearInterpreter",
    "LinearScope",
    "Method",
    "Mode",
    "NormMean",
    "PixelVotes",
    "Status",
    "Votes",
    "band",
    "biases",
    "convert",
    "gaze",
    "support",
    "template_share",
]
