"""Feature columns turned into arrays, and arrays into embedding inputs.

A column is encoded once, with NumPy, into int32 or float32 arrays; the layers see arrays only, so
that corpus features can be constants gathered by row in the graph.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, get_args

import numpy as np
import tensorflow as tf

from tfrs_pipeline.config import FeatureKind
from tfrs_pipeline.model.randomness import Stream, fold

logger = logging.getLogger(__name__)

_TOKEN = re.compile(r"\w+(?:'\w+)?", re.UNICODE)
MAX_VALUES = 16
MAX_BUCKETS = 32
# Of a hashed feature. At two buckets a value or more, a value shares its own with another one in
# 4 cases of 10 at most; the ceiling, at which more do, holds the table to 16 MB at 4 dimensions.
BUCKETS_PER_VALUE, MIN_HASH_BUCKETS, MAX_HASH_BUCKETS = 2, 16, 2**20
NUM_TIME_VALUES = 5

_NUMBERS: tuple[FeatureKind, ...] = ("numeric", "timestamp", "vector")  # Float32, NaN if missing.
_LISTS: tuple[FeatureKind, ...] = ("multi_categorical", "text")
DAY_SECONDS = 86_400.0


@dataclass(frozen=True)
class Feature:
    """How one column is encoded.

    | kind | a row of the column | encoded |
    |---|---|---|
    | categorical | a value | its place in the vocabulary |
    | hashed | a value, of very many | a bucket by its hash: no vocabulary, no unknown value |
    | multi_categorical | a list of values | their places in the vocabulary |
    | text | a string | places of its lower-case words, a bag |
    | numeric | a number | standardised |
    | bucketized | a number | its bucket between quantiles of the fitted column |
    | timestamp | a `datetime` with a time zone | age, hour of day and weekday (UTC) |
    | vector | a list of numbers, always as many | the same, of length 1 on average |

    The age of a timestamp is log(1 + days before `reference`), standardised, so that it tells apart
    the recent ones; what is later than the reference has the age 0. The vectors of a column are all
    divided by one number, the root mean square of their lengths, which keeps their directions and
    leaves normalised ones as they are.

    The hash is the FarmHash fingerprint of the value as text (`tf.strings.to_hash_bucket_fast`):
    the same in every process, which Python's own is not, promised never to change, and there in a
    TensorFlow graph too. `RawFeatures` encodes all kinds in a graph.

    Args:
        name: Column name.
        kind: One of the above.
        vocabulary: Known values; value i is encoded as i + 1, 0 is unknown or missing.
        num_values: Longest list kept (multi_categorical and text), or the vectors' length.
        mean: Of a numeric column, or of the ages of a timestamp column.
        scale: The same's standard deviation; of a vector column the typical length.
        boundaries: Lowest value of every bucket but the first (bucketized), ascending; the buckets
            are encoded as 1, 2, ..., 0 is missing.
        num_buckets: Buckets of a hashed column, encoded as 1 to num_buckets; 0 is missing.
        reference: Time from which the age of a timestamp counts, in seconds since 1970 (UTC).
    """

    name: str
    kind: FeatureKind
    vocabulary: tuple[str, ...] = ()
    num_values: int = 1
    mean: float = 0.0
    scale: float = 1.0
    boundaries: tuple[float, ...] = ()
    num_buckets: int = 0
    reference: float = 0.0

    @classmethod
    def fit(
        cls,
        name: str,
        kind: FeatureKind,
        column: Sequence[Any] | np.ndarray,
        *,
        min_count: int = 1,
        max_values: int = MAX_VALUES,
        reference: datetime | None = None,
    ) -> Feature:
        """Learns the encoding of a column.

        Args:
            name: Column name.
            kind: Feature kind.
            column: One entry a row, as the table above says; None is missing.
            min_count: Values of fewer rows are unknown (categorical, multi_categorical, text).
            max_values: Longest list to keep (multi_categorical, text).
            reference: Time from which the age of a timestamp counts, such as the end of the log;
                None means the latest value of the column.

        Raises:
            ValueError: If an entry is no number where the kind has numbers, a time has no time
                zone, or vectors differ in length, hold numbers that are not finite, or are all
                missing.
        """
        if kind == "numeric":
            mean, scale = _moments(to_numbers(name, column))
            return cls(name, kind, mean=mean, scale=scale)
        if kind == "bucketized":
            return cls(name, kind, boundaries=_boundaries(to_numbers(name, column)))
        if kind == "timestamp":
            return cls._fit_times(name, column, reference)
        if kind == "vector":
            vectors = to_vectors(name, column)
            known = vectors[~np.isnan(vectors[:, 0])].astype(np.float64)
            scale = float(np.sqrt((known**2).sum(axis=1).mean())) or 1.0
            return cls(name, kind, num_values=vectors.shape[1], scale=scale)
        rows = [to_values(kind, value) for value in column]
        counts = Counter(value for row in rows for value in set(row))
        if kind == "hashed":
            buckets = bucket_count(
                len(counts),
                per_value=BUCKETS_PER_VALUE,
                low=MIN_HASH_BUCKETS,
                high=MAX_HASH_BUCKETS,
            )
            return cls(name, kind, num_buckets=buckets)
        vocabulary = tuple(sorted(v for v, count in counts.items() if count >= min_count))
        longest = max((len(row) for row in rows), default=1)
        return cls(name, kind, vocabulary, num_values=max(1, min(longest, max_values)))

    @classmethod
    def _fit_times(
        cls, name: str, column: Sequence[Any] | np.ndarray, reference: datetime | None
    ) -> Feature:
        seconds = to_seconds(name, column)
        known = seconds[~np.isnan(seconds)]
        if reference is not None:
            start = float(to_seconds(name, [reference])[0])
        else:
            start = float(known.max()) if len(known) else 0.0
        if len(known) and known.min() >= start and known.max() > start:
            logger.warning(
                "Feature %r: no time is before %s, from which ages count: the age of all is 0.",
                name,
                reference,
            )
        mean, scale = _moments(_log_age(known, start))
        return cls(
            name, "timestamp", num_values=NUM_TIME_VALUES, mean=mean, scale=scale, reference=start
        )

    def encode(self, column: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Encodes a column.

        Args:
            column: As in `fit`; values that it never saw are fine.

        Returns:
            [n] int32, 0 where missing or unknown (categorical, hashed, bucketized);
            [n, num_values] int32, padded with 0 (multi_categorical, text);
            [n] float32 (numeric), [n, 5] float32 (timestamp: age, then sine and cosine of the hour
            and of the weekday), [n, num_values] float32 (vector), NaN where missing.

        Raises:
            ValueError: If an entry is no number where the kind has numbers, a time has no time
                zone, or a vector has another length than the fitted ones, or numbers that are not
                finite.
        """
        if self.kind == "numeric":
            return ((to_numbers(self.name, column) - self.mean) / self.scale).astype(np.float32)
        if self.kind == "bucketized":
            numbers = to_numbers(self.name, column)
            codes = 1 + np.searchsorted(np.array(self.boundaries), numbers, side="right")
            return np.where(np.isnan(numbers), 0, codes).astype(np.int32)
        if self.kind == "timestamp":
            seconds = to_seconds(self.name, column)
            age = (_log_age(seconds, self.reference) - self.mean) / self.scale
            return np.column_stack([age, *_cycles(seconds)]).astype(np.float32)
        if self.kind == "vector":
            return to_vectors(self.name, column, self.num_values) / np.float32(self.scale)
        if self.kind == "hashed":
            return self._hash(column)
        places = self.places
        codes = np.zeros((len(column), self.num_values), np.int32)
        for i, value in enumerate(column):
            known = [places.get(v, 0) for v in to_values(self.kind, value)][: self.num_values]
            codes[i, : len(known)] = known
        return codes[:, 0] if self.kind == "categorical" else codes

    def _hash(self, column: Sequence[Any] | np.ndarray) -> np.ndarray:
        values = [to_values(self.kind, value) for value in column]
        texts = tf.constant([row[0] if row else "" for row in values], tf.string, [len(values)])
        buckets = tf.strings.to_hash_bucket_fast(texts, self.num_buckets).numpy()
        is_known = np.array([bool(row) for row in values], bool)
        return np.where(is_known, 1 + buckets, 0).astype(np.int32)

    @property
    def places(self) -> dict[str, int]:
        """Code of each known value: its place in the vocabulary, from 1."""
        return {value: i + 1 for i, value in enumerate(self.vocabulary)}

    @property
    def spec(self) -> FeatureSpec:
        """What a layer needs to know of the feature."""
        num_codes = len(self.vocabulary)
        if self.kind == "hashed":
            num_codes = self.num_buckets
        elif self.kind == "bucketized":
            num_codes = len(self.boundaries) + 1
        return FeatureSpec(self.name, self.kind, num_codes + 1, self.num_values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the feature as what JSON can hold; `from_dict` makes an equal one of it."""
        settings = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Feature:
        """Makes the feature that `to_dict` was called on.

        Args:
            settings: As returned by `to_dict`, also after a way through JSON; what is left out has
                its default.

        Raises:
            ValueError: If the name or the kind is missing, or a key or the kind is unknown.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"A feature has no {', '.join(unknown)}. Known: {sorted(known)}.")
        if missing := sorted({"name", "kind"} - set(settings)):
            raise ValueError(f"A feature needs {' and '.join(missing)}. Received: {settings}.")
        if settings["kind"] not in get_args(FeatureKind):
            raise ValueError(
                f"The kind of feature '{settings['name']}' must be one of "
                f"{', '.join(get_args(FeatureKind))}. Received: {settings['kind']!r}."
            )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in settings.items()
        }
        return cls(**values)


