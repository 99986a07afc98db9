"""What a log rewards, measured in seconds before any training."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse

from tfrs_pipeline.data.engines import random_key
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.requests import at_request
from tfrs_pipeline.data.schema import Exclude, count_rows
from tfrs_pipeline.evaluation.baselines import Transitions
from tfrs_pipeline.evaluation.interactions import Sequences, items_of, positives_in_order
from tfrs_pipeline.evaluation.results import format_cells
from tfrs_pipeline.features.feature import Column
from tfrs_pipeline.features.kinds import KINDS

# A hit is in the top ten. Recency compares the last item with the fifth from the end.
_TOP_K, _FAR = 10, 5
# With 5,000 queries, the standard error of a hit rate is .007 at most.
_MAX_HELD_OUT, _MAX_PAIRS, _MAX_VALUES = 5000, 20_000, 16
# Queries at a time, since popular items have many successors.
_BLOCK = 500
_REQUESTED = "_requested_"
# Above this share of repeats, a ranking that leaves them out measures something else.
_MANY_REPEATS = 0.2


@dataclass(frozen=True)
class Signal:
    """A number, the number to compare it with (`beside`), if any, and what both mean."""

    name: str
    value: float
    beside: float | None
    meaning: str


@dataclass(frozen=True, repr=False)
class Signals:
    """What a log rewards: signals by name. Prints as a table, and shows as one in a notebook."""

    signals: tuple[Signal, ...]

    def __iter__(self) -> Iterator[Signal]:
        return iter(self.signals)

    def __getitem__(self, name: str) -> Signal:
        return {signal.name: signal for signal in self}[name]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Returns value, beside and meaning of each signal by its name."""
        return {row.pop("name"): row for row in map(dataclasses.asdict, self)}

    def excluded_repeats(self, exclude: Exclude) -> Iterator[str]:
        """Notes the share of repeats, if it is large and rankings leave a user's own items out."""
        share = next((signal.value for signal in self if signal.name == "repeats"), 0.0)
        if share > _MANY_REPEATS and exclude != "none":
            yield (
                f"{share:.0%} repeats, which rankings leave out (evaluation.exclude {exclude}): "
                "if a user's own items may come again, set it to none (docs/guides/seen.md)"
            )

    def __repr__(self) -> str:
        rows = [(signal.name, _written(signal.value), _written(signal.beside)) for signal in self]
        table = format_cells([("signal", "value", "beside"), *rows]).splitlines()
        meanings = ["meaning", *(signal.meaning for signal in self)]
        return "\n".join(f"{row}  {meaning}" for row, meaning in zip(table, meanings, strict=True))


def signals(train: Log, *, max_positives: int = 500_000, seed: int = 0) -> Signals:
    """Measures what a log rewards, from the positives of its training part alone.

    For a hit rate, the last positive of each of at most 5,000 users is held out. It is a hit if it
    is among the top ten items for the known value (the last item, or the value of a request
    feature), by counts backed off to popularity. Beside it is the hit rate with less information,
    such as shuffled histories. The gap is what a model can learn from the signal. If there are more
    than `max_positives`, about as many are read, of users drawn at random.

    Example:
        >>> import pyarrow as pa
        >>> clicks = {"user_id": [1, 1, 2, 2, 2], "item_id": ["a", "b", "a", "b", "a"]}
        >>> repeats = signals(Log.from_table(pa.table(clicks)))["repeats"]
        >>> repeats.value, repeats.meaning
        (0.2, 'share of positives on an item that the user had before')
    """
    rng = np.random.default_rng(seed)  # Makes all draws, so a seed gives the same signals.
    table = _read(train, max_positives, seed)
    sequences = Sequences.from_table(table, items_of(train))
    if not len(table):
        return Signals(())
    is_last = np.append(sequences.users[1:] != sequences.users[:-1], True)
    # Without anything before it, there is nothing that a hit could be known by.
    last_ones = np.flatnonzero(is_last & (sequences.earlier(1) >= 0))
    held_out = rng.permutation(last_ones)[:_MAX_HELD_OUT]
    measured: list[Signal] = []
    if len(held_out) and train.order != "none":
        measured += _order(sequences, held_out, rng)
    if "timestamp" in table.column_names:
        measured += _trend(sequences, table["timestamp"])
    measured += _counts(sequences)
    measured += _item_features(train, sequences, rng)
    if len(held_out):
        measured += _request_features(train, table, sequences, held_out)
    return Signals(tuple(measured))


