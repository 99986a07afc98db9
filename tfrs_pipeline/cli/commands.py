"""Runs a command, and turns its errors into a line and an exit code."""

import atexit
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tfrs_pipeline
from tfrs_pipeline.answers.publish import NotPublished
from tfrs_pipeline.cli.console import PROGRAM
from tfrs_pipeline.cli.flags import CommandLine, UsageError
from tfrs_pipeline.libraries import require
from tfrs_pipeline.messages import as_interrupts
from tfrs_pipeline.settings import ConfigError

logger = logging.getLogger(__name__)

NOT_PUBLISHED = 3
BROKEN_PIPE = 141


# Each is imported when it is looked up: a query needs no settings of runs.
COMMANDS = {
    "run": "tfrs_pipeline.cli.runs:Run",
    "compare": "tfrs_pipeline.cli.runs:Compare",
    "report": "tfrs_pipeline.cli.runs:Report",
    "query": "tfrs_pipeline.cli.models:Query",
    "explain": "tfrs_pipeline.cli.models:Explain",
    "serve": "tfrs_pipeline.cli.models:Serve",
    "refresh-index": "tfrs_pipeline.cli.models:RefreshIndex",
    "recommend": "tfrs_pipeline.cli.models:Recommend",
    "audience": "tfrs_pipeline.cli.models:Audience",
    "log": "tfrs_pipeline.cli.models:WriteLog",
    "vectors": "tfrs_pipeline.cli.models:Vectors",
}
TRAINING = ("run", "compare")
# Command -> the extra without which it does nothing.
EXTRA_OF = {
    **dict.fromkeys((*TRAINING, "report"), "train"),
    "refresh-index": "data",
    "serve": "serve",
}
# Settings within tables that the short help of a training shows.
BRIEF = (
    *("data.source", "data.path", "data.columns", "data.items_path", "data.item_features"),
    *("data.rating_threshold", "data.label", "data.event_weights"),
    *("split.kind", "model.hard", "export.name", "export.filter_by"),
    *("compare.plans", "compare.seeds"),
)
COMMAND_LINE = CommandLine(
    PROGRAM,
    tfrs_pipeline.__version__,
    "Retrieval models from the logs of a recommendation funnel.",
    COMMANDS,
    brief=dict.fromkeys(TRAINING, BRIEF),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; a Ctrl-C passes through."""
    # Skips the last garbage collection, which would search all that TensorFlow made.
    atexit.register(gc.freeze)
    # Another Ctrl-C on the way out would print a traceback.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    is_verbose = False
    try:
        name, settings = COMMAND_LINE.read(sys.argv[1:] if arguments is None else arguments)
        is_verbose = settings.pop("verbose", False)
        _log(is_verbose)
        if name in EXTRA_OF:
            require(EXTRA_OF[name], f"{PROGRAM} {name}")
        with as_interrupts():
            code = _do(name, settings)
        sys.stdout.flush()
        return code
    except (ConfigError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # The run is finished and kept; a program that started it learns from the code.
    except NotPublished as error:
        print(f"not published: {error}", file=sys.stderr)
        return NOT_PUBLISHED
    except BrokenPipeError:
        # Discards the remaining output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        setting = getattr(error, "setting", "")  # A DataError has one.
        flag = f" (--data.{setting})" if setting and name in TRAINING else ""
        about: object = error
        if isinstance(error, OSError) and error.filename and error.strerror:
            about = f"{error.filename}: {error.strerror}."
        print(f"error: {about}{flag}", file=sys.stderr)
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        # What this package raised itself was expected.
        is_ours = Path(frame.f_code.co_filename).is_relative_to(Path(tfrs_pipeline.__file__).parent)
        if is_verbose:
            logger.exception("the whole trace")
        elif about is error and not is_ours:
            print("The error is unexpected: --verbose shows where it came from.", file=sys.stderr)
        return 1


def _do(name: str, settings: Mapping[str, Any]) -> int:
    if name not in TRAINING:
        command: Any = COMMAND_LINE.table(name)
        return int(command(**settings)())
    from tfrs_pipeline.cli.runs import train

    return train(name, settings)


def _log(is_verbose: bool) -> None:
    handler = logging.lastResort  # Logs to the current `sys.stderr`, which a run replaces.
    assert handler is not None
    handler.setLevel(logging.NOTSET)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("tfrs_pipeline").setLevel(logging.INFO if is_verbose else logging.WARNING)
    # TensorFlow warns of retracing, but each plan has its own model to trace.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
