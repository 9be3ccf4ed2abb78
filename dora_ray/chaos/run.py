"""Trials of one `dora-ray chaos` command."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dora_ray.chaos.schedule import FAULTS, LIVE, OF_WORKERS, QUICK
from dora_ray.chaos.training import make_training_video
from dora_ray.chaos.trial import Laboratory, Trial
from dora_ray.errors import ConfigError

OnTrial = Callable[[str, int, int], None]


def chaos(
    faults: Sequence[str],
    *,
    seed: int,
    count: int,
    quick: bool,
    compare: bool = False,
    on_trial: OnTrial | None = None,
) -> dict[str, Any]:
    """Inject faults into small trainings on a local Ray cluster, and compare them with undisturbed ones.

    Args:
        faults: names in FAULTS; default: all, or those in QUICK; with `compare`, only worker faults of these.
        seed: seed of the steps and victims.
        count: number of times that each live fault is injected.
        quick: one run for all live faults, instead of one each.
        compare: repeat each run with live faults with cluster.fast_recovery=false; for worker faults only.
        on_trial: called with the name of a run, its number from 1, and the total.

    Returns:
        seed, holds (whether all requirements held), folder (of the runs, if some did not), and trials: for each run its
        name, rows, max_difference, problems and notes.

    Raises:
        ConfigError: a fault is unknown or cannot be compared, or count is not positive.
    """
    names = check(faults, count=count, quick=quick, compare=compare)
    folder = Path(tempfile.mkdtemp(prefix="dora-ray-chaos-"))
    planned = plan_trials(names, count=count, quick=quick, compare=compare)
    trials: list[Trial] = []
    with Laboratory(folder, make_training_video(folder)) as lab:
        for number, run in enumerate(planned, 1):
            if on_trial is not None:
                on_trial(run.name, number, len(planned))
            if run.faults:
                trials.append(lab.run_live(run.name, run.faults, seed=seed, quick=quick, plain=run.plain))
            else:
                trials.append(lab.run_alone(run.name, seed=seed))
    holds = not any(trial.problems for trial in trials)
    if holds:
        shutil.rmtree(folder)
    return {
        "seed": seed,
        "holds": holds,
        "folder": None if holds else str(folder),
        "trials": [asdict(trial) for trial in trials],
    }


def check(faults: Sequence[str], *, count: int, quick: bool = False, compare: bool = False) -> list[str]:
    """Return the names of the faults, with defaults if none are given.

    Raises:
        ConfigError: a fault is unknown or cannot be compared, or count is less than 1.
    """
    if count < 1:
        raise ConfigError(f"--count {count}: each fault must strike at least once")
    unknown = [name for name in faults if name not in FAULTS]
    if unknown:
        raise ConfigError(f"--faults {','.join(unknown)}: unknown; choose from {', '.join(FAULTS)}")
    unfair = [name for name in faults if name not in OF_WORKERS]
    if compare and unfair:
        raise ConfigError(
            f"--compare --faults {','.join(unfair)}: only recovery from worker faults can be compared with "
            f"Ray Train's; choose from {', '.join(OF_WORKERS)}"
        )
    usual = QUICK if quick else FAULTS
    return list(faults) or [name for name in usual if name in OF_WORKERS or not compare]


class Planned(NamedTuple):
    """Run to be done.

    Attributes:
        name: name of its folder.
        faults: live faults; empty for a standalone run.
        plain: recover at Ray Train's own pace.
    """

    name: str
    faults: tuple[str, ...] = ()
    plain: bool = False


def plan_trials(faults: Sequence[str], *, count: int, quick: bool, compare: bool = False) -> list[Planned]:
    """Return the runs of one command."""
    live = tuple(name for name in faults if name in LIVE)
    if quick and live:
        struck = [Planned("+".join(live), live * count)]
    else:
        struck = [Planned(name, (name,) * count) for name in live]
    plain = [Planned(f"{run.name}-at-rays-pace", run.faults, plain=True) for run in struck] if compare else []
    return [*struck, *plain, *(Planned(name) for name in faults if name not in LIVE)]
