"""The baselines that a run compares its model with."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.evaluation.baselines import Ease, Ials, MostPopular, Repeats, Transitions
from tfrs_pipeline.evaluation.evaluate import evaluate
from tfrs_pipeline.model.notes import OnProgress
from tfrs_pipeline.retrieval import Retriever
from tfrs_pipeline.run.data import RunData, final_part

Baseline: TypeAlias = MostPopular | Repeats | Transitions | Ease | Ials

# Shares of the latest positives by which popularity is counted in a split by time: for a test on
# later days, recent popularity may be a better guess.
_LATEST = (1.0, 0.2, 0.05, 0.01)


def fit_baselines(
    config: RunConfig,
    data: RunData,
    on_progress: OnProgress = lambda *task: None,
    *,
    grids: Mapping[str, Sequence[Baseline]] | None = None,
) -> tuple[dict[str, Retriever], list[str]]:
    """Fits the baselines of a config, and notes what was chosen and what was skipped.

    `grids` are lists of baselines by name, to choose from on validation in place of the usual one.
    """
    latest = _LATEST if data.split.kind == "time" else (1.0,)
    choices: dict[str, Sequence[Baseline]] = {
        "popularity": [MostPopular(latest=share) for share in latest],
        "repeats": [Repeats()],
        "transitions": [Transitions()],
        "ease": [Ease()],
        "ials": [Ials(seed=config.seed)],
        **(grids or {}),
    }

    def score(baseline: Baseline) -> float:
        # The same number of users as for the model's epoch.
        validation = data.validation.sample(config.training.validation_users, config.seed)
        exclude, cutoffs = config.evaluation.exclude, config.evaluation.cutoffs
        fitted = baseline.fit(data.split.train)
        found = evaluate(fitted, validation, exclude=exclude, cutoffs=cutoffs, num_bootstrap=0)
        return found.first.overall.intervals[config.training.monitor].mean

    final, num_items = final_part(config, data.split), len(data.test.candidate_ids)
    found: dict[str, Retriever] = {}
    notes = []
    for name in config.evaluation.baselines:
        # "uncorrected" is trained like the model; "repeats" would have nothing left to find.
        if name == "uncorrected" or (name == "repeats" and config.evaluation.exclude != "none"):
            continue
        if name == "ease" and num_items > Ease.max_candidates:
            notes.append(
                f"ease: skipped, because it inverts an item-by-item matrix and {num_items:,} items "
                f"are more than {Ease.max_candidates:,}"
            )
            continue
        if name == "transitions" and data.split.log.order == "none":
            notes.append("transitions: skipped, because the log has no order")
            continue
        best = choices[name][0]
        if len(choices[name]) > 1:
            on_progress(f"{name}, choosing on validation", 0, 0)
            best = max(choices[name], key=score)
            notes.append(f"{name}: {best!r}, best of {len(choices[name])} on validation")
        found[name] = best.fit(final)
    return found, notes
