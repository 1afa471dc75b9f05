"""Pure update rules Φ on flat shards, and their tangents (docs/method.md §3).

A rule maps (θ, σ, g) to the next (θ, σ), elementwise. Its tangent is derived by `torch.func.jvp`, never written by hand,
so that the propagated correction is the derivative of the rule that trained.
"""

from lmc_dist.update_rules.rules import SECOND_MOMENTS, SGD, Adam
from lmc_dist.update_rules.settings import check_supported
from lmc_dist.update_rules.sharded import Deviation, Point, State, UpdateRule

__all__ = ["SECOND_MOMENTS", "SGD", "Adam", "Deviation", "Point", "State", "UpdateRule", "check_supported"]
