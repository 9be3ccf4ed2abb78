"""Keep what a finished sweep found: docs/results/NAME.md, NAME.csv and NAME.svg, from the sweep's folder.

python scripts/keep_answer.py runs/objects objects --commit 577b894 --machine "2 shared x86-64 cores"
"""

from __future__ import annotations

import argparse
import re
from datetime import UTC, datetime
from pathlib import Path

from dora_ray.reporting.analysis import analyze
from dora_ray.reporting.points import draw_points
from dora_ray.reporting.summary import summarize
from dora_ray.tuning.baseline import read_baseline
from dora_ray.tuning.results import read_csv, read_spec

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PANELS = {
    "j_and_f": "J&F of label propagation, %",
    "view_matching": "view matching, %",
    "object_iou": "IoU of its own masks, %",
    "knn": "kNN, %",
}
WIDTH, GAP = 420, 24
STYLE = """
svg { --ink: #1b2530; --soft: #4f5d6b; --line: #d9e0e7; --paper: #fff; --c0: #1f56a8; --c1: #b44708; --c7: #5a5f66; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6ebf0; --soft: #a9b6c3; --line: #36414c; --paper: #1b222a; }
  svg { --c0: #8db8f5; --c1: #f0a36a; --c7: #b4bcc5; }
}
.back, .ground { fill: var(--paper); } text { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: var(--ink); }
.title { fill: var(--soft); }
.rule { stroke: var(--line); } .reference { stroke: var(--c7); stroke-width: 1.5; stroke-dasharray: 4 3; }
.tick { stroke: var(--c7); stroke-width: 1.5; } .ring { fill: var(--paper); stroke: var(--c1); stroke-width: 2; }
.inner { stroke-width: 4; } .outer { stroke-width: 1.2; } .c0 { stroke: var(--c0); } .c7 { stroke: var(--c7); }
.mark.c0 { fill: var(--c0); stroke: var(--paper); } .mark.c7 { fill: var(--c7); stroke: var(--paper); }
"""


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="folder of the sweep")
    parser.add_argument("name", help="of its file in sweeps/, without .yaml")
    parser.add_argument("--commit", required=True, help="that ran it")
    parser.add_argument("--machine", required=True, help="that ran it, in words")
    parser.add_argument("--note", default="", help="a sentence on how it was run")
    options = parser.parse_args()
    folder, name = str(Path(options.sweep).absolute()), options.name
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.csv").write_text((Path(folder) / "results.csv").read_text())
    (RESULTS / f"{name}.svg").write_text(_figure(folder))
    (RESULTS / f"{name}.md").write_text(_page(folder, options))


def _page(folder: str, options: argparse.Namespace) -> str:
    name, written = options.name, datetime.fromtimestamp((Path(folder) / "results.csv").stat().st_mtime, UTC)
    title, _, rest = summarize(folder).partition("\n\n")
    run = f"`dora-ray sweep sweeps/{name}.yaml`, {written:%Y-%m-%d}, commit {options.commit}, {options.machine}."
    figure = f"![Points with 95 % intervals over seeds, by four measures]({name}.svg)"
    parts = [title, f"{run} {options.note} All trials: [{name}.csv]({name}.csv).", figure, rest]
    return re.sub(" +", " ", "\n\n".join(parts))


def _figure(folder: str) -> str:
    spec, rows, baseline = read_spec(folder), read_csv(f"{folder}/results.csv"), read_baseline(folder)
    measured = [metric for metric in PANELS if any(metric in row.metrics for row in rows)]
    drawn = [
        draw_points(
            analyze(rows, spec.model_copy(update={"metric": metric, "mode": "max"}), baseline), title=PANELS[metric]
        )
        for metric in measured
    ]
    heights = [float(re.findall(r'viewBox="0 0 \d+ ([\d.]+)"', panel)[0]) for panel in drawn]
    tall = max(heights)
    placed = [
        re.sub(
            '<svg class="plot"',
            f'<svg x="{GAP + (index % 2) * (WIDTH + GAP)}" y="{GAP + (index // 2) * (tall + GAP)}" '
            f'width="{WIDTH}" height="{height:g}"',
            panel,
        )
        for index, (panel, height) in enumerate(zip(drawn, heights, strict=True))
    ]
    across, down = 2 * WIDTH + 3 * GAP, GAP + -(-len(drawn) // 2) * (tall + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down:g}" width="{across}" height="{down:g}">'
        f'<style>{STYLE}</style><rect class="back" width="100%" height="100%"/>{"".join(placed)}</svg>\n'
    )


if __name__ == "__main__":
    main()
