"""The models of the tests of service, which an export makes."""

from tests.service.conftest import (  # noqa: F401
    exported,
    films,
    folder,
    int_folder,
    kind,
    loaded,
    model,
    running,
    served,
    small,
    writable,
)
