"""The report of a run: what its folder holds, gathered for the page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ibis

from tfrs_pipeline.config import RunConfig, load_config
from tfrs_pipeline.data.schema import Tables, read_tables
from tfrs_pipeline.negatives.batches import TrainingBatches
from tfrs_pipeline.negatives.mined import MINED
from tfrs_pipeline.negatives.mixture import num_unreachable
from tfrs_pipeline.report.page import LEFT_OUT, Popularity, RunFacts, report_page
from tfrs_pipeline.run import stored_split, training_batches
from tfrs_pipeline.samples.build import read_samples
from tfrs_pipeline.samples.popularity import sampling_probability
from tfrs_pipeline.samples.positives import positive_probability

REPORT_FILE = "report.html"


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Writes the report of a finished run: one HTML file that needs no other.

    Args:
        folder: Of the run.
        output: Where to write; None is report.html in the folder.

    Returns:
        Where it was written.

    Raises:
        ValueError: If the folder holds no finished run.
        OSError: If the file cannot be written.
    """
    path = folder / REPORT_FILE if output is None else output
    path.write_text(report_page(gather_facts(folder)), encoding="utf-8")
    return path


def gather_facts(folder: Path) -> RunFacts:
    """Reads what the report of a run tells; nothing is trained or written.

    Raises:
        ValueError: If the folder holds no finished run.
    """
    require_finished_run(folder)
    config = load_config(folder / "config.toml")
    metrics = json.loads((folder / "metrics.json").read_text())
    tables = read_tables(folder / "data")
    split, _ = stored_split(tables, config, folder / "data")
    samples_folder = folder / "samples" / "final"
    batches = training_batches(config, read_samples(samples_folder))
    is_mined = any(sampler.stage == MINED for sampler in config.samples.hard_negatives)
    return RunFacts(
        folder=str(folder),
        config=config,
        metrics=metrics,
        table_sizes={
            name: table.count().to_pyarrow().as_py()
            for name, table in (
                ("events", tables.events),
                ("items", tables.items),
                ("users", tables.users),
            )
        },
        dropped=tables.dropped,
        events_by_stage=_events_by_stage(tables.events, split),
        items_by_part=_items_by_part(split),
        samples=json.loads((samples_folder / "report.json").read_text()),
        masked_shares=batches.masked_shares(),
        mean_hard_share=None if is_mined else batches.mean_hard_share,
        popularity=_popularity(config, batches),
        titles=_titles(tables, metrics),
    )


def require_finished_run(folder: Path) -> None:
    """Checks that a folder holds a finished run.

    Raises:
        ValueError: If it does not; the message says what to do.
    """
    if (folder / "comparison.json").is_file():
        raise ValueError(
            f"{folder} holds a comparison, and its report is there: {folder / 'comparison.md'}, "
            f"with the figure {folder / 'comparison.png'}"
        )
    if not (folder / "config.toml").is_file():
        raise ValueError(
            f"{folder} is no run: it has no config.toml. Give the folder that `tfrs-pipeline run` "
            "named first, runs/... unless told otherwise"
        )
    if not (folder / "metrics.json").is_file():
        command = "compare" if (folder / "plans").is_dir() else "run"
        again = shlex.join(["tfrs-pipeline", command, "--run-dir", str(folder)])
        raise ValueError(
            f"{folder} holds a {'comparison' if command == 'compare' else 'run'} that is not "
            f"finished; finish it with:  {again}"
        )


def _events_by_stage(events: ibis.Table, split: ibis.Table) -> dict[str, dict[str, int]]:
    in_all = events.group_by("stage").agg(num=events.count()).to_pyarrow().to_pylist()
    in_parts = split.group_by(["stage", "part"]).agg(num=split.count()).to_pyarrow().to_pylist()
    counts: dict[str, dict[str, int]] = {row["stage"]: {} for row in in_all}
    for row in in_parts:
        counts[row["stage"]][row["part"]] = row["num"]
    for row in in_all:
        if left_out := row["num"] - sum(counts[row["stage"]].values()):
            counts[row["stage"]][LEFT_OUT] = left_out
    return counts


def _items_by_part(split: ibis.Table) -> dict[str, int]:
    counts = split.group_by("part").agg(num=split["item_id"].nunique()).to_pyarrow().to_pylist()
    return {row["part"]: row["num"] for row in counts}


def _popularity(config: RunConfig, batches: TrainingBatches) -> Popularity:
    samplers = {"in-batch": batches.q_positive} if config.samples.in_batch else {}
    for easy in config.samples.easy_negatives:
        name = "uniform" if easy.alpha == 0 else f"clicks^{easy.alpha:g}"
        samplers[name] = sampling_probability(batches.counts, easy.alpha)
    return Popularity(
        counts=batches.counts[1:],
        before=positive_probability(batches.counts)[1:],
        after=batches.positive_share[1:],
        samplers={name: probability[1:] for name, probability in samplers.items()},
        num_unreachable=num_unreachable(batches.expected_count),
    )


def _titles(tables: Tables, metrics: dict[str, Any]) -> dict[Any, str]:
    """Reads the titles of the items that the examples show."""
    shown: Iterable[Any] = {
        id_
        for example in metrics.get("examples", [])
        for id_ in (*example["history"], *example["recommended"])
    }
    if "title" not in tables.items.columns or not shown:
        return {}
    items = tables.items.filter(tables.items["item_id"].isin(list(shown)))
    found = items.select("item_id", "title").to_pyarrow().to_pydict()
    return {
        id_: title for id_, title in zip(found["item_id"], found["title"], strict=True) if title
    }
