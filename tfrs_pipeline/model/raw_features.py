"""Raw feature values turned into arrays within a TensorFlow graph, as `Feature.encode` does.

A SavedModel that holds it embeds an item or a user that no table knows, from raw values alone.
"""

from __future__ import annotations

import functools
import keyword
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.model.features import (
    DAY_SECONDS,
    Feature,
    is_missing_value,
    to_numbers,
    to_seconds,
    to_values,
    to_vectors,
)

# RE2's own \w is ASCII; these are the characters of Python's.
_LETTER = r"[\p{L}\p{N}_]"
_TOKEN = rf"{_LETTER}+(?:'{_LETTER}+)?"
_SIGMA = "\N{GREEK SMALL LETTER SIGMA}"  # Looks like a Latin o, says ruff.
# Of Unicode's rule for the last sigma of a word (Final_Sigma): what it looks past, and what else
# has an upper or lower case. RE2 does not have the two properties by name.
_CASE_IGNORABLE = (
    r"[\p{Mn}\p{Me}\p{Cf}\p{Lm}\p{Sk}'.:\x{B7}\x{387}\x{55F}\x{5F4}\x{2018}\x{2019}\x{2024}"
    r"\x{2027}\x{FE13}\x{FE52}\x{FE55}\x{FF07}\x{FF0E}\x{FF1A}]"
)
_CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}\x{AA}\x{BA}\x{2160}-\x{217F}\x{24B6}-\x{24E9}\x{1F130}-\x{1F149}"
    r"\x{1F150}-\x{1F169}\x{1F170}-\x{1F189}]"
)


# What a signature may take beside features.
_OTHER_INPUTS = ("user_id", "item_id", "history", "exclude", "allowed", "k")


class RawFeatures(tf.Module):
    """Encodes raw values in the graph, exactly as `Feature.encode` does in Python.

    | kind | a raw value | missing |
    |---|---|---|
    | categorical, hashed | string [B]: the value as text, what `str(value)` gives | "" |
    | multi_categorical | string [B, any]: values as text, padded with "" at the end | all "" |
    | text | string [B] | "" |
    | numeric, bucketized | float64 [B] | NaN |
    | timestamp | float64 [B], seconds since 1970 (UTC) | NaN or infinite |
    | vector | float32 [B, num_values] | a number of the row is NaN or infinite |

    `raw_columns` makes these of Python's values. The answer is that of `Feature.encode` to the bit,
    ages and angles of times but for the last float64 digits of logarithm, sine and cosine, which
    can tip their rounding to float32. Where it differs:

    - The empty string within a list keeps its place, as code 0; Python's side leaves it out.
    - Infinite vectors and times are missing; Python's side refuses them.
    - Numbers too small to be normal (float32: below 1.2e-38) may count as 0, as everywhere in
      TensorFlow.
    - Text must be UTF-8, which lone surrogates are not.
    - Characters that are newer than the Unicode tables of one side: RE2's are those of Unicode 15
      in TensorFlow 2.20; Python 3.11 has 14, 3.13 has 15.1.

    Lower case is Python's own, written into the graph: `tf.strings.lower` ends at a NUL, lacks
    recent letters, and turns I into a dotless one where the server's locale is Turkish.

    Args:
        features: Fitted features.

    Raises:
        ValueError: If two features have the same name.

    Example:
        >>> year = Feature.fit("year", "numeric", [1990.0, 1994.0])
        >>> genres = Feature.fit("genres", "multi_categorical", [["war", "drama"], ["war"]])
        >>> encode = RawFeatures([year, genres])
        >>> new = {"year": [1996, None], "genres": [["noir", "war"], ["drama"]]}
        >>> encoded = encode(raw_columns([year, genres], new, 2))
        >>> encoded["year"].numpy()
        array([ 2., nan], dtype=float32)
        >>> encoded["genres"].numpy()
        array([[0, 2], [1, 0]], dtype=int32)
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__(name="raw_features")
        counts = Counter(feature.name for feature in features)
        if repeated := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"Features must have different names. Received twice: {repeated}.")
        self._features = tuple(features)
        # As attributes they are saved with the module.
        self._vocabularies = {
            feature.name: _vocabulary_table(feature)
            for feature in features
            if feature.kind in ("categorical", "multi_categorical", "text")
        }
        if any(feature.kind == "text" for feature in features):
            self._lower_case = _lower_case_table()

    @property
    def signature(self) -> dict[str, tf.TensorSpec]:
        """What a call takes (see `raw_signature`)."""
        return raw_signature(self._features)

    def __call__(self, raw: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Encodes raw values.

        Args:
            raw: As `signature` says, B of each; B may be 0. Others are ignored.

        Returns:
            By the features' names, in their order, as `Feature.encode`:
            [B] int32, 0 where missing or unknown (categorical, hashed, bucketized);
            [B, num_values] int32, padded with 0 (multi_categorical, text);
            [B] float32 (numeric), [B, num_values] float32 (timestamp, vector), NaN where missing.

        Raises:
            ValueError: If a feature is missing.
        """
        _check_present([feature.name for feature in self._features], raw)
        encoded = {}
        for feature in self._features:
            shape, dtype = _raw_shape_and_dtype(feature)
            values = tf.ensure_shape(tf.convert_to_tensor(raw[feature.name], dtype), shape)
            encoded[feature.name] = self._encode(feature, values)
        return encoded

    def _encode(self, feature: Feature, raw: tf.Tensor) -> tf.Tensor:
        if feature.kind == "numeric":
            return tf.cast(_divide(raw - feature.mean, feature.scale), tf.float32)
        if feature.kind == "bucketized":
            boundaries = tf.constant(feature.boundaries, tf.float64)
            codes = 1 + tf.searchsorted(boundaries, raw, side="right")
            return tf.where(tf.math.is_nan(raw), 0, codes)
        if feature.kind == "timestamp":
            return _encode_times(feature, raw)
        if feature.kind == "vector":
            is_known = tf.reduce_all(tf.math.is_finite(raw), axis=1, keepdims=True)
            return tf.where(is_known, _divide(raw, feature.scale), np.nan)
        if feature.kind == "hashed":
            buckets = tf.strings.to_hash_bucket_fast(raw, feature.num_buckets)
            return tf.where(raw != "", 1 + tf.cast(buckets, tf.int32), 0)
        if feature.kind == "multi_categorical":
            raw = _first_values(raw, feature.num_values)
        elif feature.kind == "text":
            words = _words(raw, self._lower_case)[:, : feature.num_values]
            raw = words.to_tensor("", shape=[None, feature.num_values])
        return self._vocabularies[feature.name].lookup(raw)


