"""A measure beside the same measure of newly drawn encoders, on the same clips, with intervals over these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dora_ray.evaluation.intervals import mean_interval


def beside_random(trained: dict[str, Any], random: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add intervals, and what random encoders reach.

    Args:
        trained: Results with `samples`, the values of each clip by the measure's name, which are taken out.
        random: The same of other encoders, on the same clips.

    Returns:
        trained; NAME_interval for each measure with samples, 95 % over clips; and with random encoders
        random_NAME (mean over them), NAME_gain (trained less that) and NAME_gain_interval, over clips, paired.
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
