"""The command line: `tfrs-pipeline COMMAND`. `commands.py` has the commands.

This module imports nothing heavy, so that Ctrl-C ends the program even while that is imported.
"""

import os
import signal
from collections.abc import Sequence

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    The code is 0 for success, 1 for refused data or a failed run, 2 for a wrong flag or setting, 3
    for a model that a baseline or the version in service beats, 130 after Ctrl-C, 141 if nobody
    reads the output.
    """
    before = signal.getsignal(signal.SIGINT)
    is_heard = before is signal.default_int_handler  # A shell's background job ignores it.
    try:
        if is_heard:
            # Nothing has to be cleaned up yet. A KeyboardInterrupt could come anywhere in an
            # import, which may print it, wrap it in another exception or lose it.
            signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        from tfrs_pipeline.cli import commands

        if is_heard:
            signal.signal(signal.SIGINT, before)
        return commands.main(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
