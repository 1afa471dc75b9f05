"""What noise costs, measured before it is added: the loss on retained samples at other draws of the same noise.

A quadratic estimate, σ²/2 · tr(S H), needs Hutchinson products for every shape of noise and holds where the loss is
still quadratic; noise that hides a residual from everybody is often larger than that. A draw costs two evaluations,
holds for any σ and S, and says when the model would be ruined. Draws come in pairs θ̂ ± n, whose mean has no
first-order term: n and −n are equally likely, so it stays unbiased, and what is left varies far less. They have keys
of their own: the noise that is added in the end is neither looked at nor chosen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from lmc_dist.privacy.covariance import Shape
from lmc_dist.shards.vector import ShardedVector


@dataclass(frozen=True)
class Utility:
    """Mean token losses on retained samples, None where they are not finite.

    Attributes:
        before: At θ̂.
        predicted: Mean over pairs of draws.
        standard_error: Of that mean; None of a single pair.
        pairs: Their number.
    """

    before: float | None
    predicted: float | None
    standard_error: float | None
    pairs: int

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.predicted is None else self.predicted - self.before


def predict(
    theta: ShardedVector,
    shape: Shape,
    sigma: float,
    loss: Callable[[ShardedVector], float],
    make_key: Callable[[int], bytes],
    pairs: int,
) -> Utility:
    """What noise of this size does to a loss. Collective; 1 + 2·pairs evaluations, three more vectors.

    Args:
        theta: θ̂, left as it is.
        shape: S.
        sigma: σ.
        loss: Collective.
        make_key: The key of a pair.
        pairs: At least 1.
    """
    values, nothing = [], theta.clone().zero_()
    for i in range(pairs):
        noise = shape.noisy(nothing, make_key(i), sigma)
        values.append((loss(theta + noise) + loss(theta - noise)) / 2)
    mean = math.fsum(values) / pairs
    error = statistics.stdev(values) / math.sqrt(pairs) if pairs > 1 and math.isfinite(mean) else None
    return Utility(finite(loss(theta)), finite(mean), error, pairs)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
