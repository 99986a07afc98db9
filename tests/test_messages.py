"""Words of messages."""

import numpy as np
import pytest

from tfrs_pipeline.messages import check_integer, plain
from tfrs_pipeline.retrieval import check_one_each


def test_numbers_of_numpy_are_shown_as_pythons() -> None:
    values = (np.int64(5), np.float32(0.5), np.str_("a"), np.array(3), 5, "a", [1])
    assert list(map(plain, values)) == ["5", "0.5", "'a'", "3", "5", "'a'", "[1]"]
    with pytest.raises(ValueError, match=r"k must be .* Received: -5$"):
        check_integer(1, k=np.int64(-5))
    with pytest.raises(ValueError, match=r"Received: 5; did you mean \[5\]"):
        check_one_each("exclude", [np.int64(5)], 1)
