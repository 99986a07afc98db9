"""The kinds of examples: positives one by one, sets of a user's items, whole sequences."""

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.batch import Batch, EpochExamples, Use, seed_of
from tfrs_pipeline.features.raw import relative_seconds
from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.negatives.samplers import AliasSampler
from tfrs_pipeline.samples import store
from tfrs_pipeline.samples.store import RowLists, Samples, offsets_of, padded_lines

INT32_MAX = np.iinfo(np.int32).max


class SinglePositives:
    """Every sample once an epoch, in a random order that the graph computes.

    A batch may span two epochs, so every batch is full. `history_length` is N, the most recent
    history rows per query. With a `rate` by candidate, [num_candidates + 1], an epoch draws as many
    samples with replacement: a candidate by its rate, then one of its samples. A `ValueError` if
    there are fewer than `batch_size` samples, or 2^31 or more.

    Example:
        >>> samples = Samples.from_pairs([1, 1, 1], [5, 6, 7], num_queries=1, num_candidates=9)
        >>> examples = SinglePositives(samples, batch_size=2, history_length=3, seed=0)
        >>> examples.read(np.array([2, 0])).history_rows
        array([[6, 5, 0],
               [0, 0, 0]], dtype=int32)
    """

    is_fair_draw = True
    has_one_positive = True

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        history_length: int,
        seed: int,
        rate: np.ndarray | None = None,
    ) -> None:
        check_integer(1, batch_size=batch_size)
        if len(samples) < batch_size:
            raise ValueError(
                f"A batch needs {batch_size} positives and the training part has {len(samples)}: "
                "there is no partial batch. Lower batch_size."
            )
        if len(samples) > INT32_MAX:
            raise ValueError(
                f"{len(samples)} samples are more than the {INT32_MAX} that one order holds."
            )
        self.batch_size = batch_size
        self.steps_per_epoch = max(1, round(len(samples) / batch_size))
        self.rate = rate
        row = tf.TensorSpec([batch_size], tf.int32)
        history = tf.TensorSpec([batch_size, history_length], tf.int32)
        has_times = samples.sequence_times is not None
        times = tf.TensorSpec([batch_size, history_length + 1], tf.int32) if has_times else None
        self.signature = Batch(row, row, row, history_rows=history, history_times=times)
        self._samples = samples
        self._history_length = history_length
        self._seed = seed
        self._sampler = None
        if rate is not None:
            self._sampler = AliasSampler(store.positive_probability(samples.counts, rate))
            self._counts = tf.constant(samples.counts, tf.int64)
            self._first = tf.cumsum(self._counts, exclusive=True)
            # The samples of a candidate lie together, so that a draw within it is an addition.
            by_candidate = np.argsort(samples.candidate_rows, kind="stable")
            self._by_candidate = by_candidate.astype(np.int32)

    def choose(self, step: int) -> np.ndarray:
        """Returns [B] int32: samples, or with rates their positions in the order of candidates."""
        return self._step_samples(tf.constant(step, tf.int64)).numpy()

    def dataset(self, start_step: int, num_steps: int | None) -> tf.data.Dataset:
        """Returns pairs of a step and its samples."""
        stop = np.iinfo(np.int64).max if num_steps is None else start_step + num_steps
        steps = tf.data.Dataset.range(start_step, stop)
        return steps.map(lambda step: (step, self._step_samples(step)))

    def read(self, chosen: np.ndarray) -> Batch:
        """Reads the chosen samples; see `Examples`."""
        index = chosen if self._sampler is None else self._by_candidate[chosen]
        times = None
        if self._samples.sequence_times is not None:
            times = relative_seconds(self._samples.latest_times(index, self._history_length))
        return Batch(
            query_row=self._samples.query_rows[index],
            index=index,
            candidate_row=self._samples.candidate_rows[index],
            history_rows=self._samples.latest(index, self._history_length),
            history_times=times,
        )

    def _step_samples(self, step: tf.Tensor) -> tf.Tensor:
        if self._sampler is not None:
            return self._drawn(self._sampler, seed_of(self._seed, Use.ORDER, step))
        position = step * self.batch_size + tf.range(self.batch_size, dtype=tf.int64)
        index = tf.cast(position % len(self._samples), tf.int32)
        first_epoch = step * self.batch_size // len(self._samples)
        # A batch is not larger than an epoch, so it ends in the next epoch at the latest.
        is_next = position // len(self._samples) > first_epoch
        this, following = (
            tf.random.experimental.index_shuffle(
                index, seed_of(self._seed, Use.ORDER, epoch), len(self._samples) - 1
            )
            for epoch in (first_epoch, first_epoch + 1)
        )
        return tf.where(is_next, following, this)

    def _drawn(self, sampler: AliasSampler, seed: tf.Tensor) -> tf.Tensor:
        """Draws candidates, and a sample of each: [B] int32 positions in the candidates' order."""
        seed, within_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
        candidate = sampler.sample(self.batch_size, seed)
        # With 63 bits the remainder is fair to within one in 2^31.
        bits = tf.random.stateless_uniform(
            [self.batch_size], within_seed, minval=None, maxval=None, dtype=tf.int64
        )
        within = (bits & np.iinfo(np.int64).max) % tf.gather(self._counts, candidate)
        return tf.cast(tf.gather(self._first, candidate) + within, tf.int32)