@dataclass(frozen=True)
class FeatureSpec:
    """Shape of an encoded feature: `size` codes, 0 included, and `num_values` per row."""

    name: str
    kind: FeatureKind
    size: int
    num_values: int

    def empty(self, num_rows: int) -> np.ndarray:
        """Returns the encoding of `num_rows` missing values."""
        has_list = self.kind in _LISTS or self.kind in ("timestamp", "vector")
        shape = (num_rows, self.num_values) if has_list else (num_rows,)
        if self.kind in _NUMBERS:
            return np.full(shape, np.nan, np.float32)
        return np.zeros(shape, np.int32)


def to_numbers(name: str, column: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Returns [n] float64, NaN where missing.

    Raises:
        ValueError: If an entry is no number.
    """
    numbers = np.full(len(column), np.nan)
    for i, value in enumerate(column):
        if value is None:
            continue
        try:
            numbers[i] = value
        except (TypeError, ValueError):
            raise ValueError(
                f"Feature '{name}' must hold numbers. Received: {value!r} in row {i} of "
                f"{len(column)}; None is missing."
            ) from None
    return numbers


def _moments(numbers: np.ndarray) -> tuple[float, float]:
    """Returns mean and standard deviation of the finite numbers, 0 and 1 where there is none."""
    known = numbers[np.isfinite(numbers)]
    if len(known) == 0:
        return 0.0, 1.0
    # Rounding gives equal numbers a deviation just above 0, and every other one a huge value.
    scale = float(known.std()) if known.min() < known.max() else 1.0
    return float(known.mean()), scale or 1.0


def _boundaries(numbers: np.ndarray) -> tuple[float, ...]:
    """Returns quantiles that part the finite numbers into buckets, each of which holds some."""
    known = numbers[np.isfinite(numbers)]
    if len(known) == 0:
        return ()
    shares = np.arange(1, MAX_BUCKETS) / MAX_BUCKETS
    # "higher" picks a number of the column, so that it opens its bucket; none opens at the lowest.
    quantiles = np.unique(np.quantile(known, shares, method="higher"))
    return tuple(quantiles[quantiles > known.min()].tolist())


def bucket_count(num_values: int, *, per_value: int, low: int, high: int) -> int:
    """Returns a power of two: the next above `per_value` * `num_values`, from `low` to `high`.

    Example:
        >>> bucket_count(100, per_value=2, low=16, high=2**20)
        256
    """
    wanted = 2 ** (per_value * num_values - 1).bit_length()
    return min(max(wanted, low), high)


def to_seconds(name: str, column: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Returns [n] float64 seconds since 1970, NaN where missing.

    Raises:
        ValueError: If an entry is no datetime, or one without a time zone.
    """
    seconds = np.full(len(column), np.nan)
    for i, value in enumerate(column):
        if value is None or value != value:  # NaN, or the NaT of pandas.
            continue
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise ValueError(
                f"Feature '{name}' must hold datetimes with a time zone. Received: {value!r} in "
                f"row {i} of {len(column)}. Say which zone it is in: value.replace(tzinfo=...)."
            )
        seconds[i] = value.timestamp()
    return seconds


def _log_age(seconds: np.ndarray, reference: float) -> np.ndarray:
    return np.log1p(np.maximum(reference - seconds, 0.0) / DAY_SECONDS)


def _cycles(seconds: np.ndarray) -> Iterable[np.ndarray]:
    """Yields sine and cosine of the time of day, then of the weekday, in UTC."""
    days = np.floor(seconds / DAY_SECONDS)
    # 1970 began on a Thursday; a weekday is one point of its circle, whatever the hour.
    for turns in (seconds / DAY_SECONDS - days, (days + 3) % 7 / 7):
        yield np.sin(2 * np.pi * turns)
        yield np.cos(2 * np.pi * turns)


def to_vectors(
    name: str, column: Sequence[Any] | np.ndarray, length: int | None = None
) -> np.ndarray:
    """Returns [n, length] float32, NaN in rows that are missing.

    Raises:
        ValueError: If lengths differ (from `length`, if given), a number is not finite, or all are
            missing and no length is given.
    """
    rows = [None if is_missing_value(value) else value for value in column]
    if wrong := [row for row in rows if row is not None and np.ndim(row) != 1]:
        raise ValueError(
            f"Feature '{name}' must hold vectors. Received: {len(wrong)} of {len(rows)} rows that "
            f"are none, such as {wrong[0]!r}."
        )
    lengths = Counter(len(row) for row in rows if row is not None)
    if length is None:
        if not any(lengths):
            raise ValueError(
                f"Feature '{name}' must hold vectors. Received: {len(rows)} rows without."
            )
        length = lengths.most_common(1)[0][0]
    if others := sorted(set(lengths) - {length}):
        num_other = sum(lengths[other] for other in others)
        raise ValueError(
            f"Feature '{name}' must hold vectors of length {length}. Received: {num_other} of "
            f"{len(rows)} rows of another length, such as {others[0]}."
        )
    vectors = np.full((len(rows), length), np.nan, np.float32)
    is_known = np.array([row is not None for row in rows], bool)
    if is_known.any():
        with np.errstate(over="ignore"):  # What is too large for float32 is refused below.
            vectors[is_known] = np.array([row for row in rows if row is not None], np.float32)
    num_bad = int((is_known & ~np.isfinite(vectors).all(axis=1)).sum())
    if num_bad:
        raise ValueError(
            f"Feature '{name}' must hold finite float32 numbers. Received: others in {num_bad} of "
            f"{len(rows)} rows; None is missing."
        )
    return vectors


def is_missing_value(value: Any) -> bool:
    """Says whether an entry of a column is missing: None, or NaN."""
    return value is None or (isinstance(value, float) and np.isnan(value))


def to_values(kind: FeatureKind, value: Any) -> list[str]:
    """Returns what the vocabulary is looked up for, of one entry of a column; [] if missing.

    The empty string is missing, as an empty field of a CSV file is.

    Args:
        kind: One of categorical, hashed, multi_categorical and text.
        value: Entry of the column, as the table of `Feature` says.

    Example:
        >>> to_values("multi_categorical", ["a", 7, None, ""])
        ['a', '7']
        >>> to_values("text", "Schindler's  List!")
        ["schindler's", 'list']
    """
    if is_missing_value(value):
        return []
    if kind == "text":
        return _TOKEN.findall(str(value).lower())
    values: Iterable[Any] = [value]
    if kind == "multi_categorical" and not isinstance(value, str):
        values = value
    return [text for v in values if v is not None and (text := str(v))]


def layer_name(column: str) -> str:
    """Returns a name that TensorFlow takes for a layer: the column's, where it can be.

    Example:
        >>> layer_name("year"), layer_name("release date")
        ('year', 'xrelease_date_9cebf073')
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", column)
    if name == column and name[:1].isalnum():
        return name
    return f"x{name}_{zlib.crc32(column.encode()):08x}"


class FeatureTable(tf.keras.layers.Layer):
    """Encoded features of every row, constant in the model and gathered by row.

    Args:
        specs: The features.
        num_rows: Rows, row 0 "unknown" included.
    """

    def __init__(self, specs: Sequence[FeatureSpec], num_rows: int, name: str) -> None:
        super().__init__(name=name, trainable=False)
        self._columns = {}
        for spec in specs:
            missing = spec.empty(1)
            self._columns[spec.name] = self.add_weight(
                name=layer_name(spec.name),
                shape=(num_rows, *missing.shape[1:]),
                dtype=tf.as_dtype(missing.dtype),
                initializer=tf.constant_initializer(missing.flat[0]),
                trainable=False,
            )

    def assign(self, columns: dict[str, np.ndarray]) -> None:
        """Sets the features.

        Args:
            columns: Per feature, the encoded rows 1, 2, ...; row 0 stays "missing".

        Raises:
            ValueError: If a feature is missing or has the wrong shape.
        """
        for name, variable in self._columns.items():
            if name not in columns:
                raise ValueError(f"Feature '{name}' is missing. Received: {sorted(columns)}")
            expected = (variable.shape[0] - 1, *variable.shape[1:])
            if columns[name].shape != expected:
                raise ValueError(
                    f"Feature '{name}' must have shape {expected}. Received: {columns[name].shape}"
                )
            first = variable[:1].numpy()
            variable.assign(np.concatenate([first, columns[name]]))

    def call(self, rows: tf.Tensor) -> dict[str, tf.Tensor]:
        """Gathers the features of `rows`, [n] int32."""
        return {name: tf.gather(column, rows) for name, column in self._columns.items()}


class FeatureEmbedding(tf.keras.layers.Layer):
    """Embeds one encoded feature.

    Categorical, hashed and bucketized: an embedding, code 0 included. Multi-valued and text: the
    mean of the embeddings of the codes other than 0, the zero vector where there is none. Numeric
    and timestamp: the values. Vector: a trained linear map of it. These three have zeros where the
    value is missing, and say in one more column whether it is.

    Args:
        spec: The feature.
        dim: Embedding size (not used by numeric and timestamp features).
    """

    def __init__(self, spec: FeatureSpec, dim: int) -> None:
        name = layer_name(spec.name)
        super().__init__(name=f"{name}_embedding")
        self._kind = spec.kind
        if spec.kind == "vector":
            # Without a bias, so that a missing vector is mapped to zeros.
            self._projection = tf.keras.layers.Dense(dim, use_bias=False, name=name)
        elif spec.kind not in _NUMBERS:
            self._embedding = tf.keras.layers.Embedding(spec.size, dim, name=name)

    def call(self, values: tf.Tensor) -> tf.Tensor:
        """Embeds encoded values.

        Args:
            values: [n] or [n, num_values], as `Feature.encode` returns them.

        Returns:
            [n, dim] float32; [n, dim + 1] if vector, [n, 2] if numeric, [n, 6] if timestamp.
        """
        if self._kind in _NUMBERS:
            return self._flagged(values[:, tf.newaxis] if self._kind == "numeric" else values)
        embedded = self._embedding(values)
        if self._kind in _LISTS:
            return weighted_mean(embedded, tf.cast(values > 0, tf.float32))
        return embedded

    def _flagged(self, values: tf.Tensor) -> tf.Tensor:
        """Fills missing rows with zeros, maps vectors, and appends whether the row was missing."""
        is_missing = tf.math.is_nan(values[:, :1])
        filled = tf.where(is_missing, tf.zeros_like(values), values)
        if self._kind == "vector":
            filled = self._projection(filled)
        return tf.concat([filled, tf.cast(is_missing, tf.float32)], axis=1)


def drop_features(
    features: Mapping[str, tf.Tensor], specs: Sequence[FeatureSpec], rate: float, seed: tf.Tensor
) -> dict[str, tf.Tensor]:
    """Sets features to missing at random, each by itself in each row.

    A model that trains on the rest leans on no single feature, and knows what a missing one means.

    Args:
        features: Encoded features by name, [n] or [n, num_values].
        specs: Those of the features that may be dropped; others are returned as they are.
        rate: Probability that a feature of a row is dropped, 0 to 1.
        seed: [2] int32. The result is a function of the arguments; the draws are apart from those
            of `tf.random.stateless_uniform` with the same seed.

    Returns:
        The features, encoded as missing (`FeatureSpec.empty`) where they are dropped.

    Raises:
        ValueError: If the rate is out of range, or a feature is missing.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"`rate` must be from 0 to 1. Received: {rate}.")
    if missing := [spec.name for spec in specs if spec.name not in features]:
        raise ValueError(f"Features {missing} are missing. Received: {sorted(features)}.")
    dropped = dict(features)
    if not specs or not rate:
        return dropped
    own_seed = fold(seed, Stream.FEATURES)
    num_rows = tf.shape(features[specs[0].name])[0]
    drawn = tf.random.stateless_uniform([num_rows, len(specs)], own_seed)
    for i, spec in enumerate(specs):
        empty = spec.empty(1)
        is_dropped = drawn[:, i : i + 1] if empty.ndim == 2 else drawn[:, i]
        dropped[spec.name] = tf.where(is_dropped < rate, empty, features[spec.name])
    return dropped


def weighted_mean(vectors: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Computes the weighted mean over the second axis, zero where no weight is positive.

    Args:
        vectors: [n, m, d].
        weights: [n, m], 0 or more.

    Returns:
        [n, d].
    """
    total = tf.reduce_sum(weights, axis=1, keepdims=True)
    return tf.math.divide_no_nan(tf.einsum("nmd,nm->nd", vectors, weights), total)
