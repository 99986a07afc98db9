"""Shared by every test: Keras 2 is chosen before any test imports TensorFlow."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tfrs_pipeline  # noqa: F401

# The first example of a test may build a graph or open a database: time says nothing about it.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(scope="module")
def trusted_exports() -> Iterator[None]:
    """Skips the check of an export in a fresh process: it takes seconds, and has its own tests."""
    from tfrs_pipeline.serving import export

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "prove", lambda *arguments: None)
        yield
