"""Decides whether a model is exported: not if a baseline or the version in service is better."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tfrs_pipeline.answers.publish import MANIFEST_FILE, NotPublished, versions_of
from tfrs_pipeline.answers.retriever import LoadedRetriever, load
from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.data.schema import ASKED
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.evaluation.bootstrap import Interval
from tfrs_pipeline.evaluation.results import Evaluation
from tfrs_pipeline.features.encoding import request_signature
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.messages import sentence
from tfrs_pipeline.model.bonus_choice import item_graph
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.search.history_bonus import HistoryBonus
from tfrs_pipeline.search.topk import ExactRetriever, ScoreRetriever

IN_SERVICE = "in_service"  # The version's name in an evaluation.
BEST_MEMBER = "best_member"  # The name of the first member of a sum.


def pass_gate(
    config: RunConfig,
    folder: RunFolder,
    evaluation: Evaluation,
    baselines: Sequence[str],
    failed: Mapping[str, str],
) -> Iterator[str]:
    """Compares the model with the baselines, and with the version in service if that is measured.

    It is not compared with its own export. `failed` says, by name, why baselines could not be
    measured. Yields notes; raises `NotPublished` if the model is worse, or if every baseline
    failed.
    """
    export, monitor, models = config.export, config.training.monitor, config.model_folder
    # By the flag that overrules each. All are collected, so that one error names every flag.
    refusals: dict[str, str] = {}
    beaten = beaten_by_baseline(evaluation, monitor, baselines)
    if failed and not baselines:
        name, why = next(iter(failed.items()))
        beaten = f"No baseline could be measured to compare the model with. {name}: {sentence(why)}"
    if beaten and export.if_beaten:
        yield f"exported anyway, as export.if_beaten allows: {beaten}"
    elif beaten:
        refusals["--export.if_beaten"] = beaten
    if IN_SERVICE in evaluation.results:
        own = folder.own_version(config)
        is_worse, text = worse_than_version(evaluation, monitor, models, without=own)
        if is_worse and export.gate:
            refusals["--no-export.gate"] = text
        else:
            yield f"exported anyway, without the gate: {text}" if is_worse else text
    elif export.gate:
        yield "no version is in service yet"
    if refusals:
        stays = f"{models} stays as it is. " if versions_of(models) else ""
        kept = f"{stays}The trained run is kept: --run-dir {folder.path} with"
        flags = " ".join(refusals)
        raise NotPublished(f"{' '.join(refusals.values())} {kept} {flags} exports it anyway.")


def version_in_service(
    folder: Path, candidate_ids: np.ndarray, split: Split, *, without: Path | None = None
) -> ScoreRetriever | None:
    """Loads a model's newest version, to measure it beside a new one.

    If the version holds no user data, users' features come from the log. The item graph of its
    bonus is built from events before the test, as the new model's is, because the stored graph may
    know the test.

    Args:
        folder: Folder of the model.
        candidate_ids: Ids of the new model's items; its export retrieves those that the log lists.
        split: The new model's split.
        without: A version to pass over.

    Returns:
        The version as a retriever of these items; None if there is no version.

    Raises:
        ValueError: If the version has none of the items.
    """
    newest = _newest(folder, without)
    if newest is None:
        return None
    # Both models are searched exactly, so that they differ only in what they have learned.
    retriever = load(newest, exact=True, live=False)
    known, embeddings = retriever.candidates.ids_and_vectors()
    # The ids' type may differ from this run's. NumPy would compare each text with every other.
    is_there = Ids(candidate_ids).rows(known) > 0
    if not is_there.any():
        (theirs, *_), (ours, *_) = known.tolist(), candidate_ids.tolist()
        raise ValueError(
            f"{newest} is in service and has none of the {len(candidate_ids):,} items of this run: "
            f"its ids are like {theirs!r}, these like {ours!r}. Set another export.name, or export "
            "without export.gate."
        )
    known, embeddings = known[is_there], embeddings[is_there]
    # Score these items for the old version too, so that both models rank the same candidates.
    unlisted = np.setdiff1d(np.setdiff1d(candidate_ids, split.log.listed_ids), known)
    if len(unlisted):
        features = retriever.features["candidate"]
        nothing = {feature.name: [None] * len(unlisted) for feature in features}
        embedded, is_trained = retriever.embed_candidates(unlisted.tolist(), nothing)
        known = np.concatenate([known, unlisted[is_trained]])
        embeddings = np.concatenate([embeddings, embedded[is_trained]])
    exact = ExactRetriever(known, embeddings, _query_embedder(retriever, split.log))
    if (record := retriever.manifest["bonus"]) is None:
        return exact
    bonus = HistoryBonus.read(record, None)
    if bonus.neighbours is not None:
        users = split.before_test.users["user_id"].to_pyarrow().to_numpy()
        graph = item_graph(split.before_test, users, exact.items.values, bonus.neighbours.kind)
        bonus = replace(bonus, graph=graph)
    return bonus.added_to(exact)


def _query_embedder(
    retriever: LoadedRetriever, log: Log
) -> Callable[[Sequence[Query]], np.ndarray]:
    """Returns a function that embeds a run's queries with a version, by the features both have."""

    def unchanged_features(side: str, kinds: Mapping[str, str]) -> list[Feature]:
        # A feature whose kind has changed would be encoded wrongly.
        features = retriever.features[side]
        return [feature for feature in features if kinds.get(feature.name) == feature.kind]

    read = request_signature(unchanged_features("request", log.request_features), reads_times=True)
    names: list[str] = []
    if not retriever.manifest["user_data"]:
        names = [feature.name for feature in unchanged_features("query", log.user_features)]

    def embed(queries: Sequence[Query]) -> np.ndarray:
        by_user: dict[Any, dict[str, Any]] = {}
        if names:
            ids = [query["user_id"] for query in queries]
            users = log.users.filter(log.users["user_id"].isin(ids))
            rows = users.select("user_id", *names).to_pyarrow().to_pylist()
            by_user = {row.pop("user_id"): row for row in rows}
        readable = [dict(query) for query in queries]
        for query in readable:
            # The version in service does not read request features that are new in this run.
            values = (query.get("request") or {}).items()
            query["request"] = {name: value for name, value in values if name in read}
            if names:
                query["features"] = by_user.get(query["user_id"], {})
        return retriever.embed_queries(readable)

    return embed


