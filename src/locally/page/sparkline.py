"""The claim's quantity over the stored runs of a paper, as a drawing of a few hundred bytes."""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from locally.evidence import Finding

WIDTH, HEIGHT, MARGIN = 96, 24, 3


def sparkline(findings: Sequence[Finding]) -> Markup:
    """A line through the estimates, oldest first, and the claim's threshold dashed; nothing without two estimates.

    Args:
        findings: what successive runs found of one claim.
    """
    values = [f.estimate for f in findings if math.isfinite(f.estimate)]
    if len(values) < 2:
        return Markup("")
    claim = findings[-1].claim
    bounds = [b for b in (claim.value if isinstance(claim.value, tuple) else (claim.value,)) if math.isfinite(b)]
    low, high = min(values + bounds), max(values + bounds)
    height = lambda v: HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * ((v - low) / (high - low) if high > low else 0.5)
    across = lambda i: MARGIN + (WIDTH - 2 * MARGIN) * i / (len(values) - 1)
    points = " ".join(f"{across(i):.1f},{height(v):.1f}" for i, v in enumerate(values))
    dashes = "".join(f'<path class="bound" d="M0 {height(b):.1f}H{WIDTH}"/>' for b in bounds)
    words = f"{claim.metric} of {claim.method} over the last {len(values)} runs: {values[0]:.3g} to {values[-1]:.3g}, "
    words += f"claimed {claim.threshold}"
    return Markup(
        f'<svg class="spark" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f"<title>{escape(words)}</title>{dashes}"
        f'<polyline points="{points}"/><circle cx="{across(len(values) - 1):.1f}" cy="{height(values[-1]):.1f}" r="2"/>'
        "</svg>"
    )
