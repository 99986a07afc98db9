"""Which of a user's answers are recent; in the settings of the server, and in a request."""

from pydantic import ConfigDict, Field

from tfrs_pipeline.settings import Config

# Most answers of a user that are read to leave out what was served lately.
MAX_ANSWERS = 1000


class Lately(Config):
    """Which answers to a user are recent: the last `answers`, and those of the last `hours`."""

    # A request's JSON has types of its own: "2" and true are no numbers.
    model_config = ConfigDict(strict=True)

    answers: int = Field(0, ge=0, le=MAX_ANSWERS)
    hours: float = Field(0.0, ge=0)
