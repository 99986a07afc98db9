"""Feature columns encoded in the graph.

A feature is encoded by one program, `Feature.encode`: for the corpus of a training, which goes
through it in blocks, and in every exported model, for raw requests.
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.layers import FeatureSpec
from tfrs_pipeline.features.raw import (
    BOOLEANS,
    Column,
    padded,
    to_numbers,
    to_seconds,
    to_text_lists,
    to_texts,
    to_vectors,
)
from tfrs_pipeline.features.vocabulary import (
    bucket_count,
    count_values,
    has_booleans,
    in_blocks,
    lower_booleans,
    words_of,
)
from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS

if TYPE_CHECKING:
    from tfrs_pipeline.features.kinds import FeatureKind

logger = logging.getLogger(__name__)

# Most known values of a list, and most known words of a text, that are kept.
MAX_VALUES: dict[FeatureKind, int] = {"multi_categorical": 16, "text": 64}
MAX_BUCKETS = 32
MAX_DEVIATIONS = 10.0
MAX_HASH_BUCKETS = 2**20
NUM_TIME_VALUES = 5
DAY_SECONDS = 86_400.0

# What the graph takes of each kind, with NaN or "" where it is missing.
_RAW_DTYPES: dict[FeatureKind, tf.DType] = {
    **dict.fromkeys(("categorical", "hashed", "multi_categorical", "text"), tf.string),
    **dict.fromkeys(("numeric", "bucketized", "timestamp"), tf.float64),
    "vector": tf.float32,
}
# What a signature may take beside features.
_OTHER_INPUTS = (
    *("user_id", "item_id", "history", HISTORY_TIMESTAMPS),
    *("timestamp", "exclude", "allowed", "k"),
)


@dataclass(frozen=True)
class Feature:
    """How one column is encoded: `to_raw` makes its values an array, `encode` is the graph's part.

    | kind | a row of the column | raw, for the graph | encoded |
    |---|---|---|---|
    | categorical | a value | string [B], as `to_text` | its place in the vocabulary |
    | hashed | a value, of very many | string [B] | a bucket by its hash (FarmHash) |
    | multi_categorical | a list of values | string [B, any], padded with "" | their places |
    | text | a string | string [B], UTF-8 | places of its lower-case words, a bag |
    | numeric | a number | float64 [B] | standardised |
    | bucketized | a number | float64 [B] | its bucket between quantiles of the column |
    | timestamp | a `datetime` with a zone | float64 [B], s since 1970 | age, hour, weekday (UTC) |
    | vector | a list of n numbers | float32 [B, n] | the same, of length 1 on average |

    A raw value is missing if it is "", NaN or infinite, a vector if one of its numbers is (`to_raw`
    refuses such vectors). What is standardised is clipped to 10 deviations on either side, and a
    vector's numbers to 10 typical lengths: no value, however absurd, drowns the rest of a tower.

    The age of a timestamp is log(1 + days before `reference`), standardised, so that it tells apart
    the recent ones; what is later than the reference has the age 0. The vectors of a column are all
    divided by one number, the root mean square of their lengths, which keeps their directions.
    Words are runs of letters, their marks, digits, underscores, and apostrophes within. Of scripts
    without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character, with
    its marks, is a word.

    Vocabularies and hashes are Keras' `StringLookup` and `Hashing`. Numbers are not left to its
    `Normalization` and `Discretization`, which compute in float32: that has no room for seconds
    since 1970, or for counts above 16 million, and the former raises deviations below 1e-7 to that.

    Args:
        name: Column name.
        kind: One of the above.
        vocabulary: Known values; value i is encoded as i + 1, 0 is unknown or missing.
        num_values: Most known values kept (multi_categorical and text), or the vectors' length.
        longest: Longest list of the column (multi_categorical and text).
        spread: Length of the shortest interval that holds three in four of the known values, in
            standard deviations (numeric).
        mean: Of a numeric column, or of the ages of a timestamp column.
        scale: The same's standard deviation; of a vector column the typical length.
        boundaries: Lowest value of every bucket but the first (bucketized), ascending; the buckets
            are encoded as 1, 2, ..., 0 is missing.
        num_buckets: Buckets of a hashed column, encoded as 1 to num_buckets; 0 is missing.
        reference: Time from which the age of a timestamp counts, in seconds since 1970 (UTC).
        is_from_timestamp: Whether it is the hour or the weekday that a request's timestamp tells.

    Example:
        >>> genres = Feature.fit("genres", "multi_categorical", [["war", "drama"], ["war"]])
        >>> raw = genres.to_raw([["noir", "war"], None])
        >>> raw
        array([['noir', 'war'], ['', '']], dtype=object)
        >>> genres.encode(raw).numpy()[:, :2]
        array([[2, 0],
               [0, 0]], dtype=int32)
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
    is_from_timestamp: bool = False
    longest: int = 0
    spread: float = 0.0

    @classmethod
    def fit(
        cls,
        name: str,
        kind: FeatureKind,
        column: Column,
        *,
        min_count: int = 1,
        max_values: int | None = None,
        reference: datetime | None = None,
    ) -> Feature:
        """Learns the encoding of a column.

        Args:
            name: Column name.
            kind: Feature kind.
            column: One entry a row, as the table above says; None or NaN is missing. An Arrow or
                NumPy array is read at once, a list value by value.
            min_count: Values of fewer rows are unknown (categorical, multi_categorical, text).
            max_values: Most known values to keep; None means 16 (multi_categorical), or 16 to 64
                words, by the longest text.
            reference: Time from which the age of a timestamp counts, such as the end of the log;
                None means the latest value of the column.

        Raises:
            ValueError: If an entry is no number where the kind has numbers, a time has no time
                zone, or vectors differ in length, are all missing, or hold infinite numbers.
        """
        if kind == "numeric":
            numbers = to_numbers(name, column)
            mean, scale = _moments(numbers)
            return cls(name, kind, mean=mean, scale=scale, spread=_spread(numbers) / scale)
        if kind == "bucketized":
            return cls(name, kind, boundaries=_boundaries(to_numbers(name, column)))
        if kind == "timestamp":
            return cls._fit_times(name, column, reference)
        if kind == "vector":
            vectors = to_vectors(name, column)
            squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
            scale = float(np.sqrt(np.nanmean(squares))) or 1.0
            return cls(name, kind, num_values=vectors.shape[1], scale=scale)
        counts, longest = count_values(kind, column)
        if kind == "hashed":
            # A value shares its bucket with another one in 4 cases of 10 at most; more of them do
            # at the ceiling, which holds the table to 16 MB at 4 dimensions.
            buckets = bucket_count(len(counts), per_value=2, low=16, high=MAX_HASH_BUCKETS)
            return cls(name, kind, num_buckets=buckets)
        vocabulary = tuple(sorted(value for value, count in counts.items() if count >= min_count))
        most = MAX_VALUES.get(kind, 1) if max_values is None else max_values
        # No fewer than most lists have, so that longer ones than these can come later.
        num_values = max(1, min(max(longest, MAX_VALUES["multi_categorical"]), most))
        return cls(name, kind, vocabulary, num_values, longest=longest)

    @classmethod
    def _fit_times(cls, name: str, column: Column, reference: datetime | None) -> Feature:
        seconds = to_seconds(name, column)
        known = seconds[~np.isnan(seconds)]
        start = float(known.max()) if len(known) else 0.0
        if reference is not None:
            start = float(to_seconds(name, [reference])[0])
        if len(known) and known.min() >= start and known.max() > start:
            logger.warning(
                "Feature %r: no time is before %s, from which ages count: the age of all is 0.",
                name,
                reference,
            )
        mean, scale = _moments(np.log1p(np.maximum(start - known, 0.0) / DAY_SECONDS))
        return cls(name, "timestamp", (), NUM_TIME_VALUES, mean, scale, reference=start)

    def to_raw(self, column: Column) -> np.ndarray:
        """Makes a column the array that `encode` takes; this needs no graph.

        Strings come as an object array of `str`, a list in full but for what is missing or empty
        within it; values that `fit` never saw are fine. A `ValueError` as of `fit`, or if a vector
        has another length than the fitted ones.
        """
        if self.kind in ("numeric", "bucketized"):
            return to_numbers(self.name, column)
        if self.kind == "timestamp":
            return to_seconds(self.name, column)
        if self.kind == "vector":
            return to_vectors(self.name, column, self.num_values)
        if self.kind == "multi_categorical":
            return padded(*to_text_lists(column))
        return np.asarray(to_texts(column).to_numpy(zero_copy_only=False), object)

    def encode(self, raw: tf.Tensor) -> tf.Tensor:
        """Encodes raw values, [B] or [B, any], as the table above says.

        Returns:
            [B] int32, 0 where missing or unknown (categorical, hashed, bucketized);
            [B, num_values] int32, the known ones, padded with 0 (multi_categorical, text);
            [B] float32 (numeric), [B, 5] float32 (timestamp: age, then sine and cosine of the hour
            and of the weekday), [B, num_values] float32 (vector), NaN where missing.
        """
        spec = self.raw_spec
        raw = tf.ensure_shape(tf.convert_to_tensor(raw, spec.dtype), spec.shape)
        if self._is_stripped:
            raw = tf.strings.strip(raw)
        if self._takes_whole_floats:
            raw = tf.strings.regex_replace(raw, r"^(-?[0-9]+)\.0$", r"\1")
        if self._has_booleans:
            raw = lower_booleans(raw)
        if self.kind == "numeric":
            return _where_finite(raw, _standardised(raw - self.mean, self.scale))
        if self.kind == "bucketized":
            boundaries = tf.constant(self.boundaries, tf.float64)
            codes = 1 + tf.searchsorted(boundaries, raw, side="right")
            return tf.where(tf.math.is_finite(raw), codes, 0)
        if self.kind == "timestamp":
            return self._encode_times(raw)
        if self.kind == "vector":
            is_known = tf.reduce_all(tf.math.is_finite(raw), axis=1, keepdims=True)
            return tf.where(is_known, _standardised(raw, self.scale), np.float32(np.nan))
        if self.kind == "hashed":
            # The bucket 0 is that of the mask.
            return tf.keras.layers.Hashing(self.num_buckets + 1, mask_value="", dtype="int32")(raw)
        if self.kind == "categorical":
            return self._code(raw)
        # Not padded before they are cut: one row may have very many words.
        lists = words_of(raw) if self.kind == "text" else tf.RaggedTensor.from_tensor(raw)
        codes = self._code(lists.values)
        place = tf.where(codes > 0)[:, 0]
        rows = tf.gather(lists.value_rowids(), place)
        known = tf.RaggedTensor.from_value_rowids(
            tf.gather(codes, place), rows, lists.nrows(), validate=False
        )
        return known[:, : self.num_values].to_tensor(shape=[None, self.num_values])

    def _code(self, values: tf.Tensor) -> tf.Tensor:
        """Looks up values, [n] string: int32, 0 where unknown."""
        if not self.vocabulary:
            return tf.zeros_like(values, tf.int32)
        return tf.cast(self._lookup(values), tf.int32)

    def encode_column(self, column: Column) -> np.ndarray:
        """Encodes a column by `to_raw` and `encode`, in blocks of rows."""
        blocks = [self.encode(self.to_raw(block)).numpy() for block in in_blocks(column)]
        return np.concatenate(blocks)

    def _encode_times(self, seconds: tf.Tensor) -> tf.Tensor:
        age = tf.math.log1p(tf.maximum(self.reference - seconds, 0.0) * (1 / DAY_SECONDS))
        values = [_standardised(age - self.mean, self.scale)]
        of_day = tf.math.floormod(seconds, DAY_SECONDS)
        # 1970 began on a Thursday; a weekday is one point of its circle, whatever the hour.
        of_week = tf.math.floormod(seconds - of_day + 3 * DAY_SECONDS, 7 * DAY_SECONDS)
        for angle in (of_day * (2 * np.pi / DAY_SECONDS), of_week * (2 * np.pi / 7 / DAY_SECONDS)):
            values += [tf.cast(tf.sin(angle), tf.float32), tf.cast(tf.cos(angle), tf.float32)]
        return _where_finite(seconds[:, tf.newaxis], tf.stack(values, axis=1))

    @property
    def _is_code(self) -> bool:
        return self.kind in ("categorical", "hashed")

    @functools.cached_property
    def _is_stripped(self) -> bool:
        """Whether white space around a value says nothing, as in the column of a log."""
        return self._is_code and all(value == value.strip() for value in self.vocabulary)

    @functools.cached_property
    def _takes_whole_floats(self) -> bool:
        """Whether 7.0, as a table with missing values writes 7, means the value 7."""
        return self._is_code and not any(value.endswith(".0") for value in self.vocabulary)

    @functools.cached_property
    def _has_booleans(self) -> bool:
        return self.kind == "hashed" or has_booleans(self.vocabulary)

    @functools.cached_property
    def known_texts(self) -> frozenset[str]:
        """What a request may say, as text, of a categorical feature to be understood, or missing.

        Example:
            >>> sorted(Feature("shelf", "categorical", ("7", "top")).known_texts)
            ['', '7', '7.0', 'top']
        """
        whole = [x for x in self.vocabulary if x.removeprefix("-").isdecimal()]
        also = [f"{x}.0" for x in whole] if self._takes_whole_floats else []
        also += BOOLEANS if self._has_booleans else ()
        return frozenset(("", *self.vocabulary, *also))

    @functools.cached_property
    def _lookup(self) -> tf.keras.layers.StringLookup:
        # What is unknown has the code of the empty string, which no vocabulary holds.
        vocabulary = np.array(self.vocabulary, object)
        return tf.keras.layers.StringLookup(vocabulary=vocabulary, oov_token="")

    @property
    def raw_spec(self) -> tf.TensorSpec:
        """Shape and dtype of what `encode` takes."""
        shape: list[int | None] = [None]
        if self.kind in ("multi_categorical", "vector"):
            shape.append(self.num_values if self.kind == "vector" else None)
        return tf.TensorSpec(shape, _RAW_DTYPES[self.kind])

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
        """Makes the feature that `to_dict` was called on, also after a way through JSON.

        A `ValueError` if the name or the kind is missing, or a key or the kind is unknown.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not {"name", "kind"} <= set(settings) <= known:
            raise ValueError(
                f"A feature has a name, a kind, and of {', '.join(sorted(known))} what is not its "
                f"default. Received: {', '.join(settings)}."
            )
        if settings["kind"] not in _RAW_DTYPES:
            raise ValueError(
                f"The kind of feature '{settings['name']}' must be one of "
                f"{', '.join(_RAW_DTYPES)}. Received: {settings['kind']!r}."
            )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in settings.items()
        }
        return cls(**values)


def raw_signature(features: Sequence[Feature]) -> dict[str, tf.TensorSpec]:
    """Returns what `encode_raw` takes, by the features' names, in their order.

    Each spec has the name of its input in an exported signature. That is the feature's where
    TensorFlow allows it and no other input has it; others get one of ASCII letters, digits and
    underscores.

    Raises:
        ValueError: If two features have the same name.

    Example:
        >>> raw_signature([Feature("release date", "numeric")])
        {'release date': TensorSpec(shape=(None,), dtype=tf.float64, name='release_date')}
    """
    names = [feature.name for feature in features]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Features must have different names. Received twice: {repeated}.")
    taken = set(_OTHER_INPUTS)
    signature = {}
    for feature in features:
        name = re.sub(r"[^A-Za-z0-9_]", "_", feature.name)
        if not name[:1].isalpha():
            name = f"input_{name}"
        # TensorFlow renames inputs that differ in case alone, and refuses to save them then.
        # A signature's inputs are called by keyword.
        while name.lower() in taken or keyword.iskeyword(name) or name == "self":
            name += "_"
        taken.add(name.lower())
        spec = feature.raw_spec
        signature[feature.name] = tf.TensorSpec(spec.shape, spec.dtype, name)
    return signature


def raw_columns(
    features: Sequence[Feature], columns: Mapping[str, Column], num_rows: int
) -> dict[str, np.ndarray]:
    """Makes columns, by the features' names, the arrays of `raw_signature` (see `Feature.to_raw`).

    A `ValueError` if a column is missing or has not `num_rows` rows, and as of `Feature.to_raw`.
    """
    _check_given(features, columns)
    for feature in features:
        if (length := len(columns[feature.name])) != num_rows:
            raise ValueError(
                f"Column '{feature.name}' must have {num_rows} rows. Received: {length}."
            )
    return {feature.name: feature.to_raw(columns[feature.name]) for feature in features}


def encode_raw(features: Sequence[Feature], raw: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Encodes what `raw_signature` says, in that order; a `ValueError` if a feature is missing."""
    _check_given(features, raw)
    return {feature.name: feature.encode(raw[feature.name]) for feature in features}