class UserSets(EpochExamples):
    """Some of a user's positives are input, the others are targets, which share a query.

    An epoch visits every user once, in random order, and flips a coin for each of the user's
    candidates: it becomes input, part of the history, or a target, one of the query's positives.
    Copies of a candidate stay together, so that no target is in its own input. A user without input
    has an empty history; one without targets is left out of the epoch. The log's order is ignored.

    Users are spread evenly over an epoch's batches, which have about `batch_size` positives each.
    If the coins leave fewer users than batches, as in a tiny log, they are flipped again.

    Batches have a positive_query, and history_rows in random order, as wide as the batch's longest,
    `history_length` at most: longer input is sampled. A query's shared columns count for all of its
    positives, so all are masked in them. There are no hard negatives, which belong to one positive.
    """

    has_one_positive = False

    def __init__(
        self, samples: Samples, *, batch_size: int, history_length: int, seed: int
    ) -> None:
        check_integer(1, batch_size=batch_size)
        row, rows = tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, None], tf.int32)
        self.signature = Batch(row, row, row, positive_query=row, history_rows=rows)
        self._history_length = history_length
        self._rows = samples.candidate_rows
        # Each distinct pair of a query and a candidate has one coin. Rows are int32, so a pair of
        # them is one int64, which sorts by query, then candidate.
        pairs = samples.query_rows.astype(np.int64) << 32 | samples.candidate_rows
        distinct, self._pair = np.unique(pairs, return_inverse=True)
        self._queries, pair_queries = np.unique(distinct >> 32, return_inverse=True)
        self._sample_queries = pair_queries[self._pair]
        # At least half of all draws leave the mean number of users, rounded down, or more.
        mean_left = np.sum(1 - 0.5 ** np.bincount(pair_queries))
        # Half of the positives are targets, on average.
        steps = max(1, min(round(len(samples) * 0.5 / batch_size), int(mean_left)))
        drawn = dict.fromkeys(("query_row", "target", "num_targets", "input", "num_inputs"), row)
        super().__init__(batch_size=batch_size, steps_per_epoch=steps, seed=seed, drawn=drawn)

    def draw_epoch(self, rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
        """Draws each batch's users with their targets and inputs, one after the other."""
        is_input, num_targets = self._flip_coins(rng)
        order = rng.permutation(np.flatnonzero(num_targets))
        turn = np.full(len(self._queries), -1)
        turn[order] = np.arange(len(order))
        # One sort by the user's turn, in random order within, which also samples longer histories.
        # Users without targets have turn -1 and come first.
        turns = turn[self._sample_queries]
        visited = np.argsort(turns + rng.random(len(self._rows)))[np.count_nonzero(turns < 0) :]
        is_input = is_input[visited]
        target = visited[~is_input].astype(np.int32)
        inputs = self._rows[visited[is_input]]
        num_inputs = np.bincount(turns[visited[is_input]], minlength=len(order)).astype(np.int32)
        num_targets = num_targets[order].astype(np.int32)
        query_row = self._queries[order].astype(np.int32)
        # Where each batch but the first begins among the users, and their targets and inputs.
        begin = np.arange(1, self.steps_per_epoch) * len(order) // self.steps_per_epoch
        begin_target, begin_input = (offsets_of(num)[begin] for num in (num_targets, num_inputs))
        parts = {
            "query_row": np.split(query_row, begin),
            "target": np.split(target, begin_target),
            "num_targets": np.split(num_targets, begin),
            "input": np.split(inputs, begin_input),
            "num_inputs": np.split(num_inputs, begin),
        }
        return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]

    def _flip_coins(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws which samples are input, and counts the targets of each query."""
        while True:
            is_input = (rng.random(int(self._pair.max()) + 1) < 0.5)[self._pair]
            num = np.bincount(self._sample_queries[~is_input], minlength=len(self._queries))
            if np.count_nonzero(num) >= self.steps_per_epoch:
                return is_input, num

    def read(self, chosen: dict[str, np.ndarray]) -> Batch:
        """Reads a step's draws; see the class."""
        num_inputs = chosen["num_inputs"]
        # As wide as this batch needs: sets differ much in size.
        width = min(num_inputs.max(), self._history_length)
        first = np.cumsum(num_inputs) - num_inputs
        queries = np.arange(len(num_inputs), dtype=np.int32)
        return Batch(
            query_row=chosen["query_row"],
            index=chosen["target"],
            candidate_row=self._rows[chosen["target"]],
            positive_query=np.repeat(queries, chosen["num_targets"]),
            history_rows=padded_lines(chosen["input"], first, num_inputs, width),
        )


# Windows of similar length are batched together, within this many batches in random order.
BATCHES_PER_POOL = 16


class WholeSequences(EpochExamples):
    """Every position of a sequence is a positive: a causal encoder gives the query of each.

    A sequence is cut into windows of `history_length` items from its end. A window trains the
    samples whose histories end in it, and cuts these at its start, so that the first samples of a
    later window have short histories. Windows of similar length are batched together.

    Batches have P = W positives (about B). Instead of history_rows they have sequence_rows, state
    and, for a log with timestamps, sequence_times (see `Batch`). A `ValueError` if the samples have
    no order, or a batch would be too small for its windows; twice a window's maximum suffices.

    Example:
        >>> samples = Samples.from_pairs([1, 1, 1], [5, 6, 7], num_queries=1, num_candidates=9)
        >>> examples = WholeSequences(samples, batch_size=3, history_length=3, seed=0)
        >>> batch = examples.read(examples.choose(0))
        >>> batch.sequence_rows.tolist(), batch.state.tolist(), batch.candidate_row.tolist()
        ([[5, 6]], [0, 1, 2], [5, 6, 7])
    """

    has_one_positive = True

    def __init__(
        self, samples: Samples, *, batch_size: int, history_length: int, seed: int
    ) -> None:
        check_integer(1, batch_size=batch_size, history_length=history_length)
        if samples.num_earlier is None:
            raise ValueError(
                "Whole sequences need an order: a history must be a prefix of its user's "
                "sequence. Give the log its order, or train its users as sets."
            )
        self._query_rows, self._starts, self._lengths, self._trained = _cut_windows(
            samples, history_length
        )
        row, rows = tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, None], tf.int32)
        has_times = samples.sequence_times is not None
        times = tf.TensorSpec([None, None], tf.int32) if has_times else None
        self.signature = Batch(row, row, row, sequence_rows=rows, sequence_times=times, state=row)
        steps = max(1, round(len(samples) / batch_size))
        super().__init__(batch_size=batch_size, steps_per_epoch=steps, seed=seed, drawn=row)
        self._num_positives = np.diff(self._trained.offsets)
        longest = int(self._num_positives.max())
        # Otherwise that many positives in a row might not hold the middle of any window.
        if self.steps_per_epoch > 1 and len(samples) / self.steps_per_epoch <= longest:
            raise ValueError(
                f"training.batch_size = {batch_size} is too small: a window trains up to {longest} "
                f"positives (those of one moment share a history). Use {2 * longest} or more, a "
                "shorter history, or training.examples = 'single'."
            )
        self._samples = samples

    def draw_epoch(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Draws the windows of each batch, [S] int32."""
        order = rng.permutation(len(self._num_positives))
        done = np.cumsum(self._num_positives[order]) - self._num_positives[order] / 2
        pool = done * self.steps_per_epoch // (len(self._samples) * BATCHES_PER_POOL)
        # Sorted by length within a pool, so that a batch has windows of similar length: padding
        # takes time, and one long window pads its whole batch. Pools keep the order random.
        order = order[np.lexsort([self._num_positives[order], pool])]
        done = np.cumsum(self._num_positives[order]) - self._num_positives[order] / 2
        batch = (done * self.steps_per_epoch / len(self._samples)).astype(np.int64)
        ends = np.searchsorted(batch, np.arange(1, self.steps_per_epoch))
        batches = np.split(order.astype(np.int32), ends)
        return [batches[i] for i in rng.permutation(self.steps_per_epoch)]

    def read(self, chosen: np.ndarray) -> Batch:
        """Reads windows; see the class."""
        samples = self._samples
        assert samples.num_earlier is not None
        trained = self._trained.take(chosen)
        index = trained.values
        starts, lengths = self._starts[chosen], self._lengths[chosen]
        width = lengths.max()
        first = samples.sequences.offsets[self._query_rows[chosen]] + starts
        window = np.repeat(np.arange(len(chosen), dtype=np.int32), np.diff(trained.offsets))
        num_read = samples.num_earlier[index] - starts[window]
        if (times := samples.sequence_times) is not None:
            # A window ends with its last history; the next event is the query with that history.
            times = padded_lines(times, first, lengths + 1, width + 1, missing=np.nan)
            times = relative_seconds(times)
        return Batch(
            query_row=samples.query_rows[index],
            index=index,
            candidate_row=samples.candidate_rows[index],
            sequence_rows=padded_lines(samples.sequences.values, first, lengths, width),
            sequence_times=times,
            state=window * (width + 1) + num_read,
        )


def _cut_windows(
    samples: Samples, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, RowLists]:
    """Cuts sequences into windows from their ends, the last one ending with the last history.

    Returns, for each window, the row of its query, the position of its first item in the query's
    sequence, and how many items it reads, [num_windows] int32 each; and the samples that it trains.
    """
    # A window that starts at s trains the samples with s < num_earlier <= s + length; the first
    # window of a sequence also trains those with an empty history.
    assert samples.num_earlier is not None
    last = np.zeros(len(samples.sequences), np.int64)
    np.maximum.at(last, samples.query_rows, samples.num_earlier)
    # Windows are numbered from the end: number 0 reads up to the last history.
    number = np.maximum(last[samples.query_rows] - samples.num_earlier, 0) // length
    # An empty history begins the window that reads the first item.
    number = np.minimum(number, np.maximum(last[samples.query_rows] - 1, 0) // length)
    key = samples.query_rows.astype(np.int64) << 32 | number
    order = np.lexsort([samples.num_earlier, key])
    distinct, first, counts = np.unique(key[order], return_index=True, return_counts=True)
    query_rows = (distinct >> 32).astype(np.int32)
    end = last[query_rows] - (distinct & store.PAIR_VALUE) * length
    starts = np.maximum(end - length, 0)
    # If a tie moves a window's last samples elsewhere, it reads only as far as its own samples.
    furthest = np.maximum.reduceat(samples.num_earlier[order], first)
    lengths = (furthest - starts).astype(np.int32)
    lists = RowLists(offsets_of(counts), order.astype(np.int32))
    return query_rows, starts.astype(np.int32), lengths, lists
