"""The commands that serve an exported model, replace its items, or write their vectors."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg, CliToggleFlag
from rich.console import Console

from tfrs_pipeline.cli.console import native_errors_to, say, shown
from tfrs_pipeline.cli.flags import OfModel
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.messages import counted
from tfrs_pipeline.serving.index import Scann, search_of
from tfrs_pipeline.serving.publish import MANIFEST_FILE, version_at
from tfrs_pipeline.serving.settings import ServeSettings, listening, read_token

TargetRecall: TypeAlias = Annotated[float, Field(gt=0, le=1)]


class Serve(ServeSettings, OfModel):
    """Serve an exported model over HTTP.

    Answers TensorFlow Serving's REST requests for a model, loads its new versions, and has a page
    to try it. Listens on this machine alone unless --host says otherwise; docs/guides/serving.md
    says how to open it to a network. SIGTERM or Ctrl-C stops it.
    """

    def __call__(self) -> int:
        """Serves until it is told to stop."""
        version_at(self.model)  # Refuses at once, before TensorFlow is imported.
        if self.token_file is not None:
            read_token(self.token_file)
        listening(self.host, self.port).close()  # Refuses a port in use.
        from tfrs_pipeline.serving.server import serve

        # Answers report errors too, but a server's log must say when they happened.
        logging.getLogger("tfrs_pipeline").setLevel(logging.INFO)
        settings = ServeSettings(**self.model_dump(include=set(ServeSettings.model_fields)))
        serve(self.model, settings, lambda at: print(f"serving {self.model} at {at}", flush=True))
        return 0


class RefreshIndex(OfModel):
    """Replace the items of an exported model, without training.

    Writes a new version of a model that retrieves the items of a file: new items are embedded by
    their features, items missing from the file are removed. The towers stay as they are. A running
    server loads the new version. Settings that are not given stay as in the version before.
    """

    items: Path
    """CSV or Parquet of all items to retrieve, with the item features of the model."""
    index: Literal["auto", "scann", "exact"] | None = None
    """Search structure; auto chooses by the number of items. If not given, ScaNN where there is a
    recall target, else as before."""
    target_recall: TargetRecall | None = None
    """Recall target of a ScaNN index, in (0, 1]."""
    keep_versions: PositiveInt | None = None
    """How many versions to keep: the newest two, then the newest of each training, then further
    refreshes; the others are deleted."""
    allow_all_new: CliToggleFlag[bool] = False
    """Accept a file without a known item, or without a known category or any value of a feature."""

    def __call__(self) -> int:
        """Writes the new version and says where it is."""
        version = version_at(self.model)  # Refuses at once, before libraries are imported.
        from tfrs_pipeline.run.refresh import refresh_index

        index = None
        if self.index or self.target_recall:
            before = read_record(version / MANIFEST_FILE, check_files=False)
            recall = before["export"]["index"].get("recall", Scann.recall)
            index = search_of(self.index or "scann", self.target_recall or recall)
        console = Console()
        with native_errors_to(Path(os.devnull)), shown(console) as progress:
            done = refresh_index(
                self.model,
                self.items,
                index=index,
                keep_versions=self.keep_versions,
                allow_all_new=self.allow_all_new,
                progress=progress,
            )
        say(console, f"model  {done.folder}")
        return 0


class Vectors(OfModel):
    """Write the vectors of an exported model's items, for another engine.

    The file has a row for each item: id, title if the export has titles, embedding and its length.
    The metric is the inner product. docs/guides/engines.md loads the file into other engines.
    """

    file: CliPositionalArg[Path]
    """Parquet file to write; an earlier one is replaced."""

    def _problems(self) -> Iterator[tuple[str, str]]:
        from tfrs_pipeline.serving.vectors import destination_problem

        if problem := destination_problem(self.file):
            yield "file", problem

    def __call__(self) -> int:
        """Writes the file and says what is in it."""
        version = version_at(self.model)  # Refuses at once, before TensorFlow is imported.
        from tfrs_pipeline.serving.retriever import load
        from tfrs_pipeline.serving.vectors import write_vectors

        about = write_vectors(load(version, exact=True), self.file)
        lengths = "{min_norm:.3g} to {max_norm:.3g}".format(**about)
        if about["unit_length"]:
            lengths = "1, so cosine similarity ranks alike"
        say(
            Console(),
            f"vectors  {self.file}: {counted(about['num_items'], 'item')} of version "
            f"{about['version']}, {about['dim']} dimensions, inner product; lengths {lengths}",
        )
        return 0
