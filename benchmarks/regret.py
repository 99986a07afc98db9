"""Compares a run as it is with the best single model: a table of regret.

Measures for each log, on the same test and by the question that decides there, NDCG@100, recall@100
and the CPU minutes of

    run           `tfrs-pipeline run` as it is, without the export
    winner        the race's winner alone, as the run measures it beside its sum
    a recipe      each that races, trained alone to its end (`--preset NAME`)
    a baseline    in the form that validation chooses, measured in the first run
    lenskit-auto  LensKit-Auto, which searches for as long as the run's CPU time (--lenskit PYTHON)

The regret of the run is 1 - run / best, where the best single model, a recipe or a baseline, is
chosen on the test, which no one can do in practice. Below 0, the run beats them all.

    python benchmarks/regret.py --data-dir LOGS --to FOLDER --json benchmarks/results/regret.json

LOGS holds event files, NAME.parquet, as `log_kinds.py` writes them: with the parts of a split, so
that these results are on the splits of earlier ones. The runs go to FOLDER. A result in the JSON
file is not measured again. A run that was stopped is resumed, and the CPU minutes before that are
not counted. A failure is printed, and tried again next time.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from log_kinds import EXCLUDE
from record import parser_with_json, write_json

from tfrs_pipeline.config import load_config
from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.data.schema import AskedBy, is_positive
from tfrs_pipeline.evaluation.baselines import BASELINES
from tfrs_pipeline.presets import RECIPES
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.search.topk import ScoreRetriever

NO_ORDER = "--no-data.is_ordered"
METRICS = ("ndcg@100", "recall@100")


def flags_of(path: Path) -> list[str]:
    """Returns the flags of a run on an event file."""
    flags = ["--data.path", str(path)]
    if "part" in pq.read_schema(path).names:
        flags += ["--split.kind", "column"]
    if path.stem in EXCLUDE:
        flags += ["--evaluation.exclude", EXCLUDE[path.stem]]
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


def lenskit(python: str, folder: Path, minutes: float) -> tuple[dict[str, Any], float]:
    """Measures LensKit-Auto on the split of a finished run; returns metrics and CPU minutes."""
    config, source, to = load_config(folder / "config.toml"), RunFolder(folder), folder / "lenskit"
    to.mkdir(exist_ok=True)
    log = Log.read(source.data, connect(config.data.memory_limit))
    split = Split.read(log, source.split)
    split.before_test.events.filter(is_positive).select("user_id", "item_id").to_parquet(
        to / "train.parquet"
    )
    by: AskedBy = "users" if log.order == "none" else "requests"
    test = split.holdout("test", config.evaluation.max_users, config.seed, by=by)
    histories = [history.tolist() for history in test.histories]
    queries = {"user_id": test.user_ids.tolist(), "history": histories}
    pq.write_table(pa.table(queries), to / "queries.parquet")
    script = Path(__file__).with_name("lenskit_auto.py")
    spent = timed([python, str(script), str(to), str(round(60 * minutes))])
    items, ranked = Ids(test.candidate_ids), pq.read_table(to / "ranked.parquet")["ranked"]
    answers = zip(test.as_queries(), ranked.to_pylist(), strict=True)
    rows_of = {_key(query): items.rows(ids) for query, ids in answers}

    def score(queries: Sequence[Query]) -> np.ndarray:
        scores = np.full((len(queries), len(items)), -np.inf, np.float32)
        for line, query in zip(scores, queries, strict=True):
            rows = rows_of[_key(query)]
            line[rows - 1] = -np.arange(len(rows))
        return scores

    options: dict[str, Any] = {"exclude": config.evaluation.exclude, "cutoffs": (100,)}
    result = tp.evaluate(ScoreRetriever(items, score), test, num_bootstrap=0, **options).first
    means = {metric: {"mean": result.overall.intervals[metric].mean} for metric in METRICS}
    return {"lenskit-auto": means}, spent


def _key(query: Query) -> tuple[Any, ...]:
    return query["user_id"], *query["history"]


def fill(
    cells: dict[str, dict[str, Any]],
    flags: list[str],
    folder: Path,
    python: str | None,
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
    if python is not None:
        makers["lenskit-auto"] = lambda: lenskit(
            python, folder / "run", cells["run"]["cpu_minutes"]
        )
    for name, make in makers.items():
        if name in cells:
            continue
        try:
            models, minutes = make()
        except (RuntimeError, KeyError) as error:
            yield f"{name:14} not measured: {error}"
            continue
        cells[name] = cell(
            models, "lenskit-auto" if name == "lenskit-auto" else "two_tower", minutes
        )
        if name == "run":  # The time of the baselines is part of the run's.
            cells |= {other: cell(models, other, None) for other in models if other in BASELINES}
            winner = "best_member" if "best_member" in models else "two_tower"
            cells["winner"] = cell(models, winner, None)
        yield f"{name:14} {cells[name]}"


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Returns the table of regret by log, with the mean and the largest regret at the end."""
    lines = [
        "| log | run | winner alone | best single on the test | regret | winner's | LensKit-Auto | "
        "CPU minutes: run, best |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    regrets: dict[str, list[float]] = {"run": [], "winner": []}
    for log, cells in results.items():
        singles = [name for name in cells if name in BASELINES or name in RECIPES]
        if "run" not in cells or not singles:
            continue
        best = max(singles, key=lambda name: cells[name]["ndcg@100"])
        ndcg = {}
        for name in ("run", "winner", "lenskit-auto", best):
            ndcg[name] = f"{cells[name]['ndcg@100']:.4f}" if name in cells else "-"
        for name, values in regrets.items():
            if name in cells:
                values.append(1 - cells[name]["ndcg@100"] / cells[best]["ndcg@100"])
        winner_regret = f"{regrets['winner'][-1]:+.1%}" if "winner" in cells else "-"
        minutes = [cells[name]["cpu_minutes"] for name in ("run", best)]
        spent = ", ".join("in the run" if m is None else f"{m:.1f}" for m in minutes)
        lines.append(
            f"| {log} | {ndcg['run']} | {ndcg['winner']} | {best} {ndcg[best]} | "
            f"{regrets['run'][-1]:+.1%} | {winner_regret} | {ndcg['lenskit-auto']} | {spent} |"
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
    parser.add_argument("--lenskit", metavar="PYTHON", help="Interpreter with lenskit-auto.")
    options = parser.parse_args()
    is_there = options.json is not None and options.json.exists()
    results: dict[str, Any] = json.loads(options.json.read_text())["logs"] if is_there else {}
    budget = ["--budget", options.budget] if options.budget else []
    names = options.logs or sorted(path.stem for path in options.data_dir.glob("*.parquet"))
    for log in names:
        flags = flags_of(options.data_dir / f"{log}.parquet")
        cells = results.setdefault(log, {})
        for line in fill(cells, flags, options.to / log, options.lenskit, budget):
            print(f"{log:16} {line}", flush=True)
            if options.json is not None:
                write_json(options.json, {"logs": results})
    print(table(results))


if __name__ == "__main__":
    main()
