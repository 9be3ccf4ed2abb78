"""Detect a training that learns nothing from its measures: one diagnosis at a time, with its remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Fractions of the largest possible entropy and diversity.
FLAT_ENTROPY_SHARE = 0.99
NO_DIVERSITY_SHARE = 0.01
FULL_OVERLAP = 0.95
# Highest stable temperature according to DINO's authors.
WARMEST_TEACHER = 0.07
# Full overlap must last for this share of the run, or as long as the warm-up if that is longer.
LASTING_SHARE = 0.1


@dataclass
class CollapseWatch:
    """Checks each line of metrics after the warm-up; warns once per diagnosis for as long as it holds.

    Attributes:
        num_outputs: O, head outputs.
        num_images: teacher views per slot, which bound the diversity.
        num_objects: K.
        num_steps: steps of the run.
        warmup_steps: warm-up steps, during which the measures are not meaningful.
        teacher_temperature: as configured.
        lr: the highest learning rate.
    """

    num_outputs: int
    num_images: int
    num_objects: int
    num_steps: int
    warmup_steps: int
    teacher_temperature: float
    lr: float
    _said: str | None = None
    _overlap_since: int | None = None

    def look(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Return a new warning; None while training looks healthy or if the warning was given before."""
        if step <= self.warmup_steps:
            return None
        kind, sentence = self._diagnose(step, metrics)
        said, self._said = self._said, kind
        return sentence if kind != said else None

    def _diagnose(self, step: int, metrics: Mapping[str, float]) -> tuple[str | None, str | None]:
        """Return the first diagnosis that holds, as (kind, sentence). Collapse comes first, as it hides the others."""
        entropy_share = metrics["teacher_entropy"] / math.log(self.num_outputs)
        least_diversity = NO_DIVERSITY_SHARE * math.log(min(self.num_images, self.num_outputs))
        if entropy_share > FLAT_ENTROPY_SHARE or metrics["teacher_diversity"] < least_diversity:
            return "collapse", (
                "The teacher gives every image the same output, whose entropy is "
                f"{entropy_share:.0%} of that of a flat one. {self._remedy(entropy_share)} and start again."
            )
        if "object_overlap" not in metrics:  # no step since the last line had objects
            return ("overlap" if self._said == "overlap" else None), None
        if self._overlap_lasts(step, metrics["object_overlap"]):
            return "overlap", (
                f"The {self.num_objects} objects overlap by {metrics['object_overlap']:.0%}, so they add little, and "
                f"have done so since step {self._overlap_since}. Normal in early training; this late, lower "
                "tracking.num_objects."
            )
        return None, None

    def _remedy(self, entropy_share: float) -> str:
        """Return the setting to change: a high temperature can only flatten; too large steps cause either collapse."""
        if entropy_share > FLAT_ENTROPY_SHARE and self.teacher_temperature > WARMEST_TEACHER:
            return f"Lower loss.teacher_temperature (now {self.teacher_temperature:g}) to {WARMEST_TEACHER:g} or less"
        return f"Lower optim.lr (now {self.lr:g})"

    def _overlap_lasts(self, step: int, overlap: float) -> bool:
        """Return whether the objects have covered the same patches in every line for long."""
        if overlap <= FULL_OVERLAP:
            self._overlap_since = None
            return False
        if self._overlap_since is None:
            self._overlap_since = step
        return step - self._overlap_since >= max(self.warmup_steps, LASTING_SHARE * self.num_steps)
