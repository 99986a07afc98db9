"""Writes of live items over REST: checked for the token, and done one after the other."""

import hmac
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from tfrs_pipeline.durable import Damaged, try_writing
from tfrs_pipeline.serving import rest
from tfrs_pipeline.serving.settings import read_token
from tfrs_pipeline.serving.versions import ModelVersions

logger = logging.getLogger(__name__)


class ItemWrites:
    """Adds and removes items of the version in use, for the holders of a token.

    Without `token_file` nobody may. With it, a `StorageError` if nothing can be written to
    `folder`, the model's, and a `ValueError` if the file holds no good token.
    """

    def __init__(self, versions: ModelVersions, folder: Path, token_file: Path | None) -> None:
        self.threads = ThreadPoolExecutor(1, "writes")
        self._versions = versions
        self._token = None if token_file is None else read_token(token_file)
        if token_file is not None:
            try_writing(folder)

    def authorize(self, header: str) -> None:
        """Refuses a write without the token, and all writes if there is none."""
        if self._token is None:
            raise HTTPException(
                403, "This server takes no items: it was started without --token-file."
            )
        kind, _, token = header.partition(" ")
        # In constant time, which does not tell how much of the token is right.
        is_right = hmac.compare_digest(token.strip().encode(), self._token)
        if kind.lower() != "bearer" or not is_right:
            raise HTTPException(
                401,
                "Send the token that the server was started with: Authorization: Bearer TOKEN",
                {"WWW-Authenticate": "Bearer"},
            )

    def write(self, body: bytes, is_put: bool) -> dict[str, Any]:
        """Adds or removes the items in a body; call it in `threads`."""
        items = rest.parse_items(body, "items" if is_put else "item_ids")
        with self._versions.writing, self._versions.use() as version:
            try:
                answer: dict[str, Any]
                if is_put:
                    answer = {"num_new": version.retriever.upsert(items)}
                    if notes := version.retriever.unknown_values(items):
                        answer["notes"] = notes
                else:
                    answer = {"num_removed": version.retriever.remove(items)}
            except Damaged:
                raise
            except ValueError as error:
                raise rest.bad_request(str(error)) from None
            except OSError:
                logger.exception("a write of items was not confirmed")
                raise HTTPException(
                    503,
                    "The items could not be put on disk, and nothing has changed; the server's log "
                    "has more.",
                    {"Retry-After": "1"},
                ) from None
            return {**answer, "num_items": version.retriever.num_candidates}
