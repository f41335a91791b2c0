"""Where the randomness of a report comes from, and exact samplers that leave nothing to read in the low bits.

Noise drawn in floating point has gaps that depend on what it was added to and can give the record away (Mironov, 2012).
`SecureNoise` therefore reads the operating system's cryptographic generator and works in integers: the discrete
Gaussian by the rejection of Canonne, Kamath and Steinke (arXiv 2004.00010, Algorithms 1-3), exact because its scale is
a power of two. `SimulatedNoise` is repeatable and fast, for experiments only, and says so. `no_type_check` keeps
run-time shape checkers from wrapping a loop before it is compiled.
"""

import math
import os
import warnings
from collections.abc import Callable
from typing import Protocol, no_type_check, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from numba import njit
from numpy import ndarray
from scipy.special import ndtri

from locally.checks import check_between
from locally.privacy.regression.calibration import MAX_LOG2_SCALE

WORDS = 1 << 16  # random words fetched at a time


class NotPrivateWarning(UserWarning):
    """Noise that somebody else can draw again protects nobody."""


@runtime_checkable
class Noise(Protocol):
    """Three kinds of randomness are all that the mechanisms use."""

    def gaussian(self, shape: tuple[int, ...], log2_scale: int) -> Int[ndarray, "..."]:
        """Integer noise of standard deviation 2^log2_scale, log2_scale in [0, 24]; ValueError outside."""
        ...

    def coins(self, n: int, probability: Float[ndarray, " n"] | float) -> Bool[ndarray, " n"]:
        """True with the given probability, rounded towards one half."""
        ...

    def directions(self, n: int, dimension: int) -> Float[ndarray, "n dimension"]:
        """Points on the unit sphere."""
        ...


