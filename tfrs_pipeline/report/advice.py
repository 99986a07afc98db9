"""Says what to try if a run's numbers are not good, from `metrics.json` and the settings."""

from collections.abc import Iterator

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.evaluation.bootstrap import Outcome
from tfrs_pipeline.messages import counted
from tfrs_pipeline.report.verdict import WRITTEN, Metrics, compared_with_baselines, listed

# Fewer steps without a gain do not mean that training has converged.
_PATIENT = 50
# With fewer positives per item, an embedding per item learns little.
_FEW_POSITIVES = 10
# Fewer queries do not tell models apart.
_FEW_QUERIES = 30
# Above this share of new items, the numbers are mostly about them.
_MANY_NEW = 0.3
# Popularity changes if recent popularity finds this much more of the latest positives than that of
# all time: it found .06 and .09 more on two logs that change, at most .01 on four others.
_TREND = 0.02
# Excluded items are mentioned if they exceed this share of the items to find.
_MANY_EXCLUDED = 0.2


def advice(metrics: Metrics, metric: str, config: RunConfig) -> Iterator[str]:
    """Says what to try, given the metrics; never what the settings already have.

    A model that is clearly better in `metric` gets only advice on longer training, the correction
    and what the test measures.
    """
    models = metrics["models"]
    first = next(iter(models))
    yield from (measures := list(_beside_the_question(models[first], config)))
    num_positives = metrics["split"]["train"]["num_positives"]
    training = metrics["training"][first]
    values = training["history"].get(f"val_{config.training.monitor}", [])
    if config.warm_start is None:  # A warm start has few epochs on purpose.
        yield from _stopped(training["best_epoch"], len(values), num_positives, config)
    if measures:  # Then the other numbers answer another question.
        return
    if _is_better("two_tower_uncorrected", metrics, metric):
        yield "the correction costs here: without it the model is better. Set model.correction none"
    if compared_with_baselines(metrics, metric).outcome in (None, Outcome.BETTER):
        return
    slices = models[first]["slices"].values()
    num_items = max(sum(part["num_candidates"] for part in slices), 1)
    if num_positives < _FEW_POSITIVES * num_items:
        yield (
            f"too few positives: {num_positives:,} in training for {num_items:,} items, "
            f"{num_positives / num_items:.1f} each; a longer log may help"
        )
    if _is_better("repeats", metrics, metric):
        yield (
            "behind the user's own items again, which a service can show without a model: to "
            "measure what else a user clicks, set evaluation.exclude to clicked"
        )
    if _is_better("popularity", metrics, metric):
        yield from _behind_popularity(metrics, config)
    else:
        yield from _behind_item_models(metrics, metric, config)


def _stopped(best: int, num_epochs: int, num_positives: int, config: RunConfig) -> Iterator[str]:
    """Says whether training stopped at its best epoch, or too few steps after it."""
    training, waited = config.training, num_epochs - best
    batch_size = training.fitting(num_positives).batch_size
    num_steps = waited * -(-num_positives // batch_size)
    if not waited:
        yield (
            f"training stopped too early: validation {training.monitor} was best after the last of "
            f"{counted(num_epochs, 'epoch')}. Raise training.max_epochs"
        )
    elif training.patience <= waited and num_epochs < training.max_epochs and num_steps < _PATIENT:
        yield (
            f"training stopped {counted(waited, 'epoch')} after its best, in a log this small "
            f"only {counted(num_steps, 'step')}: validation may rise again. "
            f"Try --training.patience {training.max_epochs}"
        )


def _beside_the_question(model: Metrics, config: RunConfig) -> Iterator[str]:
    """Says where the test measures something other than a user's next items."""
    num_queries, num_empty = model["num_queries"], model.get("num_empty_histories", 0)
    if num_queries < _FEW_QUERIES:
        few = counted(num_queries, "test query")
        yield f"{few} cannot tell models apart: take a longer log, or a larger split.test"
    if num_empty > num_queries / 2:
        remedy = ". To test users with a history, set split.kind to last_share"
        yield (
            f"{num_empty:,} of {num_queries:,} test queries have an empty history: the test is of "
            f"new users{remedy if config.split.kind != 'last_share' else ''}"
        )
    num_left, num_excluded = model["num_relevant"], model["num_relevant_excluded"]
    are_many = num_excluded > _MANY_EXCLUDED * (num_left + num_excluded)
    if are_many and config.evaluation.exclude != "none":
        yield (
            f"{num_excluded:,} of {num_left + num_excluded:,} items to find are excluded, because "
            f"their users had {config.evaluation.exclude} them before. If they may come again, set "
            "evaluation.exclude to none (docs/guides/seen.md)"
        )
    if (num_new := model.get("num_relevant_unclicked", 0)) > _MANY_NEW * num_left:
        features = "" if config.data.item_features else ", of which data.item_features has none"
        yield (
            f"{num_new:,} of {num_left:,} items to find have no positive in training: only their "
            f"features can find them{features} (docs/guides/new_items.md)"
        )


def _behind_popularity(metrics: Metrics, config: RunConfig) -> Iterator[str]:
    remedies, trend = [], metrics.get("signals", {}).get("trend", {"value": 0.0, "beside": 0.0})
    has_trend = trend["value"] - trend["beside"] > _TREND and config.model.correction != "recent"
    if config.model.use_candidate_id and (has_trend or not config.model.candidate_bias):
        more = " and model.correction recent, since what is popular changes" if has_trend else ""
        remedies.append(f"set model.candidate_bias{more}")
    if config.split.kind in (None, "time"):
        remedies.append("check with split.kind last_share whether popularity has changed over time")
    if remedies:
        yield f"behind popularity: {', or '.join(remedies)}"


def _behind_item_models(metrics: Metrics, metric: str, config: RunConfig) -> Iterator[str]:
    """Says what to try if transitions, EASE or iALS are better than the model."""
    names = [x for x in ("transitions", "ease", "ials") if _is_better(x, metrics, metric)]
    if not names:
        return
    model, remedies = config.model, []
    # A recipe that raced has lost, or is the model.
    untried = {"sequence", "sets"} - metrics.get("race", {}).get("recipes", {}).keys()
    of_sequences, of_sets = (config.training.examples == x for x in ("sequences", "sets"))
    if "transitions" in names and not of_sequences and "sequence" in untried:
        remedies.append("take --preset sequence, which learns from the order")
    if not config.data.is_ordered and not of_sets and "sets" in untried:
        remedies.append("take --preset sets")
    reads_ids = model.use_candidate_id or model.history_pooling
    if reads_ids and model.item_init == "random" and config.warm_start is None:
        remedies.append("set model.item_init svd")
    if not config.data.item_features:
        remedies.append("give features of the items (data.item_features)")
    remedies.append("more model.negatives")
    yield f"behind {listed([WRITTEN[x] for x in names])}: {', or '.join(remedies)}"


def _is_better(name: str, metrics: Metrics, metric: str) -> bool:
    above = metrics["differences"].get(name, {}).get(metric)
    return bool(above) and (above["low"] or 0) > 0
