"""Importance of a sweep's factors: the share of each one in the variation of the metric."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

from dora_ray.reporting.analysis import Analysis
from dora_ray.tuning.axes import value_at
from dora_ray.tuning.results import Row
from dora_ray.tuning.statistics import ROUNDING

# Fewest trials for a meaningful PED-ANOVA.
MIN_IMPORTANCE_TRIALS = 20


def importances(found: Analysis) -> tuple[dict[str, float], str]:
    """Return each factor's importance and a note on the method; no values if nothing is significant.

    PED-ANOVA measures what separates the best trials from all trials; with few trials the range of a factor's effects
    is used instead. Both would distribute mere noise among the factors.
    """
    rows = found.done
    if len(found.factors) < 2 or not found.comparison.behind:
        return {}, ""
    if reason := _nothing_told_apart(found):
        return {}, reason
    noise = _noise(found)
    if len(rows) >= MIN_IMPORTANCE_TRIALS and _is_even(found) and importlib.util.find_spec("optuna"):
        how = f"PED-ANOVA (Optuna) over {len(rows)} trials: what tells the best from all."
        return _ped_anova(found, rows), how + noise
    spans = {
        key: max(level.effect.value for level in levels) - min(level.effect.value for level in levels)
        for key, levels in found.effects.items()
    }
    total = sum(spans.values())
    shares = {key: span / total for key, span in spans.items()} if total else {}
    return shares, "Shares of the ranges of the effects above; their errors are there." + noise


def _nothing_told_apart(found: Analysis) -> str:
    """Return why importances would only show noise; empty if the best and the worst point differ significantly."""
    comparison, moves = found.comparison, any(_moves(found, key) for key in found.effects)
    # Without repetitions points have no intervals, and the effects' are what there is.
    if next(reversed(comparison.points)) not in comparison.tied or (moves and not comparison.repeated):
        return ""
    if moves:
        return (
            "The best and the worst point are not told apart at this scale, so no importance is shown; an effect whose "
            "interval leaves out 0 stands above."
        )
    return "No factor is told apart at this scale, so no importance is shown: nor are the best and the worst point."


def _moves(found: Analysis, key: str) -> bool:
    """Return whether the interval of one of a factor's effects excludes 0 by more than rounding."""
    rounding = ROUNDING * max(abs(estimate.value) for estimate in found.comparison.points.values())
    return any(abs(level.effect.value) - level.effect.half > rounding for level in found.effects[key])


def _is_even(found: Analysis) -> bool:
    """Return whether a grid is whole: PED-ANOVA takes values that were tried more often for values that matter."""
    if any("grid" not in found.spec.space[key] for key in found.factors):
        return True
    values = [{str(value_at(row.values, key)) for row in found.done} for key in found.factors]
    whole = math.prod(len(distinct) for distinct in values) == len(found.groups)
    return whole and len({len(rows) for rows in found.groups.values()}) == 1


def _noise(found: Analysis) -> str:
    """Name the factors without a significant effect."""
    still = [key for key in found.effects if not _moves(found, key)]
    if not still:
        return ""
    return f" The effect of {' and of '.join(still)} is not told apart from none: its share is noise."


def _ped_anova(found: Analysis, rows: Sequence[Row]) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize" if found.spec.mode == "max" else "minimize")
    names = {key: sorted({json.dumps(value_at(row.values, key)) for row in rows}) for key in found.factors}
    kinds: dict[str, Any] = {}
    for key, axis in ((key, found.spec.space[key]) for key in found.factors):
        ((kind, values),) = axis.items()
        drawn = kind in ("uniform", "loguniform")
        if drawn:
            low, high = values
            kinds[key] = optuna.distributions.FloatDistribution(low, high, log=kind == "loguniform")
        else:
            kinds[key] = optuna.distributions.CategoricalDistribution(names[key])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is experimental there
        for row in rows:
            point = {
                key: row.values[key]
                if isinstance(kinds[key], optuna.distributions.FloatDistribution)
                else json.dumps(value_at(row.values, key))
                for key in kinds
            }
            study.add_trial(
                optuna.trial.create_trial(params=point, distributions=kinds, value=row.metrics[found.spec.metric])
            )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
