"""What a version holds, but for its items: towers, users, and how raw queries are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tfrs_pipeline.answers.stored import Stored
from tfrs_pipeline.answers.towers import CANDIDATE_TOWER, QUERY_TOWER, load_tower
from tfrs_pipeline.features.kinds import features_of
from tfrs_pipeline.search.history_bonus import HistoryBonus
from tfrs_pipeline.search.queries import (
    CANDIDATE_FEATURES,
    QueryInputs,
    Tower,
    candidate_inputs,
)


@dataclass(frozen=True)
class Parts:
    """The parts of a version that a refresh of its items keeps.

    Attributes:
        stored: The users and items of the training.
        inputs: What the query tower reads, and how raw queries become that.
        bonus: What is added to the scores of some items because of a history; None is nothing.
        query_tower: Embeds the inputs of queries.
        candidate_tower: Embeds the inputs of candidates.
    """

    stored: Stored
    inputs: QueryInputs
    bonus: HistoryBonus | None
    query_tower: Tower
    candidate_tower: Tower

    @classmethod
    def read(cls, files: Path, manifest: Mapping[str, Any]) -> Self:
        """Reads the parts in a folder, with the manifest of their version.

        A tower that cannot run is refused here; the version may be deleted later.
        """
        stored = Stored(files, manifest)
        inputs = QueryInputs(
            users=stored.users,
            items=stored.items,
            features=features_of(manifest),
            columns=stored.columns,
            history_length=manifest["history_length"],
            reads_times=stored.reads_times,
        )
        candidate = candidate_inputs(inputs.features[CANDIDATE_FEATURES])
        towers = (QUERY_TOWER, inputs.tower_inputs), (CANDIDATE_TOWER, candidate)
        query_tower, candidate_tower = (load_tower(files, name, [*names]) for name, names in towers)
        bonus = manifest["bonus"]
        bonus = None if bonus is None else HistoryBonus.read(bonus, stored.graph)
        return cls(stored, inputs, bonus, query_tower, candidate_tower)
