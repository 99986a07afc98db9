"""Says what to try if a run's numbers are not good, from `metrics.json` and the settings.

Advice is a table: each row has what was measured, and the sentence that is said if it holds. A row
never suggests what the settings already have.
"""

from collections.abc import Iterator

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.evaluation.bootstrap import Outcome
from tfrs_pipeline.messages import counted
from tfrs_pipeline.report.verdict import Metrics, baselines_in, compared, listed

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
    name, model = next(iter(metrics["models"].items()))
    yield from (about_test := [*_about_test(model, config)])
    if config.warm_start is None:  # A warm start has few epochs on purpose.
        num_positives = metrics["split"]["train"]["num_positives"]
        yield from _about_training(metrics["training"][name], num_positives, config)
    if about_test:  # Then the other numbers answer another question.
        return
    if "two_tower_uncorrected" in ahead_of(metrics, metric):
        yield "the correction costs here: without it the model is better. Set model.correction none"
    if any(x.outcome is not Outcome.BETTER for x in baselines_in(metrics, metric)):
        yield from _about_baselines(metrics, metric, config)


def ahead_of(metrics: Metrics, metric: str) -> dict[str, str]:
    """Returns the models that are clearly better than the first, by name, with their labels."""
    pairs = compared(metrics, metric).items()
    return {name: x.name for name, x in pairs if x.outcome is Outcome.WORSE}


def _about_test(model: Metrics, config: RunConfig) -> Iterator[str]:
    """Says where the test measures something other than a user's next items."""
    num_queries, num_empty = model["num_queries"], model.get("num_empty_histories", 0)
    num_left, num_excluded = model["num_relevant"], model["num_relevant_excluded"]
    num_all, num_new = num_left + num_excluded, model.get("num_relevant_unclicked", 0)
    exclude = config.evaluation.exclude
    lacking = "" if config.data.item_features else ", of which data.item_features has none"
    remedy = ". To test users with a history, set split.kind to last_share"
    remedy = "" if config.split.kind == "last_share" else remedy
    rows = [
        (num_queries < _FEW_QUERIES,
         f"{counted(num_queries, 'test query')} cannot tell models apart: take a longer log, or a "
         "larger split.test"),
        (num_empty > num_queries / 2,
         f"{num_empty:,} of {num_queries:,} test queries have an empty history: the test is of new "
         f"users{remedy}"),
        (num_excluded > _MANY_EXCLUDED * num_all and exclude != "none",
         f"{num_excluded:,} of {num_all:,} items to find are excluded, because their users had "
         f"{exclude} them before. If they may come again, set evaluation.exclude to none "
         "(docs/guides/seen.md)"),
        (num_new > _MANY_NEW * num_left,
         f"{num_new:,} of {num_left:,} items to find have no positive in training: only their "
         f"features can find them{lacking} "
         "(docs/guides/new_items.md)"),
    ]  # fmt: skip
    yield from (line for holds, line in rows if holds)


def _about_training(result: Metrics, num_positives: int, config: RunConfig) -> Iterator[str]:
    """Says whether training stopped at its best epoch, or too few steps after it."""
    training = config.training
    num_epochs = len(result["history"].get(f"val_{training.monitor}", []))
    waited = num_epochs - result["best_epoch"]
    num_steps = waited * -(-num_positives // training.fitting(num_positives).batch_size)
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


def _about_baselines(metrics: Metrics, metric: str, config: RunConfig) -> Iterator[str]:
    """Says what to try if the model does not beat every baseline.

    What the baselines that are ahead learn from (`Baseline.learns_from`) is what the model lacks.
    """
    from tfrs_pipeline.evaluation.baselines import BASELINES  # Imports the libraries of logs.

    num_positives = metrics["split"]["train"]["num_positives"]
    slices = next(iter(metrics["models"].values()))["slices"].values()
    num_items = max(sum(part["num_candidates"] for part in slices), 1)  # Slices part the corpus.
    if num_positives < _FEW_POSITIVES * num_items:
        yield (
            f"too few positives: {num_positives:,} in training for {num_items:,} items, "
            f"{num_positives / num_items:.1f} each; a longer log may help"
        )
    behind: dict[str, list[str]] = {}
    for name, label in ahead_of(metrics, metric).items():
        if name in BASELINES:
            behind.setdefault(BASELINES[name].learns_from, []).append(label)
    if "repeats" in behind:
        yield (
            "behind the user's own items again, which a service can show without a model: to "
            "measure what else a user clicks, set evaluation.exclude to clicked"
        )
    # Who is behind popularity has to follow it first.
    lacks = {"popularity"} if "popularity" in behind else {"order", "items"}
    labels = [label for kind in ("popularity", "order", "items") if kind in lacks
              for label in behind.get(kind, ())]  # fmt: skip
    remedies = [
        remedy
        for kinds, suits, remedy in _remedies(metrics, config)
        if suits and lacks & behind.keys() & kinds
    ]
    if remedies:
        yield f"behind {listed(labels)}: {', or '.join(remedies)}"


def _remedies(metrics: Metrics, config: RunConfig) -> list[tuple[set[str], bool, str]]:
    """Lists what a model may lack, whether a remedy suits the settings, and the remedy."""
    model, data, examples = config.model, config.data, config.training.examples
    trend = metrics.get("signals", {}).get("trend", {"value": 0.0, "beside": 0.0})
    changes = trend["value"] - trend["beside"] > _TREND and model.correction != "recent"
    more = " and model.correction recent, since what is popular changes" if changes else ""
    # A recipe that raced has lost, or is the model.
    untried = {"sequence", "sets"} - metrics.get("race", {}).get("recipes", {}).keys()
    reads_ids = bool(model.use_candidate_id or model.history_pooling)
    is_random = model.item_init == "random" and config.warm_start is None
    learner = {"order", "items"}
    return [
        ({"popularity"}, model.use_candidate_id and (changes or not model.candidate_bias),
         f"set model.candidate_bias{more}"),
        ({"popularity"}, config.split.kind in (None, "time"),
         "check with split.kind last_share whether popularity has changed over time"),
        ({"order"}, examples != "sequences" and "sequence" in untried,
         "take --preset sequence, which learns from the order"),
        (learner, not data.is_ordered and examples != "sets" and "sets" in untried,
         "take --preset sets"),
        (learner, reads_ids and is_random, "set model.item_init svd"),
        (learner, not data.item_features, "give features of the items (data.item_features)"),
        (learner, True, "more model.negatives"),
    ]  # fmt: skip
