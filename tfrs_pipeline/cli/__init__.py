"""The command line: `tfrs-pipeline COMMAND`. `commands.py` has the commands."""

from collections.abc import Sequence

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    The code is 0 for success, 1 for refused data or a failed run, 2 for a wrong flag or setting, 3
    for a model that a baseline or the version in service beats, 130 after Ctrl-C, 141 if nobody
    reads the output.
    """
    try:
        # Imported here, so that Ctrl-C mostly ends the program quietly meanwhile.
        from tfrs_pipeline.cli import commands

        return commands.main(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