def raw_signature(features: Sequence[Feature]) -> dict[str, tf.TensorSpec]:
    """Returns what `RawFeatures` takes, by the features' names, in their order.

    Each spec has the name of its input in an exported signature. That is the feature's where
    TensorFlow allows it and no other input has it; others get one of ASCII letters, digits and
    underscores.

    Args:
        features: Fitted features.

    Example:
        >>> date = Feature.fit("release date", "numeric", [1990.0, 1994.0])
        >>> raw_signature([date])
        {'release date': TensorSpec(shape=(None,), dtype=tf.float64, name='release_date')}
    """
    return {
        feature.name: tf.TensorSpec(*_raw_shape_and_dtype(feature), name)
        for feature, name in zip(features, _input_names(features), strict=True)
    }


def raw_columns(
    features: Sequence[Feature],
    columns: Mapping[str, Sequence[Any] | np.ndarray],
    num_rows: int,
) -> dict[str, np.ndarray]:
    """Turns columns as `Feature.encode` takes them into what `RawFeatures` takes.

    Args:
        features: Fitted features.
        columns: By the features' names, `num_rows` entries each; None or NaN is missing. Others
            are ignored.
        num_rows: Number of rows, B.

    Returns:
        By the features' names, in their order, the arrays of `RawFeatures.signature`; strings as
        object arrays of `str`. A list is kept in full, the shorter ones padded with "".

    Raises:
        ValueError: If a column is missing or has another number of rows, and as `Feature.encode`:
            if a time has no time zone, or a vector has another length than the fitted ones, or
            numbers that are not finite.

    Example:
        >>> genres = Feature.fit("genres", "multi_categorical", [["war", "drama"], ["war"]])
        >>> raw_columns([genres], {"genres": [["noir", "war"], None]}, 2)["genres"]
        array([['noir', 'war'], ['', '']], dtype=object)
    """
    _check_present([feature.name for feature in features], columns)
    for feature in features:
        if (length := len(columns[feature.name])) != num_rows:
            raise ValueError(
                f"Column '{feature.name}' must have {num_rows} rows. Received: {length}."
            )
    return {feature.name: _raw_column(feature, columns[feature.name]) for feature in features}


def _raw_shape_and_dtype(feature: Feature) -> tuple[list[int | None], tf.DType]:
    if feature.kind in ("numeric", "bucketized", "timestamp"):
        return [None], tf.float64
    if feature.kind == "vector":
        return [None, feature.num_values], tf.float32
    return [None, None] if feature.kind == "multi_categorical" else [None], tf.string


def _input_names(features: Sequence[Feature]) -> list[str]:
    """Returns names, one a feature, that inputs of a SavedModel's signature can have."""
    names = {name: name for name in _OTHER_INPUTS}
    for feature in features:
        name = re.sub(r"[^A-Za-z0-9_]", "_", feature.name)
        if not name[:1].isalpha():
            name = f"input_{name}"
        # TensorFlow renames inputs that differ in case alone, and refuses to save them then.
        # A signature's inputs are called by keyword.
        while name.lower() in names or keyword.iskeyword(name) or name == "self":
            name += "_"
        names[name.lower()] = name
    return list(names.values())[len(_OTHER_INPUTS) :]


