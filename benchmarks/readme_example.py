"""Runs the README's first Python example, as it stands there, on a simulated funnel log.

python benchmarks/readme_example.py
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path

from tfrs_pipeline.sources.simulated import FunnelOptions, simulate_funnel

README = Path(__file__).parents[1] / "README.md"
OPTIONS = FunnelOptions(
    num_retrieved=30, num_pre_ranked=15, num_ranked=8, num_exposed=5, click_bias=-2.0
)


def write_files(folder: Path, *, num_users: int, num_items: int, num_requests: int) -> list[int]:
    """Writes `events.parquet` and `videos.csv`, which the example reads.

    Returns:
        The ids of the users.
    """
    simulation = simulate_funnel(
        num_users=num_users,
        num_items=num_items,
        num_requests=num_requests,
        seed=1,
        options=OPTIONS,
    )
    log = simulation.log
    # Several threads write rows in any order, and the losers of a request are drawn by theirs.
    log.events.order_by("event_number").to_parquet(folder / "events.parquet")
    title = log.items["genre"].cast("string") + " no. " + log.items["item_id"].cast("string")
    log.items.select("item_id", title=title).to_csv(folder / "videos.csv")
    return [int(user) for user in log.users["user_id"].to_pyarrow().to_pylist()]


def example() -> str:
    """Returns the README's first Python example."""
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]


def main() -> None:
    """Writes the files into a folder for the moment, and runs the example there."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_files(Path(folder), num_users=1000, num_items=500, num_requests=12_000)
        exec(example(), {})


if __name__ == "__main__":
    main()
