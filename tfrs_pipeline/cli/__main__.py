"""The command line as `python -m tfrs_pipeline.cli`."""

import sys

from tfrs_pipeline.cli import main

sys.exit(main())
