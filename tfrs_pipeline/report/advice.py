"""Says what to try if a run's numbers are not good, from `metrics.json` and the settings.

Advice is a table: each row has what was measured, and the sentence that is said if it holds. A row
never suggests what the settings already have. Why a comparison was lost does not follow from one
number: `docs/guides/report.md` has the usual causes.
"""

from collections.abc import Iterator

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.evaluation.bootstrap import Outcome
from tfrs_pipeline.messages import counted
from tfrs_pipeline.report.verdict import Metrics, baselines_in, compared

# With fewer positives per item, an embedding per item learns little.
_FEW_POSITIVES = 10
# Fewer queries do not tell models apart.
_FEW_QUERIES = 30
# Above this share of new items, the numbers are mostly about them.
_MANY_NEW = 0.3


def advice(metrics: Metrics, metric: str, config: RunConfig) -> Iterator[str]:
    """Says what to try, given the metrics; never what the settings already have.

    If the test measures something other than a user's next items, only that is said: the other
    numbers then answer another question.
    """
    name, model = next(iter(metrics["models"].items()))
    if about_test := [*_about_test(model, config)]:
        yield from about_test
        return
    pairs = compared(metrics, metric)
    ahead = {name for name, pair in pairs.items() if pair.outcome is Outcome.WORSE}
    is_better = all(x.outcome is Outcome.BETTER for x in baselines_in(metrics, metric))
    training, monitor = metrics["training"][name], config.training.monitor
    num_epochs = len(training["history"].get(f"val_{monitor}", []))
    num_positives = metrics["split"]["train"]["num_positives"]
    slices = model["slices"].values()
    num_items = max(sum(part["num_candidates"] for part in slices), 1)  # Slices part the corpus.
    rows = [
        # A warm start has few epochs on purpose.
        (config.warm_start is None and num_epochs == training["best_epoch"],
         f"training stopped too early: validation {monitor} was best after the last of "
         f"{counted(num_epochs, 'epoch')}. Raise training.max_epochs"),
        ("two_tower_uncorrected" in ahead,
         "the correction costs here: without it the model is better. Set model.correction none"),
        # Validation chose the sum, and what people click may have changed since.
        ("best_member" in ahead,
         "the sum costs here: its best recipe alone is better. Race again with members 1"),
        (not is_better and num_positives < _FEW_POSITIVES * num_items,
         f"too few positives: {num_positives:,} in training for {num_items:,} items, "
         f"{num_positives / num_items:.1f} each; a longer log may help"),
        ("repeats" in ahead,
         "behind the user's own items again, which a service can show without a model: to measure "
         "what else a user clicks, set evaluation.exclude to clicked"),
    ]  # fmt: skip
    yield from (line for holds, line in rows if holds)


def _about_test(model: Metrics, config: RunConfig) -> Iterator[str]:
    """Says where the test measures something other than a user's next items."""
    num_queries, num_empty = model["num_queries"], model["num_empty_histories"]
    num_left, num_new = model["num_relevant"], model["num_relevant_unclicked"]
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
        (num_new > _MANY_NEW * num_left,
         f"{num_new:,} of {num_left:,} items to find have no positive in training: only their "
         f"features can find them{lacking} "
         "(docs/guides/new_items.md)"),
    ]  # fmt: skip
    yield from (line for holds, line in rows if holds)
