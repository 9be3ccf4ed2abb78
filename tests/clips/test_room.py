"""Room for the clip stream in the object store."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dora_ray.clips.room import PREFETCHED_SHARE, READY_SHARE, rows_that_fit

PAPER_ROW = 16 * 8 * 300 * 300 * 3


@given(
    wanted=st.integers(1, 64),
    row_bytes=st.integers(1, 10**9),
    world_size=st.integers(1, 64),
    store_bytes=st.floats(0, 1e12),
)
def test_prefetched_rows_leave_room_for_the_tasks(
    wanted: int, row_bytes: int, world_size: int, store_bytes: float
) -> None:
    rows = rows_that_fit(wanted, row_bytes, world_size, store_bytes)
    assert 1 <= rows <= wanted
    held = rows * world_size * row_bytes
    assert rows == 1 or held <= PREFETCHED_SHARE * READY_SHARE * store_bytes
    assert rows == wanted or held + world_size * row_bytes > PREFETCHED_SHARE * READY_SHARE * store_bytes


def test_the_recipe_paper_on_one_machine() -> None:
    """Eight ranks with four rows each were 1.1 GB of the 0.6 GB that 2 GiB have for rows: the tasks stood still."""
    assert rows_that_fit(4, PAPER_ROW, 8, 2 * 2**30) == 1
    assert rows_that_fit(4, PAPER_ROW, 4, 2 * 2**30) == 2
    assert rows_that_fit(4, PAPER_ROW, 8, 64 * 2**30) == 4
