"""Linear systems by random projections: randomised Kaczmarz and sketch-and-project.

For whoever has a system too large to factorise or to keep a Krylov basis of, and can read its rows one by one or
multiply with it. `SketchAndProject` solves with any of the sketches; `Rows` is the prepared matrix with a compiled
Kaczmarz sweep for one's own iterations. Sources: Kaczmarz (1937); Strohmer and Vershynin, J. Fourier Anal. Appl. 15
(2009); Gower and Richtarik, SIAM J. Matrix Anal. Appl. 36 (2015).
"""

from locally.linalg.sketching.projection import SketchAndProject, Solution, Status
from locally.linalg.sketching.rows import Rows
from locally.linalg.sketching.sketches import CountSketch, Gaussian, Kaczmarz, Sampling, Sketch, SparseSketch

__all__ = [
    "CountSketch",
    "Gaussian",
    "Kaczmarz",
    "Rows",
    "Sampling",
    "Sketch",
    "SketchAndProject",
    "Solution",
    "SparseSketch",
    "Status",
]
