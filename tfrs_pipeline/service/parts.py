"""What a version holds, but for its items: towers, users, and how raw queries are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tfrs_pipeline.features.kinds import features_of
from tfrs_pipeline.search.history_bonus import HistoryBonus
from tfrs_pipeline.search.queries import (
    CANDIDATE_FEATURES,
    QueryInputs,
    Tower,
    candidate_inputs,
)
from tfrs_pipeline.service.stored import Stored
from tfrs_pipeline.service.towers import CANDIDATE_TOWER, QUERY_TOWER, load_tower


@dataclass(frozen=True)
class Parts:
    """The parts of a version that a refresh of its items keeps.

    Attributes:
        files: Their folder.
        stored: The users and items of the training.
        inputs: What the query tower reads, and how raw queries become that.
        bonus: What is added to the scores of some items because of a history; None is nothing.
    """

    files: Path
    stored: Stored
    inputs: QueryInputs
    bonus: HistoryBonus | None

    @classmethod
    def read(cls, files: Path, manifest: Mapping[str, Any]) -> Self:
        """Reads the parts in a folder, with the manifest of their version."""
        stored = Stored(files, manifest)
        inputs = QueryInputs(
            users=stored.users,
            items=stored.items,
            features=features_of(manifest),
            columns=stored.columns,
            history_length=manifest["history_length"],
            reads_times=stored.reads_times,
        )
        bonus = manifest["bonus"]
        bonus = None if bonus is None else HistoryBonus.read(bonus, stored.graph)
        return cls(files, stored, inputs, bonus)

    @cached_property
    def query_tower(self) -> Tower:
        """Embeds the inputs of queries."""
        return load_tower(self.files, QUERY_TOWER, [*self.inputs.tower_inputs])

    @cached_property
    def candidate_tower(self) -> Tower:
        """Embeds the inputs of candidates."""
        names = candidate_inputs(self.inputs.features[CANDIDATE_FEATURES])
        return load_tower(self.files, CANDIDATE_TOWER, [*names])
