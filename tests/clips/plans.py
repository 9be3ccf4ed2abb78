"""Plans and stores that the tests of clips share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dora_ray.clips.contents import Contents, SlotKey
from dora_ray.clips.plan import Plan
from dora_ray.config import load_config
from dora_ray.training.inputs import Inputs, make_inputs
from tests.conftest import BIKES, SMALL


def stored_inputs(store: Path, *overrides: str, videos: str = BIKES) -> Inputs:
    """The plan of a small training over videos that are ingested first."""
    return make_inputs(load_config("tiny", *SMALL, f"data.videos=[{videos}]", *overrides), str(store), None)


def key_of(contents: Contents, step: int, slot: int) -> SlotKey:
    """The key of a slot that is there."""
    key = contents.key(step, slot)
    assert key is not None
    return key


def without_row(inputs: Inputs, step: int, slot: int) -> Inputs:
    """The inputs with a row that does not exist in the first clip of a slot: it is unreadable, anywhere."""

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
    """(n,) the rows of `plan.starts` that clips are drawn at."""
    return np.array([plan.place(n)[0].rows[plan.place(n)[1]] for n in numbers])
