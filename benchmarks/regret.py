"""Compares a run as it is with the best single model: a table of regret.

Measures for each log, on the same test and by the question that decides there, NDCG@100, recall@100
and the CPU minutes of

    run           `tfrs-pipeline run` as it is, without the export
    winner        the race's winner alone, as the run measures it beside its sum
    a recipe      each that races, trained alone to its end (`--preset NAME`)
    a baseline    in the form that validation chooses, measured in the first run

The regret of the run is 1 - run / best, where the best single model, a recipe or a baseline, is
chosen on the test, which no one can do in practice. Below 0, the run beats them all.

    python benchmarks/regret.py --data-dir LOGS --to FOLDER --json benchmarks/results/regret.json

LOGS holds event files, NAME.parquet, with the column `part` of a split, as `unseen_logs.py` writes
them, or without it; NAME ends with ", no order" where the log has none. The runs go to FOLDER. A
result in the JSON file is not measured again. A run that was stopped is resumed, and the CPU
minutes before that are not counted. A failure is printed, and tried again next time.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from record import parser_with_json, write_json
from unseen_logs import RETURNING

from tfrs_pipeline.evaluation.baselines import BASELINES
from tfrs_pipeline.presets import RECIPES

NO_ORDER = "--no-data.is_ordered"
METRICS = ("ndcg@100", "recall@100")


def flags_of(path: Path) -> list[str]:
    """Returns the flags of a run on an event file."""
    flags = ["--data.path", str(path)]
    if "part" in pq.read_schema(path).names:
        flags += ["--split.kind", "column"]
    if path.stem in RETURNING:
        flags += ["--evaluation.exclude", "none"]
    return flags + [NO_ORDER] * path.stem.endswith("no order")


def run(flags: Sequence[str], folder: Path) -> tuple[dict[str, Any], float]:
    """Calls `tfrs-pipeline run` on a folder; returns what metrics.json says, and CPU minutes."""
    program = [sys.executable, "-m", "tfrs_pipeline.cli", "run", "--export.index", "none"]
    minutes = timed([*program, *flags, "--run-dir", str(folder)])
    return json.loads((folder / "metrics.json").read_text())["models"], minutes


def timed(command: Sequence[str]) -> float:
    """Runs a command; returns the CPU minutes of it and of its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(" ".join((done.stderr or done.stdout).strip().splitlines()[-3:]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60


def cell(models: dict[str, Any], name: str, minutes: float | None) -> dict[str, Any]:
    """Returns the metrics of a model among those of a run."""
    means = {metric: models[name][metric]["mean"] for metric in METRICS}
    return means | {"cpu_minutes": minutes}


def fill(
    cells: dict[str, dict[str, Any]],
    flags: list[str],
    folder: Path,
    budget: list[str],
) -> Iterator[str]:
    """Measures what a log's cells lack; after each, yields a line to print."""
    ordered = [] if NO_ORDER in flags else ["--data.is_ordered"]
    makers: dict[str, Callable[[], tuple[dict[str, Any], float]]] = {
        "run": lambda: run([*flags, *budget], folder / "run"),
    }
    for name in RECIPES:
        single = [*flags, "--evaluation.baselines", "none", *ordered, "--preset", name]
        makers[name] = lambda single=single, name=name: run(  # type: ignore[misc]
            single, folder / name
        )
    for name, make in makers.items():
        if name in cells:
            continue
        try:
            models, minutes = make()
        except (RuntimeError, KeyError) as error:
            yield f"{name:14} not measured: {error}"
            continue
        cells[name] = cell(models, "two_tower", minutes)
        if name == "run":  # The time of the baselines is part of the run's.
            cells |= {other: cell(models, other, None) for other in models if other in BASELINES}
            winner = "best_member" if "best_member" in models else "two_tower"
            cells["winner"] = cell(models, winner, None)
        yield f"{name:14} {cells[name]}"


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Returns the table of regret by log, with the mean and the largest regret at the end."""
    lines = [
        "| log | run | winner alone | best single on the test | regret | winner's | "
        "CPU minutes: run, best |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    regrets: dict[str, list[float]] = {"run": [], "winner": []}
    for log, cells in results.items():
        singles = [name for name in cells if name in BASELINES or name in RECIPES]
        if "run" not in cells or not singles:
            continue
        best = max(singles, key=lambda name: cells[name]["ndcg@100"])
        ndcg = {}
        for name in ("run", "winner", best):
            ndcg[name] = f"{cells[name]['ndcg@100']:.4f}" if name in cells else "-"
        for name, values in regrets.items():
            if name in cells:
                values.append(1 - cells[name]["ndcg@100"] / cells[best]["ndcg@100"])
        winner_regret = f"{regrets['winner'][-1]:+.1%}" if "winner" in cells else "-"
        minutes = [cells[name]["cpu_minutes"] for name in ("run", best)]
        spent = ", ".join("in the run" if m is None else f"{m:.1f}" for m in minutes)
        lines.append(
            f"| {log} | {ndcg['run']} | {ndcg['winner']} | {best} {ndcg[best]} | "
            f"{regrets['run'][-1]:+.1%} | {winner_regret} | {spent} |"
        )
    for name, values in regrets.items():
        if values:
            mean = sum(values) / len(values)
            lines.append(f"Regret of {name}: mean {mean:+.1%}, largest {max(values):+.1%}")
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="Folder of the event files.")
    parser.add_argument("--to", type=Path, required=True, help="Folder of the runs.")
    parser.add_argument("--logs", nargs="+", metavar="LOG", help="Which; all that are there.")
    parser.add_argument("--budget", help="Of each race, such as 2m; 10m if not given.")
    options = parser.parse_args()
    is_there = options.json is not None and options.json.exists()
    results: dict[str, Any] = json.loads(options.json.read_text())["logs"] if is_there else {}
    budget = ["--budget", options.budget] if options.budget else []
    names = options.logs or sorted(path.stem for path in options.data_dir.glob("*.parquet"))
    for log in names:
        flags = flags_of(options.data_dir / f"{log}.parquet")
        cells = results.setdefault(log, {})
        for line in fill(cells, flags, options.to / log, budget):
            print(f"{log:16} {line}", flush=True)
            write_json(options.json, {"logs": results})
    print(table(results))


if __name__ == "__main__":
    main()
