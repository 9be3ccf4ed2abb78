"""Comparison of a measure with that of random encoders on the same clips, with intervals over the clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dora_ray.evaluation.intervals import mean_interval


def beside_random(trained: dict[str, Any], random: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add confidence intervals and the comparison with random encoders.

    Args:
        trained: Results with `samples`, the values per clip by measure.
        random: The same for random encoders, on the same clips.

    Returns:
        trained without `samples`; NAME_interval for each measure with samples, 95 % over clips; and with random
        encoders random_NAME (their mean), NAME_gain (trained minus random) and NAME_gain_interval (paired over clips).
    """
    results = {name: value for name, value in trained.items() if name != "samples"}
    for name, values in trained["samples"].items():
        results[f"{name}_interval"] = mean_interval(values)
    for name in trained["samples"] if random else ():
        others = np.mean([entry["samples"][name] for entry in random], axis=0)
        gains = np.asarray(trained["samples"][name]) - others
        results[f"random_{name}"] = float(others.mean())
        results[f"{name}_gain"] = float(gains.mean())
        results[f"{name}_gain_interval"] = mean_interval(gains)
    if random and "rankme" in trained:
        results["random_rankme"] = float(np.mean([entry["rankme"] for entry in random]))
    return results
