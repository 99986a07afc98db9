"""The rules for rows of a table, one line each: what a message says is wrong, and what to do.

`raw_table.py` evaluates them. Each kind of feature adds its own rules (`features/`).
"""

from typing import NamedTuple

from tfrs_pipeline.data.schema import MAX_WEIGHT, MIN_WEIGHT, Stage

LINES_REMEDY = (
    "Give CSV in UTF-8 with a header, the same number of fields and the same line ending in each "
    "line, and quotes that close; or Parquet."
)
SET_WEIGHTS = "Set event_weights, such as purchase=5 click=1 view=exposed report=disliked"


class Rule(NamedTuple):
    """What is wrong with a value (the message puts the column first), and what to do.

    `setting` is the option of `Reading` that fixes it, if any; None is the one that names columns.
    A few such rows may be dropped if the rule `is_droppable`; others need a setting or a fix.
    """

    problem: str
    remedy: str = "Correct them, or name another column."
    setting: str | None = None
    is_droppable: bool = True

    def filled(self, **words: object) -> "Rule":
        """Fills in the blanks of the problem."""
        return self._replace(problem=self.problem.format(**words))


_ID, _TIME = "Give these rows an id.", "Give these rows a time, or omit the column if unknown."
_STAGES = f"Known: {', '.join(Stage)}."
_ONE_WAY = "Write all of them the same way, with an offset in all or in none."

NO_ID = Rule("is null", _ID)
RESERVED_ID = Rule("is {reserved!r} (reserved for empty slots)", _ID)
NOT_AN_ID = Rule("must be an integer or a string and is not")
ID_OF_LINES = Rule("runs over several lines", "Close the quotes before it.")
NO_TIME = Rule("is null", _TIME)
NOT_A_TIME = Rule(
    "must hold times and does not",
    "Write them like 2026-01-31 09:30:00, or as numbers since 1970; or name another column.",
)
TIME_OF_ANOTHER_KIND = Rule("must hold times written one way and does not", _ONE_WAY, "")
TIME_OUTSIDE = Rule(
    "lies outside {first:%Y-%m-%d} to {end:%Y-%m-%d}",
    "Correct them, or set earliest_time.",
    "earliest_time",
)
NO_YEAR = Rule("has no year of 2 to 9998", "Correct them.", "")
NO_STAGE = Rule("is null", "Give these rows a stage.")
NO_TYPE = Rule("is null", "Give these rows a type of event.")
UNKNOWN_STAGE = Rule(
    "holds an unknown stage",
    f"{_STAGES} Set stage_values to the stage of each value; if they are types of events, name the "
    "column event, and set event_weights.",
    "stage_values",
    False,
)
NO_RATING = Rule("is null or NaN", "Rate these rows.")
NOT_AN_OUTCOME = Rule(
    "is in the label and no number",
    "Leave it null where the outcome does not hold. If it holds types of events, name its column "
    f"event, and: {SET_WEIGHTS}.",
    "label",
)
WEIGHT = Rule(
    f"is not a number from {MIN_WEIGHT:.0e} to {MAX_WEIGHT:.0e}",
    "Give these rows a weight (1 is neutral). A positive of weight 0 would train nothing: leave it "
    "out, give it a small weight or, with label, make it an exposed one.",
)
NOT_INT64 = Rule("must hold whole numbers and does not")
NOT_FLOAT32 = Rule(
    "must hold finite numbers that float32 can hold and does not",
    "Write them with a decimal point and no comma, or name another column.",
)
