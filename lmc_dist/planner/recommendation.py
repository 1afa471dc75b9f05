"""Which strategy to choose, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from lmc_dist.planner.strategies import Strategy


def recommend(strategies: Sequence[Strategy], max_error: float | None) -> tuple[Strategy | None, str]:
    """(the strategy, the recommendation in one sentence). Pure."""
    possible = [s for s in strategies if s.obstacle is None]
    if any(s.name == "replay" for s in possible):  # the same steps and more, in processes of its own
        possible = [s for s in possible if s.name != "retrain"]
    if not possible:
        return None, "Nothing is possible: " + "; ".join(f"{s.name}: {s.obstacle}" for s in strategies[:2]) + "."
    exact = [s for s in possible if s.rel_error == 0]
    known = [s for s in possible if s.rel_error is not None and s.rel_error > 0]
    best = min(exact, key=lambda s: s.seconds) if exact else None
    limit = 0.0 if max_error is None else max_error
    fitting = [s for s in possible if s.rel_error is not None and s.rel_error <= limit]
    if fitting:
        chosen = min(fitting, key=lambda s: s.seconds)
        if chosen.rel_error:
            text = (
                f"Use {chosen.name} ({_seconds(chosen)}, rel_error {chosen.rel_error:.3g}, {chosen.basis}): the fastest "
                f"that is known to stay within {limit:g}"
            )
            if best is not None:
                text += f"; {best.name} takes {_seconds(best)}"
            return chosen, text + "."
        unknown = [s for s in possible if s.rel_error is None and s.seconds < chosen.seconds]
        why = "the fastest with error 0" if known else "the only one with known error 0"
        if max_error is not None:
            why = f"the fastest that is known to stay within {limit:g}"
        text = f"Use {chosen.name} ({_seconds(chosen)}): {why}"
        better = [s for s in known if s.seconds < chosen.seconds]
        if better:
            near = min(better, key=lambda s: s.rel_error or 0.0)
            text += f"; of the faster ones {near.name} ({_seconds(near)}) has the least error, {near.rel_error:.3g}"
        elif unknown:
            cheap = min(unknown, key=lambda s: s.seconds)
            text += f"; the cheapest is {cheap.name} ({_seconds(cheap)}), error unknown until --controls measures it"
        else:
            text += ", and nothing else is faster"
        return chosen, text + "."
    cheap = min(possible, key=lambda s: s.seconds)
    if known:
        near = min(known, key=lambda s: s.rel_error or 0.0)
        return near, (
            f"Nothing possible is known to stay within {limit:g}: {near.name} ({_seconds(near)}) comes nearest with "
            f"{near.rel_error:.3g} {near.basis}."
        )
    return cheap, f"No error is known: the cheapest is {cheap.name} ({_seconds(cheap)}); replay is not possible here."


def _seconds(strategy: Strategy) -> str:
    return f"{strategy.seconds:.3g} s"
