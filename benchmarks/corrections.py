r"""Compares six corrections of sampling on eight logs: which log q is right, and where each loses.

A column that holds item i gets the logit score / temperature - log q(i). Corrections:

    none           log q = 0
    share          the log of the item's share of the clicks; for negatives alone
    share, both    the same, and for the positive too: published code for mixed negatives, and
                   `tfrs.tasks.Retrieval` (Yi et al. 2019, whose share is estimated)
    count          the log of the item's number of copies in the batch, for the positive too
    count x2       twice that: X's two-tower (xai-org/x-algorithm, logq_correction_scale)
    count x2, masked
                   the same with the masks of the others
    exact          the log of the expected number of copies, whichever sampler drew them; for
                   negatives alone: this package

The counts mask nothing but the row's own in-batch column, as X does. The others mask what the
package masks: copies of the row's positive, its user's other known positives, and items shown to
the user. Ways of drawing the columns:

    in-batch       the other rows' positives
    mixed          these, and as many uniform ones
    shown          items that were shown to anyone, by their impressions, as X's columns are
    clicks 64      64 and 1,024 columns by clicks, where in-batch negatives have 255
    clicks 1024

A training is 1,000 steps of 256 positives of the package's two-tower (dim 32, the mean of the
history) with its own batches, loss and optimizer; validation after each quarter chooses the weights
to keep. For each log, way and correction, the first seed's validation chooses one of five
temperatures. The other seeds take it. All corrections train on the same batches from the same
initial weights, so differences are paired.

    python benchmarks/log_kinds.py --data-dir DIR --to LOGS
    python benchmarks/corrections.py --data-dir LOGS --runs corrections.jsonl \
        --json benchmarks/results/corrections.json

The file of --runs has a line for each training. What is there is not trained again, so that a
stopped benchmark goes on where it was. The log `funnel` is simulated here, with its truth. Without
--data-dir nothing is trained, and --json is written of what is there. --page writes the tables into
a page, between its two comments.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow as tf
from funnel import measure
from record import parser_with_json, write_json
from scipy.stats import t

from tfrs_pipeline.batches.batch import Batch
from tfrs_pipeline.model.corpus import Corpus, TrainingSet
from tfrs_pipeline.model.fitted_model import query_encoder
from tfrs_pipeline.model.optimizer import make_optimizer
from tfrs_pipeline.negatives.samplers import AliasSampler
from tfrs_pipeline.search.topk import ExactRetriever
from tfrs_pipeline.sources.simulated import Simulation, simulate_funnel

BATCH, NUM_STEPS, CHECKS = 256, 1000, 4
TEMPERATURES, NUM_SEEDS = (0.035, 0.08, 0.18, 0.4, 0.9), (1, 3, 5)
MODEL: dict[str, Any] = {
    "dim": 32,
    "history_length": 20,
    "history_pooling": ("mean",),
    "id_dropout": 0.0,
    "training": tp.TrainingSettings(batch_size=BATCH, learning_rate=0.008),
}
MAX_VALIDATION, MAX_TEST = 500, 1000  # Queries.
NDCG = "ndcg@100"
METRICS = (NDCG, "recall@100", "even_recall@100", "tail/recall@100")
TRUTHS = ("recall@50 of truth", "true_click_probability@50")
CELL = ["log", "way", "correction"]
# Log -> what is excluded from a ranking, and how many users are drawn; None keeps all.
LOGS: dict[str, tuple[Any, int | None]] = {
    "ratings": ("clicked", None),  # MovieLens-100K
    "kuairand": ("clicked", None),
    "gowalla, no order": ("clicked", 2000),
    "funnel": ("clicked", None),
    "sessions": ("none", 8000),  # A shop.
    "lastfm": ("clicked", None),  # Plays.
    "toys": ("clicked", 5000),  # Sparse reviews.
    "baskets": ("none", 400),  # By time.
}
CORRECTIONS = ("exact", "none", "share", "share, both", "count", "count x2")
MASKED = "count x2, masked"
BOTH_WAYS, SHOWN, OTHER_NUMBERS = ("in-batch", "mixed"), "shown", ("clicks 64", "clicks 1024")
# Ways, logs and corrections in the order of training, in case there is no time for all: with one
# seed, then with three, then with five.
PHASES: tuple[tuple[Sequence[str], ...], ...] = (
    ([SHOWN], ("kuairand", "funnel"), (*CORRECTIONS, MASKED)),
    (BOTH_WAYS, list(LOGS)[:4], CORRECTIONS),
    (BOTH_WAYS, list(LOGS), CORRECTIONS),
    (OTHER_NUMBERS, ("ratings", "funnel"), CORRECTIONS),
    (BOTH_WAYS, list(LOGS), [MASKED]),
)


class Shown:
    """Negatives by impressions: any item that was shown, clicked or not, in the training part."""

    def __init__(self, impressions: np.ndarray) -> None:
        self._probability = impressions / impressions.sum()
        self._sampler = AliasSampler(self._probability)

    def draw(self, frame: tp.SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws as many columns as the batch has positives."""
        return self._sampler.sample(frame.batch_size, seed)

    def expected_count(self, frame: tp.SamplingFrame) -> np.ndarray:
        """Computes the expected copies of each item."""
        return frame.batch_size * self._probability


