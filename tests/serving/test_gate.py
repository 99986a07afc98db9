"""The version in service beside a run whose ids are of another type."""

from typing import Any

import numpy as np
import pytest

from tests.serving.conftest import Exported, Served
from tfrs_pipeline.serving.gate import version_in_service


@pytest.mark.parametrize(
    ("kind", "first", "others"), [("str", "film-é-0", [1, 2]), ("int", 3, ["3", "10"])]
)
def test_ids_of_another_type_are_none_of_the_runs_items(
    exported: Exported, kind: str, first: Any, others: list[Any]
) -> None:
    ids = np.array(others, np.int64 if kind == "str" else object)
    with pytest.raises(ValueError, match="has none of the 2 items of this run") as error:
        version_in_service(exported(kind, "exact"), ids)
    assert f"its ids are like {first!r}, these like {others[0]!r}" in str(error.value)


def test_request_features_that_are_new_in_a_run_say_nothing(
    served: Served, exported: Exported
) -> None:
    in_service = version_in_service(exported(served.ids, "exact"), served.candidate_ids)
    assert in_service is not None
    queries = served.queries()
    asked = [{**query, "request": {"device": "tv", "timestamp": None}} for query in queries]
    ids, scores = in_service.retrieve(asked, 5)
    expected_ids, expected = in_service.retrieve(queries, 5)
    assert ids.tolist() == expected_ids.tolist()
    np.testing.assert_array_equal(scores, expected)
