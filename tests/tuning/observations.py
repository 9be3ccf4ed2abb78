"""Made-up trials with known effects: input for the tests of statistics."""

from __future__ import annotations

from dora_ray.tuning.statistics import Observation


def made_up(rng, truth, *, seeds, noise, shared, missing=0):
    """Trials of points with known means; what a seed adds is the same for all points."""
    common = rng.normal(0, shared, seeds)
    found = [
        Observation(point, seed, mean + common[seed] + rng.normal(0, noise))
        for point, mean in truth.items()
        for seed in range(seeds)
    ]
    return [found[index] for index in sorted(rng.permutation(len(found))[missing:])]