def _newest(folder: Path, without: Path | None) -> Path | None:
    versions = (folder / str(number) for number in reversed(versions_of(folder)))
    return next((version for version in versions if version != without), None)


def worse_than_version(
    evaluation: Evaluation, metric: str, folder: Path, *, without: Path | None = None
) -> tuple[bool, str]:
    """Returns whether the new model may be worse than the version in service, and why, in words.

    The evaluation measures the new model, first, and `IN_SERVICE` on the same queries. The model
    may be worse if it is so by the 95% interval, or if a single query leaves no interval.
    """
    version = _newest(folder, without)
    assert version is not None  # It was measured.
    comparison = _described(evaluation, metric, IN_SERVICE, f"version {version.name} in service")
    theirs = read_record(version / MANIFEST_FILE, check_files=False)["exclude"]
    if theirs != (ours := evaluation.first.exclude):  # Its users will be offered other items.
        comparison += f", both with evaluation.exclude {ours}; that version has {theirs}"
    # The interval is of the version's mean minus the new model's. If all of it is above 0, the new
    # model is significantly worse.
    lowest = evaluation.differences[IN_SERVICE][metric].low
    if lowest > 0:
        return True, f"The new model is worse than the one in service. {comparison}."
    if np.isnan(lowest):
        return True, f"One test query cannot tell which model is better. {comparison}."
    return False, f"not worse than the version in service. {comparison}"


def beaten_by_baseline(evaluation: Evaluation, metric: str, baselines: Sequence[str]) -> str:
    """Names the best baseline that is significantly better than the first model; "" if none is."""
    gains = {name: evaluation.differences[name][metric] for name in baselines}
    ahead = [name for name, gain in gains.items() if gain.low > 0]
    if not ahead:
        return ""
    # The one that is furthest ahead says most about what the model lacks.
    best = max(ahead, key=lambda name: gains[name].mean)
    comparison = _described(evaluation, metric, best, f"the baseline {best}")
    return f"A baseline beats the new model. {comparison}."


def _described(evaluation: Evaluation, metric: str, other: str, written: str) -> str:
    """Describes the first model and another: both means, and the first minus the other."""
    new, old = (
        result.overall.intervals[metric].mean
        for result in (evaluation.first, evaluation.results[other])
    )
    better = evaluation.differences[other][metric]  # The other minus the first.
    # 0 - x instead of -x: the negative of 0.0 would be shown as -0.0000. The ends swap places.
    gain = Interval(0 - better.mean, 0 - better.high, 0 - better.low).written("+")
    return (
        f"Asked {ASKED[evaluation.asked_by]}, {metric} {new:.4f}, and {old:.4f} of {written}: "
        f"{gain} on the same "
        f"{len(evaluation.first.user_ids):,} queries"
    )
