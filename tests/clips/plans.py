"""Plans and stores shared by the tests of clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dora_ray.clips.contents import Contents, SlotKey
from dora_ray.clips.plan import Plan
from dora_ray.config import load_config
from dora_ray.training.inputs import Inputs, make_inputs
from tests.conftest import BIKES, SMALL


def stored_inputs(store: Path, *overrides: str, videos: str = BIKES) -> Inputs:
    """Return the plan of a small training run, ingesting its videos first."""
    return make_inputs(load_config("tiny", *SMALL, f"data.videos=[{videos}]", *overrides), str(store), None)


def key_of(contents: Contents, step: int, slot: int) -> SlotKey:
    """Return the key of a stored slot."""
    key = contents.key(step, slot)
    assert key is not None
    return key


def without_row(inputs: Inputs, step: int, slot: int) -> Inputs:
    """Return the contents with a missing row in the first clip of a slot, so that no process can read it."""

    class Broken:
        plan, videos = inputs.plan, inputs.contents.videos

        def key(self, this_step: int, this_slot: int) -> SlotKey | None:
            key = inputs.contents.key(this_step, this_slot)
            if key is not None and (this_step, this_slot) == (step, slot):
                rows = key.rows.copy()
                rows[0, 0] = 10**6
                return SlotKey(key.step, key.slot, key.starts, key.versions, rows)
            return key

    return Inputs(inputs.plan, Broken())


def starts_of(plan: Plan, numbers: range) -> np.ndarray:
    """Return the (n,) rows of `plan.starts` at which clips are drawn."""
    return np.array([plan.place(n)[0].rows[plan.place(n)[1]] for n in numbers])
