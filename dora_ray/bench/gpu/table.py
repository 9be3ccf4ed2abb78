"""Table of a check: figures beside their targets and references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Dense bf16 TFLOP/s from the vendor's data sheets; torch's device names contain these words.
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L40S": 362.0}
# The best published shares of peak for the training of a ViT.
PUBLISHED = {"exact": "ViT-S 23 %", "vit_base": "ViT-B 23 %", "vit_large": "ViT-L 36-38 %"}
TARGETS = "targets: 4 times the reference, 40 % of a large square product's rate, half of the reference's memory"
FORMS = (
    "reference",
    "exact",
    "graph",
    "compiled",
    "graph_compiled",
    "packed",
    "packed_compiled",
    "every_second",
    "fp8_teacher",
    "not_deterministic",
    "vit_base",
    "vit_base_graph",
    "vit_large",
)
LEARNT = ("knn", "matching", "j_and_f")


def render(result: Mapping[str, Any], *, heading: bool = True) -> str:
    """Return a check's result as a plain-text table."""
    lines: list[str] = []
    if heading:
        lines += [f"{name}: {value}" for name, value in result["machine"].items()]
        lines += ["a rehearsal: sizes and times are meaningless"] if result["rehearsal"] else []
    for name, part in result["parts"].items():
        lines += ["", f"== {name}: {part['state']}, {part['seconds']:.0f} s"]
        lines += RENDERERS[name](part["figures"], str(result["machine"]["device"]))
        lines += [f"  | {line}" for line in part.get("log", "").splitlines()[-12:]]
    return "\n".join(lines) + "\n"


def _tests(figures: Mapping[str, Any], device: str) -> Iterator[str]:
    outcomes = [value["outcome"] for value in figures.values()]
    yield ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
    for name, value in figures.items():
        if value["outcome"] == "failed":
            yield f"FAILED {name}: {str(value.get('reason', '')).strip().splitlines()[-1]}"


def _step(figures: Mapping[str, Any], device: str) -> Iterator[str]:
    yield ", ".join(f"{name} {value}" for name, value in figures.get("setting", {}).items())
    rows = [["form", "ms", "clips/s", "speed-up", "peak MB", "memory", "noise", "first s"]]
    reference = figures.get("reference", {})
    for name in FORMS:
        form = figures.get(name)
        if form is None:
            continue
        if "seconds" not in form:
            rows.append([name, str(form.get("failed") or form["skipped"])])
            continue
        # The larger networks have no reference.
        of = {} if name.startswith("vit") else reference
        rows.append(
            [
                name,
                f"{1e3 * form['seconds']:.1f}",
                f"{form['clips_per_second']:.1f}",
                _ratio(of.get("seconds"), form["seconds"], "{:.2f} x"),
                f"{form['peak_mb']:.0f}" if "peak_mb" in form else "-",
                _ratio(form.get("peak_mb"), of.get("peak_mb"), "{:.2f}"),
                f"{form['noise']:.0%}",
                f"{form['first_seconds']:.1f}",
            ]
        )
    yield from _aligned(rows)
    yield "speed-up and memory: against the reference, which runs one naive forward per frame and object"
    yield from _rates(figures, device)
    yield TARGETS
    parts = figures.get("parts", {})
    yield "ms by part: " + ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in parts.items())


def _rates(figures: Mapping[str, Any], device: str) -> Iterator[str]:
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in device), None)
    rows = [["rate of", "TFLOP/s", "of own shapes", "of a square", "of peak", "best published, of peak"]]
    for name, published in PUBLISHED.items():
        rates = figures.get("rates" if name == "exact" else name, {})
        if "tflop_per_second" in rates:
            rate = rates["tflop_per_second"]
            rows.append(
                [
                    name,
                    f"{rate:.2f}",
                    f"{rates['share_of_own_shapes']:.0%}",
                    f"{rates['share_of_square']:.0%}",
                    "-" if peak is None else f"{rate / peak:.0%}",
                    published,
                ]
            )
    yield from _aligned(rows)
    if "share_of_own_shapes" in figures.get("timm", {}):
        yield f"timm's plain ViT reaches {figures['timm']['share_of_own_shapes']:.0%} of its own shapes"


def _profile(figures: Mapping[str, Any], device: str) -> Iterator[str]:
    for name, found in figures.items():
        if "failed" in found:
            yield f"{name}: {found['failed']}"
            continue
        yield (
            f"{name}: {found['kernels']:.0f} {found['of']} a step, {found.get('wall_ms', 0):.1f} ms, busy "
            f"{found.get('busy_ms', 0):.1f} ms, {found.get('gap_share', 0):.0%} in gaps, "
            f"{found.get('long_gaps', 0):.0f} of them long ({found.get('long_gaps_ms', 0):.1f} ms)"
        )
        for top in found["top"][:12]:
            yield f"  {top['share']:5.1%} {top['ms']:8.2f} ms {top['calls']:7.1f} x  {top['name'][:80]}"
        for wait in found["waits"][:8]:
            yield f"  host waits: {wait['calls']:.1f} x {wait['call']} in {wait['part']}, {wait['ms']:.2f} ms"
        yield f"  trace: {found.get('trace', 'not kept')}"


def _learning(figures: Mapping[str, Any], device: str) -> Iterator[str]:
    setting = figures.get("setting", {})
    yield ", ".join(f"{name} {_plain(value)}" for name, value in setting.items())
    random = [value for name, value in figures.items() if name.startswith("random_") and name[-1].isdigit()]
    rows = [["", "steps", "seconds", "clips/s", *LEARNT, "loss", "KL from uniform"]]
    for name, value in figures.items():
        if name == "setting":
            continue
        if "failed" in value:
            rows.append([name, str(value["failed"])])
            continue
        last = value.get("last", {})
        rows.append(
            [
                name,
                str(value.get("steps", 0)),
                _plain(value.get("train_seconds", 0.0)),
                _plain(value.get("clips_per_second", 0.0)),
                *(_against(value[key], [one.get(key) for one in random], name) for key in LEARNT),
                _plain(last.get("loss", "-")),
                _plain(last.get("teacher_kl_uniform", "-")),
            ]
        )
    yield from _aligned(rows)
    yield "in brackets: difference to the mean of the random encoders"


def _against(value: float, random: Sequence[float | None], name: str) -> str:
    known = [one for one in random if one is not None]
    if name[-1].isdigit() or not known:
        return f"{value:.3f}"
    return f"{value:.3f} ({value - sum(known) / len(known):+.3f})"


def _ratio(above: float | None, below: float | None, form: str) -> str:
    return form.format(above / below) if above is not None and below else "-"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows if len(row) > 2 and i < len(row)) for i in range(len(rows[0]))]
    for row in rows:
        if len(row) == 2:
            yield f"{row[0]:<{widths[0]}}  {row[1]}"
        else:
            yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


RENDERERS = {"tests": _tests, "step": _step, "profile": _profile, "learning": _learning}
