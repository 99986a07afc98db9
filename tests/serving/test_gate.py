"""The version in service beside a run whose ids are of another type."""

from pathlib import Path

import numpy as np
import pytest

from tests.serving.conftest import make_served
from tfrs_pipeline.serving.export import export
from tfrs_pipeline.serving.gate import version_in_service
from tfrs_pipeline.serving.index import Exact


@pytest.mark.usefixtures("unproven")
def test_ids_of_another_type_are_none_of_the_runs_items(tmp_path: Path) -> None:
    for kind, others in (("str", np.array([1, 2])), ("int", np.array(["3", "10"], object))):
        folder = tmp_path / kind
        served = make_served(kind)
        export(served, folder, index=Exact())
        first, other = served.candidate_ids.tolist()[0], others.tolist()[0]
        with pytest.raises(ValueError, match="has none of the 2 items of this run") as error:
            version_in_service(folder, others)
        assert f"its ids are like {first!r}, these like {other!r}" in str(error.value)