def _raw_column(feature: Feature, column: Sequence[Any] | np.ndarray) -> np.ndarray:
    if feature.kind in ("numeric", "bucketized"):
        return to_numbers(feature.name, column)
    if feature.kind == "timestamp":
        return to_seconds(feature.name, column)
    if feature.kind == "vector":
        return to_vectors(feature.name, column, feature.num_values)
    if feature.kind == "text":
        texts = ["" if is_missing_value(value) else str(value) for value in column]
        return np.array(texts, object)
    rows = [to_values(feature.kind, value) for value in column]
    if feature.kind != "multi_categorical":
        return np.array([row[0] if row else "" for row in rows], object)
    lists = np.full((len(rows), max(map(len, rows), default=0)), "", object)
    for i, row in enumerate(rows):
        lists[i, : len(row)] = row
    return lists


def _check_present(names: Sequence[str], given: Mapping[str, Any]) -> None:
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"Features {missing} are missing. Received: {sorted(given)}.")


# Vocabularies


def _vocabulary_table(feature: Feature) -> tf.lookup.StaticHashTable:
    # No vocabulary has the empty string: it keeps a table from being empty, which TensorFlow
    # refuses.
    return _table({**feature.places, "": 0}, tf.string, default=0)


def _table(
    entries: Mapping[Any, int], key_dtype: tf.DType, default: int
) -> tf.lookup.StaticHashTable:
    keys, values = list(entries), list(entries.values())
    initializer = tf.lookup.KeyValueTensorInitializer(keys, values, key_dtype, tf.int32)
    return tf.lookup.StaticHashTable(initializer, default_value=default)


def _first_values(raw: tf.Tensor, num_values: int) -> tf.Tensor:
    """Cuts [B, any] strings to [B, num_values], or pads them with ""."""
    padding = tf.fill([tf.shape(raw)[0], num_values], "")
    return tf.ensure_shape(tf.concat([raw, padding], axis=1)[:, :num_values], [None, num_values])


# Words


def _words(texts: tf.Tensor, lower_case: tf.lookup.StaticHashTable) -> tf.RaggedTensor:
    """Returns the lower-case words of texts [B], string [B, any]."""
    # \x01 parts the words from what is between them; it is no letter, so a space can replace it.
    texts = _lower(tf.strings.regex_replace(texts, "\x01", " "), lower_case)
    marked = tf.strings.regex_replace(texts, _TOKEN, "\x01\\0\x01")
    # Between words, word, between words, word, ..., between words, which may be empty.
    return tf.strings.split(marked, sep="\x01")[:, 1::2]


def _lower(texts: tf.Tensor, lower_case: tf.lookup.StaticHashTable) -> tf.Tensor:
    """Computes `str.lower` of texts [B]."""
    # The one character whose lower case is two.
    texts = tf.strings.regex_replace(texts, "İ", "i\u0307")
    # A capital sigma becomes ς at the end of a word: after a letter with case, before none, with
    # what has no say in between. First those before a letter; a sigma that was itself such a
    # letter in the first pass is met in the second.
    for _ in range(2):
        texts = tf.strings.regex_replace(texts, f"Σ({_CASE_IGNORABLE}*{_CASED})", rf"{_SIGMA}\1")
    texts = tf.strings.regex_replace(texts, f"({_CASED}{_CASE_IGNORABLE}*)Σ", r"\1ς")
    characters = tf.strings.unicode_decode(texts, "UTF-8")
    lower = lower_case.lookup(characters.flat_values)
    lower = tf.where(lower < 0, characters.flat_values, lower)
    return tf.strings.unicode_encode(characters.with_flat_values(lower), "UTF-8")


def _lower_case_table() -> tf.lookup.StaticHashTable:
    return _table(dict(_lower_case()), tf.int32, default=-1)


@functools.cache
def _lower_case() -> tuple[tuple[int, int], ...]:
    """Returns each character whose lower case is another one, and that one."""

    def pairs() -> Iterator[tuple[int, int]]:
        for code in range(sys.maxunicode + 1):
            lower = chr(code).lower()
            if len(lower) == 1 and ord(lower) != code:
                yield code, ord(lower)

    return tuple(pairs())


# Numbers


def _divide(values: tf.Tensor, by: float) -> tf.Tensor:
    """Divides by a constant other than 0, with the rounding of a division."""
    # Grappler turns `/` by a constant into a multiplication by its reciprocal, rounded otherwise.
    return tf.math.divide_no_nan(values, tf.constant(by, values.dtype))


def _encode_times(feature: Feature, seconds: tf.Tensor) -> tf.Tensor:
    """Encodes seconds [B] as [B, 5] float32: as NumPy's `_log_age` and `_cycles`."""
    age = tf.math.log1p(_divide(tf.maximum(feature.reference - seconds, 0.0), DAY_SECONDS))
    values = [_divide(age - feature.mean, feature.scale)]
    days = _divide(seconds, DAY_SECONDS)
    for turns in (days - tf.floor(days), _divide(tf.math.floormod(tf.floor(days) + 3, 7), 7)):
        values += [tf.sin(2 * np.pi * turns), tf.cos(2 * np.pi * turns)]
    encoded = tf.cast(tf.stack(values, axis=1), tf.float32)
    return tf.where(tf.math.is_finite(seconds)[:, tf.newaxis], encoded, np.nan)