class LogQ(NamedTuple):
    """A correction of the batches of a seed, by step."""

    columns: tf.Tensor  # [steps, C] what is subtracted from the logits of the columns,
    positives: tf.Tensor  # [steps, B] and from those of the rows' positives.
    is_counted: tf.Tensor  # [steps, B, C] masks.


class Drawn(NamedTuple):
    """The batches of a seed, and what corrects them."""

    batches: Batch  # Each field has the steps as its first axis.
    log_count: np.ndarray  # [1 + items] log of the expected copies.
    log_share: np.ndarray  # [1 + items] log of the share of the clicks.
    is_later: np.ndarray  # [1 + items] bool, items that came after the training.
    is_in_batch: bool  # Whether the first columns are the rows' positives.

    def log_q(self, correction: str) -> LogQ:
        """Returns what a correction subtracts and masks."""
        columns, positives = self.batches.shared_row.numpy(), self.batches.candidate_row.numpy()
        is_counted = self.batches.is_counted
        of_columns, of_positives = np.zeros(columns.shape), np.zeros(positives.shape)
        if correction == "exact":
            of_columns = self.log_count[columns]
        elif correction.startswith("share"):
            of_columns = self.log_share[columns]
            if correction == "share, both":
                of_positives = self.log_share[positives]
        elif correction != "none":
            scale = 1.0 if correction == "count" else 2.0
            for step, rows in enumerate(columns):
                copies = np.bincount(rows, minlength=len(self.log_share))
                of_columns[step] = scale * np.log(copies[rows])
                # Where the columns are drawn apart, a row's positive is one more copy.
                own = copies[positives[step]] + (not self.is_in_batch)
                of_positives[step] = scale * np.log(own)
            if correction != MASKED:
                is_own = np.eye(*is_counted.shape[1:], dtype=np.bool_) & np.bool_(self.is_in_batch)
                is_counted = tf.constant(~(self.is_later[columns][:, np.newaxis] | is_own))
        log_q = (tf.cast(values, tf.float32) for values in (of_columns, of_positives))
        return LogQ._make([*log_q, is_counted])


def corrected(batches: Batch, log_q: LogQ, step: Any) -> Batch:
    """Returns the batch of a step with a correction."""
    batch = Batch._make(None if values is None else values[step] for values in batches)
    # A softmax does not change if the positive's log q is added to all logits instead.
    both = log_q.columns[step][tf.newaxis, :] - log_q.positives[step][:, tf.newaxis]
    return batch._replace(log_q=both, is_counted=log_q.is_counted[step])


