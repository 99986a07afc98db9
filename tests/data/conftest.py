"""Logs of files that a test writes."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small_log import arguments
from tfrs_pipeline.data.log import Log


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Returns a function that writes events (and items) to files, and makes a log of these."""

    def run(text: str | pa.Table, items: str | pa.Table | None = None, **options: Any) -> Log:
        paths: dict[str, Path] = {}
        for name, content in (("events", text), ("items", items)):
            if isinstance(content, str):
                paths[name] = tmp_path / f"{name}.csv"
                paths[name].write_text(content, encoding="utf-8")
            elif content is not None:
                paths[name] = tmp_path / f"{name}.parquet"
                pq.write_table(content, paths[name])
        return Log.from_files(paths["events"], **arguments(items=paths.get("items"), **options))

    return run