def lookup_tables(features: Sequence[Feature]) -> dict[str, tf.lookup.StaticHashTable]:
    """Returns the vocabularies by the features' names: a module that encodes must hold them."""
    return {f.name: f._lookup.lookup_table for f in features if f.vocabulary}


def _check_given(features: Sequence[Feature], given: Mapping[str, Any]) -> None:
    if missing := [feature.name for feature in features if feature.name not in given]:
        raise ValueError(f"Features {missing} are missing. Received: {sorted(given)}.")


def _standardised(values: tf.Tensor, scale: float) -> tf.Tensor:
    """Divides by a scale other than 0, clips, and returns float32."""
    # A graph would turn `/` into a multiplication by the reciprocal, rounded otherwise.
    scaled = tf.math.divide_no_nan(values, tf.constant(scale, values.dtype))
    return tf.cast(tf.clip_by_value(scaled, -MAX_DEVIATIONS, MAX_DEVIATIONS), tf.float32)


def _where_finite(raw: tf.Tensor, encoded: tf.Tensor) -> tf.Tensor:
    return tf.where(tf.math.is_finite(raw), encoded, np.float32(np.nan))


def _moments(numbers: np.ndarray) -> tuple[float, float]:
    """Returns mean and standard deviation of the finite numbers, 0 and 1 where there is none."""
    known = numbers[np.isfinite(numbers)]
    if len(known) == 0:
        return 0.0, 1.0
    size = float(np.abs(known).max()) or 1.0  # Squares of large numbers are infinite.
    # Rounding gives equal numbers a deviation just above 0, and every other one a huge value.
    scale = size * float((known / size).std()) if known.min() < known.max() else 1.0
    return size * float((known / size).mean()), scale or 1.0


def _spread(numbers: np.ndarray) -> float:
    """Returns the length of the shortest interval that holds three in four finite numbers."""
    known = np.sort(numbers[np.isfinite(numbers)])
    if len(known) == 0:
        return 0.0
    num = len(known) - len(known) // 4
    with np.errstate(over="ignore"):
        return float((known[num - 1 :] - known[: len(known) - num + 1]).min())


def _boundaries(numbers: np.ndarray) -> tuple[float, ...]:
    """Returns quantiles that part the finite numbers into buckets, each of which holds some."""
    known = numbers[np.isfinite(numbers)]
    if len(known) == 0:
        return ()
    shares = np.arange(1, MAX_BUCKETS) / MAX_BUCKETS
    # "higher" picks a number of the column, so that it opens its bucket; none opens at the lowest.
    quantiles = np.unique(np.quantile(known, shares, method="higher"))
    return tuple(quantiles[quantiles > known.min()].tolist())