class SecureNoise:
    """Noise for what leaves a device: the system's cryptographic randomness through exact integer samplers.

    Args:
        entropy: `entropy(n)` returns n random bytes; the default is `os.urandom`.

    >>> noise = SecureNoise()
    >>> draws = noise.gaussian((1000,), 20)
    >>> bool(0.8 < draws.std() / 2**20 < 1.2)
    True
    """

    def __init__(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._entropy = entropy

    def gaussian(self, shape: tuple[int, ...], log2_scale: int) -> Int[ndarray, "..."]:
        """Exact discrete Gaussians of parameter 2^log2_scale, log2_scale in [0, 24]; ValueError outside."""
        check_between("log2_scale", log2_scale, 0, MAX_LOG2_SCALE)
        out = np.empty(math.prod(shape), np.int64)
        done, words = 0, np.empty(0, np.uint64)
        while done < out.size:
            # A draw that ran out of words is begun again from its own first word: to give it fresh ones instead would
            # favour the draws that need few.
            words = np.concatenate([words, self._words(min(WORDS, 64 + 40 * (out.size - done)))])
            done, used = discrete_gaussian(words, out, done, log2_scale)
            words = words[used:]
        return out.reshape(shape)

    def coins(self, n: int, probability: Float[ndarray, " n"] | float) -> Bool[ndarray, " n"]:
        """True with the given probability, drawn from 53 bits and rounded towards one half."""
        # 53-bit integers against a probability pulled four units towards 1/2: never more lopsided than asked for.
        p = np.asarray(probability, dtype=np.float64)
        threshold = np.floor(p * 2.0**53) + np.where(p > 0.5, -4, np.where(p < 0.5, 4, 0))
        return (self._words(n) >> np.uint64(11)) < np.clip(threshold, 0, 2.0**53).astype(np.uint64)

    def directions(self, n: int, dimension: int) -> Float[ndarray, "n dimension"]:
        """Uniform points on the unit sphere, a row each: normals by inversion, divided by their norm."""
        uniform = ((self._words(n * dimension) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return unit_rows(ndtri(uniform).reshape(n, dimension))

    def _words(self, n: int) -> ndarray:
        return np.frombuffer(self._entropy(8 * n), np.uint64)


class SimulatedNoise:
    """Repeatable noise of the same law from a seeded generator, for simulation: a report made with it is not private.

    Rounds floating-point normals to the grid of the exact sampler, some 30 times as fast.

    Args:
        seed: an integer, a seed sequence or a generator, as for `numpy.random.default_rng`.
    """

    def __init__(self, seed: int | np.random.SeedSequence | np.random.Generator) -> None:
        warnings.warn(
            "noise from a seed can be drawn again by whoever knows the seed: use it for simulation, never for reports "
            "that leave a device",
            NotPrivateWarning,
            stacklevel=2,
        )
        self.generator = np.random.default_rng(seed)

    def gaussian(self, shape: tuple[int, ...], log2_scale: int) -> Int[ndarray, "..."]:
        """Normals of standard deviation 2^log2_scale, log2_scale in [0, 24], rounded to integers; ValueError outside.

        In single precision, so for simulation only.
        """
        check_between("log2_scale", log2_scale, 0, MAX_LOG2_SCALE)
        draws = self.generator.standard_normal(shape, dtype=np.float32)
        draws *= np.float32(2.0**log2_scale)
        return np.rint(draws, out=draws).astype(np.int32)

    def coins(self, n: int, probability: Float[ndarray, " n"] | float) -> Bool[ndarray, " n"]:
        """True with the given probability."""
        return self.generator.random(n) < probability

    def directions(self, n: int, dimension: int) -> Float[ndarray, "n dimension"]:
        """Uniform points on the unit sphere, a row each."""
        return unit_rows(self.generator.standard_normal((n, dimension)))


def unit_rows(rows: Float[ndarray, "n d"]) -> Float[ndarray, "n d"]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@njit(cache=True, nogil=True)
@no_type_check
def discrete_gaussian(words, out, done, log2_scale):
    """Fill out[done:] with draws of probability proportional to exp(-z^2 / 2 s^2), s = 2^log2_scale.

    A discrete Laplace draw y of scale s is accepted with probability exp(-(|y| - s)^2 / 2 s^2). All of it is exact:
    s is a power of two, so every exponent is a dyadic rational. Needs about 25 random words a draw.

    Returns:
        How many entries are filled, and how many words were used up by whole draws.
    """
    s = np.int64(1) << log2_scale
    at = 0
    while done < out.size:
        z, after = _draw(words, at, s, log2_scale)
        if after < 0:
            break
        out[done] = z
        done += 1
        at = after
    return done, at


@njit(cache=True, nogil=True)
@no_type_check
def _draw(words, at, s, log2_scale):
    """One draw and the position after its last word; position -1 where the words ran out."""
    bits = 2 * log2_scale + 1
    while True:
        # discrete Laplace: y = u + s v, u in [0, s) kept with probability exp(-u / s), v geometric, and a sign
        if at >= words.size:
            return 0, -1
        word = words[at]
        at += 1
        u = np.int64(word & np.uint64(s - 1))
        negative = (word >> np.uint64(63)) == 1
        keep, at = _bernoulli_exp(words, at, u, log2_scale)
        if at < 0:
            return 0, -1
        if not keep:
            continue
        v = 0
        again, at = _bernoulli_exp(words, at, s, log2_scale)
        while again and at >= 0:
            v += 1
            again, at = _bernoulli_exp(words, at, s, log2_scale)
        if at < 0:
            return 0, -1
        y = u + s * v
        if (negative and y == 0) or v > 100:  # zero would count twice; past 100 s the next test has chance e^-4900
            continue

        exponent = (y - s) * (y - s)  # over 2 s^2 = 2^bits
        accept = True
        for _ in range(exponent >> bits):  # whole part, one factor 1/e each
            accept, at = _bernoulli_exp(words, at, np.int64(1) << bits, bits)
            if at < 0:
                return 0, -1
            if not accept:
                break
        if accept:
            accept, at = _bernoulli_exp(words, at, exponent & ((np.int64(1) << bits) - 1), bits)
            if at < 0:
                return 0, -1
        if accept:
            return (-y if negative else y), at


@njit(cache=True, nogil=True)
@no_type_check
def _bernoulli_exp(words, at, numerator, bits):
    """True with probability exp(-numerator / 2^bits), numerator <= 2^bits <= 2^49; von Neumann's alternating series.

    Step k goes on with probability gamma / k, drawn as (1 in k) and (gamma): the low 15 bits of a word, without those
    that would make the 1 in k uneven, and its high 49.
    """
    k = 1
    while True:
        if at >= words.size:
            return False, -1
        word = words[at]
        at += 1
        low = np.int64(word & np.uint64(0x7FFF))
        if low >= (0x8000 // k) * k:
            continue
        high = np.int64(word >> np.uint64(15)) >> (49 - bits)
        if low % k != 0 or high >= numerator:
            return k % 2 == 1, at
        k += 1