def _read(train: Log, max_positives: int, seed: int) -> pa.Table:
    requests = at_request(train.events, _categories(train.request_features))
    requests = {f"{_REQUESTED}{name}": value for name, value in requests.items()}
    events = train.events.mutate(**requests)
    positives = train.positives(events)
    if (num := count_rows(positives)) > max_positives:
        # Whole users, because a history with gaps has other orders and repeats.
        users = positives.select("user_id").distinct()
        drawn = users.order_by([random_key(users["user_id"], seed=seed), "user_id"])
        events = events.semi_join(drawn.limit(count_rows(users) * max_positives // num), "user_id")
    times = ["timestamp"] if "timestamp" in events.columns else []
    return positives_in_order(train, events, *times, *requests).to_pyarrow()


def _categories(features: Mapping[str, str]) -> dict[str, str]:
    return {name: kind for name, kind in features.items() if KINDS[kind].holds_categories}


def _hit_rate(known: np.ndarray, sequences: Sequences, held_out: np.ndarray) -> float:
    """Returns the hit rate of the held-out positives by what is known: [n] codes, 0 if none."""
    rows, num_items = sequences.item_rows, len(sequences.items)
    # Neither counts nor popularity may know what is to be found.
    is_counted = np.ones(len(rows), bool)
    is_counted[held_out] = False
    popular = np.bincount(rows[is_counted], minlength=1 + num_items)
    prior = Transitions.prior * popular / max(1, popular.sum())
    is_counted &= known > 0
    pairs = known[is_counted], rows[is_counted]
    shape = 1 + int(known.max()), 1 + num_items
    num = scipy.sparse.csr_matrix((np.ones(len(pairs[0])), pairs), shape)
    blocks = (held_out[i : i + _BLOCK] for i in range(0, len(held_out), _BLOCK))
    num_hits = sum(_num_hits(num[known[block]], prior, rows[block]) for block in blocks)
    return num_hits / len(held_out)


def _num_hits(num: scipy.sparse.csr_matrix, prior: np.ndarray, target: np.ndarray) -> float:
    """Counts targets found by `num`, [num_queries, 1 + num_items], and prior; ties are random."""
    query = np.repeat(np.arange(len(target)), np.diff(num.indptr))
    target_counts = np.bincount(query, num.data * (num.indices == target[query]), len(target))
    target_score = prior[target] + target_counts
    alone, score, bound = prior[num.indices], num.data + prior[num.indices], target_score[query]
    # Counts over all items by the prior alone, then corrects them for the items in `num`.
    ascending = np.sort(prior[1:])
    above = len(ascending) - np.searchsorted(ascending, target_score, "right")
    level = len(ascending) - np.searchsorted(ascending, target_score, "left")
    above = above + np.bincount(query, 1.0 * (score > bound) - (alone > bound), len(target))
    level = level + np.bincount(query, 1.0 * (score >= bound) - (alone >= bound), len(target))
    # Of the positions that are left, a target at a level with others has its share.
    return float(np.clip((_TOP_K - above) / (level - above), 0, 1).sum())


def _order(
    sequences: Sequences, held_out: np.ndarray, rng: np.random.Generator
) -> Iterator[Signal]:
    key, moment = rng.random(len(sequences.users)), sequences.earlier(0)
    key[np.isin(moment, moment[held_out])] = 1  # Positives of the held-out moment stay last.
    order = np.lexsort((key, sequences.users))
    shuffled = dataclasses.replace(sequences, item_rows=sequences.item_rows[order])
    last, far = _earlier_rows(sequences, 1), _earlier_rows(sequences, _FAR)
    yield Signal(
        "order",
        _hit_rate(last, sequences, held_out),
        _hit_rate(_earlier_rows(shuffled, 1), shuffled, held_out),
        "hit rate by what followed the last item; beside: with shuffled histories",
    )
    if len(held_out := held_out[far[held_out] > 0]):
        yield Signal(
            "recency",
            _hit_rate(np.where(far > 0, last, 0), sequences, held_out),
            _hit_rate(far, sequences, held_out),
            "the same for histories of 5 items and more; beside: by the fifth item from the end",
        )


def _earlier_rows(sequences: Sequences, num: int) -> np.ndarray:
    position = sequences.earlier(num)
    return np.where(position < 0, 0, sequences.item_rows[position])


def _trend(sequences: Sequences, column: pa.ChunkedArray) -> Iterator[Signal]:
    times = column.cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
    num_items = len(sequences.items)
    rows = sequences.item_rows[np.argsort(times, kind="stable")]  # Of all users, by time.
    if tenth := len(rows) // 10:
        before, recent, target = rows[:-tenth], rows[-2 * tenth : -tenth], rows[-tenth:]
        all_time, latest = (np.bincount(part, minlength=1 + num_items) for part in (before, recent))
        orders = np.lexsort((-all_time, -latest)), np.argsort(-all_time, kind="stable")
        num_top = -(-num_items // 100)  # One percent of the items, rounded up.
        now, ever = (float(np.isin(target, order[:num_top]).mean()) for order in orders)
        meaning = "share of the latest 10% on the 1% most popular just before; beside: ever before"
        yield Signal("trend", now, ever, meaning)


def _counts(sequences: Sequences) -> Iterator[Signal]:
    users, rows = sequences.users, sequences.item_rows
    # A pair of user and item in one number, which sorts faster than two columns.
    num_again = len(rows) - len(np.unique(users.astype(np.int64) << 32 | rows))
    meaning = "share of positives on an item that the user had before"
    yield Signal("repeats", num_again / len(rows), None, meaning)
    counts = np.sort(np.bincount(rows, minlength=1 + len(sequences.items))[1:])[::-1]
    for percent in (1, 10):
        share = counts[: -(-len(counts) * percent // 100)].sum() / len(rows)
        meaning = (
            f"share of positives on the {percent}% most popular items; beside: if all were equal"
        )
        yield Signal(f"top {percent}%", float(share), percent / 100, meaning)
    lengths = np.bincount(users)
    median, long = map(float, np.quantile(lengths, (0.5, 0.9), method="lower"))
    meaning = "positives of the median user; beside: of the 90th percentile"
    yield Signal("history", median, long, meaning)
    meaning = "share of users with fewer than 5 positives"
    yield Signal("short", float((lengths < 5).mean()), None, meaning)


def _item_features(train: Log, sequences: Sequences, rng: np.random.Generator) -> Iterator[Signal]:
    kinds, last = _categories(train.item_features), _earlier_rows(sequences, 1)
    positions = rng.permutation(np.flatnonzero((last > 0) & (last != sequences.item_rows)))
    positions = positions[:_MAX_PAIRS]
    if not kinds or not len(positions):
        return
    # Features are read of the items that are compared, which may be few of millions.
    used, pairs = np.unique([last[positions], sequences.item_rows[positions]], return_inverse=True)
    one, following = pairs.reshape(2, -1)
    table = train.items.order_by("item_id").select(*kinds).to_pyarrow().take(used - 1)
    meaning = "share of next items with a value of the item before; beside: of random items"
    for name, kind in kinds.items():
        codes = _codes(name, kind, table[name])[:, :_MAX_VALUES]
        values = codes[one][:, :, np.newaxis]
        real, chance = (
            float(np.any((values == codes[to][:, np.newaxis]) & (values > 0), axis=(1, 2)).mean())
            # Permuted items are as popular as the real ones.
            for to in (following, rng.permutation(following))
        )
        yield Signal(f"item {name}", real, chance, meaning)


def _request_features(
    train: Log, table: pa.Table, sequences: Sequences, held_out: np.ndarray
) -> Iterator[Signal]:
    meaning = "hit rate by popularity at the request's value; beside: by popularity overall"
    for name, kind in _categories(train.request_features).items():
        # Of a list of values, the first stands for the request.
        known = _codes(name, kind, table[f"{_REQUESTED}{name}"])[:, 0]
        # Without a known value, the hit rate is that of popularity.
        rate, without = (
            _hit_rate(codes, sequences, held_out) for codes in (known, np.zeros_like(known))
        )
        yield Signal(f"request {name}", rate, without, meaning)


def _codes(name: str, kind: str, column: pa.ChunkedArray) -> np.ndarray:
    """Numbers the values of a feature, from 1: [n, any], 0 where missing."""
    values: Column = column.combine_chunks()
    raw = KINDS[kind].fit(name, values).to_raw(values)
    _, codes = np.unique(np.append("", raw.ravel()).astype(str), return_inverse=True)
    return codes[1:].reshape(len(raw), -1)


def _written(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value == int(value) else f"{value:.3f}"
