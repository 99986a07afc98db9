"""Parts of the kinds' encodings that run in TensorFlow's graph."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.raw import BOOLEANS, has_booleans
from tfrs_pipeline.features.vocabulary import takes_whole_floats

MAX_DEVIATIONS = 10.0

# Letters with their marks, digits and underscores make words, and apostrophes within them.
_LETTER = r"\p{L}\p{M}\p{N}_"
_BETWEEN_WORDS = rf"[^{_LETTER}]*[^{_LETTER}'][^{_LETTER}]*|^'+|'+$"
_VARIANTS = r"[\x{FE00}-\x{FE0F}]"  # Marks that choose how an emoji is drawn.
# Scripts without spaces: a character with its marks is a word. Unicode counts the marks of Katakana
# that lengthen or voice it among the letters.
_UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
    r"[\p{M}ーｰﾞﾟ]*"
)


def words_of(texts: tf.Tensor) -> tf.RaggedTensor:
    """Returns the lower-case words of texts [B], string [B, any]. See `Text`."""
    # These letters first: what is the lower case of an I depends on the server's locale.
    steps = (_VARIANTS, ""), (_UNSPACED, r" \0 "), (_BETWEEN_WORDS, " "), ("İ", "I")
    for pattern, by in steps:
        texts = tf.strings.regex_replace(texts, pattern, by)
    return tf.strings.split(tf.strings.lower(tf.strings.lower(texts), encoding="utf-8"))


def lower_booleans(texts: tf.Tensor) -> tf.Tensor:
    """Writes True and FALSE, as tables have them, as `to_text` does."""
    for word in ("true", "false"):
        spellings = "|".join(x for x in BOOLEANS if x.lower() == word)
        texts = tf.strings.regex_replace(texts, f"^({spellings})$", word)
    return texts


def cleaned(texts: tf.Tensor, vocabulary: Collection[str] = ()) -> tf.Tensor:
    """Rewrites values as a log does, unless the vocabulary distinguishes them: spaces, 7.0, True.

    Without a vocabulary, all of them are rewritten.
    """
    if all(value == value.strip() for value in vocabulary):
        texts = tf.strings.strip(texts)
    if takes_whole_floats(vocabulary):
        texts = tf.strings.regex_replace(texts, r"^(-?[0-9]+)\.0$", r"\1")
    return lower_booleans(texts) if not vocabulary or has_booleans(vocabulary) else texts


def standardised(values: tf.Tensor, scale: float) -> tf.Tensor:
    """Divides by a scale other than 0, clips, and returns float32."""
    # A graph would turn `/` into a multiplication by the reciprocal, rounded otherwise.
    scaled = tf.math.divide_no_nan(values, tf.constant(scale, values.dtype))
    return tf.cast(tf.clip_by_value(scaled, -MAX_DEVIATIONS, MAX_DEVIATIONS), tf.float32)


def where_finite(raw: tf.Tensor, encoded: tf.Tensor) -> tf.Tensor:
    """Returns what is encoded, NaN where the raw value is missing or infinite."""
    return tf.where(tf.math.is_finite(raw), encoded, np.float32(np.nan))
