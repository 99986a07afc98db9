"""The wording of messages."""

import numpy as np
import pytest

from tfrs_pipeline.messages import check_integer, counted, in_percent, plain, printable
from tfrs_pipeline.retrieval import check_one_each


def test_numbers_and_text_from_outside_are_written_in_a_short_line() -> None:
    values = (np.int64(5), np.float32(0.5), np.str_("a"), np.array(3), 5, "a", [1])
    assert list(map(plain, values)) == ["5", "0.5", "'a'", "3", "5", "'a'", "[1]"]
    with pytest.raises(ValueError, match=r"k must be .* Received: -5$"):
        check_integer(1, k=np.int64(-5))
    with pytest.raises(ValueError, match=r"Received: 5; did you mean \[5\]"):
        check_one_each("exclude", [np.int64(5)], 1)
    assert [counted(1, "epoch"), counted(1000, "query")] == ["1 epoch", "1,000 queries"]
    shares = [in_percent(part, 143_609) for part in (0, 67, 71_805)]
    assert shares == ["0.0%", "<0.1%", "50.0%"]
    assert printable("a film\x1b[2J and more", max_chars=11) == r"a film\x1b[2J ..."