class Task:
    """A log with its model, whose graph serves all trainings."""

    def __init__(self, log: str, data_dir: Path, folder: Path) -> None:
        self.exclude, num_users = LOGS[log]
        self.simulation: Simulation | None = None
        if log == "funnel":
            self.simulation = simulate_funnel(
                num_users=1000, num_items=1000, num_requests=10_000, seed=0
            )
            split = self.simulation.log.split("last_share", validation=0.1, test=0.2)
        else:
            events = pq.read_table(data_dir / f"{log}.parquet")
            if num_users is not None:
                users = np.unique(events["user_id"].to_numpy(zero_copy_only=False))
                drawn = np.random.default_rng(0).choice(users, num_users, replace=False)
                events = events.filter(pc.is_in(events["user_id"], pa.array(drawn)))
            reading = tp.Reading(is_ordered=not log.endswith("no order"))
            split = tp.Log.from_table(events, reading=reading).split("column")
        data = TrainingSet.build(split.train, folder / log, seed=0)
        ids, later = data.corpus.candidate_ids, data.corpus.is_later
        # Models have ids alone.
        self.corpus = Corpus(ids, data.corpus.query_ids, is_later=later)
        self.samples = data.samples
        self.is_later = np.zeros(len(ids) + 1, bool) if later is None else later
        self.validation = split.validation.sample(MAX_VALIDATION)
        self.test = split.test.sample(MAX_TEST)
        events = split.train.events.filter(lambda x: x["stage"].isin(["clicked", "exposed"]))
        shown = events.select("item_id").to_pyarrow()["item_id"].to_numpy(zero_copy_only=False)
        self.impressions = np.bincount(ids.rows(shown), minlength=len(ids) + 1).astype(float)
        tf.keras.utils.set_random_seed(0)
        self.network = self._plan("in-batch", 0).build(self.corpus)
        # A variable, so that one graph serves all temperatures.
        self.temperature = tf.Variable(1.0, trainable=False)
        self.network.task._temperature = self.temperature
        self.network.compile(optimizer=make_optimizer(MODEL["training"], NUM_STEPS))
        self.network.optimizer.build(self.network.trainable_variables)
        self.encoder = query_encoder(self.network, self.corpus)
        self._weights = [value.numpy() for value in self.network.trainable_variables]
        self._state = [value.numpy() for value in self.network.optimizer.variables]
        self._train = tf.function(self._steps, autograph=False)

    def _plan(self, way: str, seed: int) -> tp.TwoTower:
        negatives: list[Any] = [tp.InBatch()] if way in BOTH_WAYS else []
        if way == "mixed":
            negatives.append(tp.Uniform(BATCH))
        elif way == SHOWN:
            negatives.append(Shown(self.impressions))
        elif way in OTHER_NUMBERS:
            negatives.append(tp.Popularity(int(way.split()[1]), 1.0))
        return tp.TwoTower(**MODEL, negatives=negatives, seed=seed)

    def draw(self, way: str, seed: int) -> Drawn:
        """Draws the batches of a seed; checks that the exact log q gives the package's loss."""
        made = self._plan(way, seed).batches(self.samples)
        fields = zip(*made.dataset(0, NUM_STEPS), strict=True)
        batches = Batch._make(None if field[0] is None else tf.stack(field) for field in fields)
        # Uniform negatives also draw items without a click, which count as half a click.
        share = np.maximum(self.samples.counts, 0.5) / self.samples.counts.sum()
        with np.errstate(divide="ignore"):
            log_count = np.log(made.expected_count)
        drawn = Drawn(batches, log_count, np.log(share), self.is_later, way in BOTH_WAYS)
        both = corrected(batches, drawn.log_q("exact"), 0), made.batch(0)
        np.testing.assert_allclose(*map(self.network.compute_loss, both), rtol=1e-5)
        return drawn

    def _steps(self, batches: Batch, log_q: LogQ, start: tf.Tensor, stop: tf.Tensor) -> None:
        def step(number: tf.Tensor) -> tuple[tf.Tensor]:
            self.network.train_step(corrected(batches, log_q, number))
            return (number + 1,)

        tf.while_loop(lambda number: number < stop, step, (start,), parallel_iterations=1)

    def fit(self, drawn: Drawn, correction: str, temperature: float, seed: int) -> dict[str, Any]:
        """Trains once; returns what validation and test measure."""
        start = time.process_time()
        weights, rng = self.network.trainable_variables, np.random.default_rng(seed)
        variables = [*weights, *self.network.optimizer.variables]
        initial = [*(rng.permutation(value) for value in self._weights), *self._state]
        for variable, value in zip(variables, initial, strict=True):
            variable.assign(value)
        self.temperature.assign(temperature)
        log_q = drawn.log_q(correction)
        best, kept, quarter = -1.0, self._weights, 0
        for number in range(CHECKS):
            ends = (tf.constant(x * NUM_STEPS // CHECKS) for x in (number, number + 1))
            self._train(drawn.batches, log_q, *ends)
            value = self.measure(self.validation)[NDCG]
            if value > best:
                best, quarter, kept = value, number + 1, [variable.numpy() for variable in weights]
        for variable, value in zip(weights, kept, strict=True):
            variable.assign(value)
        row = {"validation": best, "quarter": quarter, **self.measure(self.test)}
        if self.simulation is not None:
            truth = measure(self.retriever(), self.simulation, self.test)
            row |= {name: truth[name] for name in TRUTHS}
        return {**row, "cpu_seconds": round(time.process_time() - start, 2)}

    def retriever(self) -> ExactRetriever:
        """Returns the current weights as a retriever."""
        ids = self.corpus.candidate_ids.values
        return ExactRetriever(ids, self.network.embed_corpus(), self.encoder)

    def measure(self, holdout: tp.Holdout) -> dict[str, float]:
        """Measures the current weights."""
        options: dict[str, Any] = {"exclude": self.exclude, "cutoffs": (100,), "num_bootstrap": 0}
        result = tp.evaluate(self.retriever(), holdout, **options).first
        found = {name: interval.mean for name, interval in result.overall.intervals.items()}
        found["tail/recall@100"] = result.slices["tail"].intervals["recall@100"].mean
        # Where users have one item to find, there are no even metrics.
        return {name: found[name] for name in METRICS if name in found}


def best_temperatures(rows: pd.DataFrame) -> pd.Series:
    """Returns what is best on the first seed's validation, by log, way and correction."""
    first = rows[rows["seed"] == 0].sort_values("validation", kind="stable")
    return first.groupby(CELL)["temperature"].last()


def read(runs: Path) -> list[dict[str, Any]]:
    """Reads the lines of a file of runs; none if it is not there."""
    text = runs.read_text() if runs.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line]


def run(data_dir: Path, runs: Path) -> Iterator[dict[str, Any]]:
    """Trains what the file of runs lacks; yields the row of each training."""
    rows = read(runs)
    there = {tuple(row[name] for name in (*CELL, "seed", "temperature")) for row in rows}
    tasks: dict[str, Task] = {}
    with tempfile.TemporaryDirectory() as folder:
        for num, (ways, logs, corrections) in itertools.product(NUM_SEEDS, PHASES):
            for seed, log, way in itertools.product(range(num), logs, ways):
                drawn = None
                for cell in itertools.product([log], [way], corrections):
                    best = [] if seed == 0 else [best_temperatures(pd.DataFrame(rows))[cell]]
                    for temperature in best or TEMPERATURES:
                        if (run := (*cell, seed, temperature)) in there:
                            continue
                        if log not in tasks:
                            tasks[log] = Task(log, data_dir, Path(folder))
                        drawn = drawn or tasks[log].draw(way, seed)
                        row = dict(zip((*CELL, "seed", "temperature"), run, strict=True))
                        row |= tasks[log].fit(drawn, cell[-1], temperature, seed)
                        with runs.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        rows.append(row)
                        there.add(run)
                        yield row


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Computes means over seeds, and paired differences from the exact log q.

    Returns a row for each log, way, correction and metric; `margin` is half of the 95% interval of
    Student's t over the seeds, NaN for one seed.
    """
    rows = rows.merge(best_temperatures(rows).reset_index())
    rows = rows.melt([*CELL, "seed", "temperature"], [*METRICS, *TRUTHS], "metric").dropna()
    exact = rows[rows["correction"] == "exact"].drop(columns=["correction", "temperature"])
    rows = rows.merge(exact, on=["log", "way", "seed", "metric"], suffixes=("", "_exact"))
    rows["difference"] = rows["value"] - rows["value_exact"]
    groups = rows.groupby([*CELL, "temperature", "metric"], sort=False)
    table = groups.agg(
        num_seeds=("seed", "size"),
        mean=("value", "mean"),
        difference=("difference", "mean"),
        margin=("difference", "sem"),
    )
    table["margin"] *= t.ppf(0.975, table["num_seeds"] - 1)
    return table.reset_index()


def table_of(table: pd.DataFrame, way: str, metric: str) -> str:
    """Writes a table: the exact log q's mean, and the differences of the others from it."""
    cells = table[(table["way"] == way) & (table["metric"] == metric)].set_index("correction")
    names = [name for name in (*CORRECTIONS, MASKED) if name in cells.index]
    rows = [[f"{way}, {metric}", *names], ["---", *["---:"] * len(names)]]
    for log, own in cells.groupby("log", sort=False):
        others = own.reindex(names[1:]).itertuples()
        texts = [f"{x.difference:+.4f} ± {x.margin:.4f}" for x in others]
        rows.append([log, f"{own['mean']['exact']:.4f}", *texts])
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return text.replace("0.", ".").replace(" ± nan", "").replace("+nan", "").replace("nan", "")


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--data-dir", type=Path, help="Folder of the event files.")
    parser.add_argument("--runs", type=Path, required=True, help="A line for each training.")
    parser.add_argument("--page", type=Path, help="A page to write the tables into.")
    options = parser.parse_args()
    for row in run(options.data_dir, options.runs) if options.data_dir else ():
        print(row, flush=True)
    rows = read(options.runs)
    table = summarise(pd.DataFrame(rows))
    if options.json:
        cells = table.replace({np.nan: None}).to_dict("records")
        write_json(options.json, {"cells": cells, "runs": rows})
    if options.page:
        before, _, rest = options.page.read_text().partition("<!-- tables -->\n")
        after = rest.partition("<!-- end -->")[2]
        pairs = itertools.product(table["way"].unique(), [*METRICS, TRUTHS[0]])
        tables = "\n\n".join(table_of(table, *pair) for pair in pairs)
        options.page.write_text(f"{before}<!-- tables -->\n\n{tables}\n\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
