"""What a run takes from the run that it starts from; `test_daily.py` has such runs."""

from pathlib import Path

import pytest

from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.plans import MODEL, Plan, _fewer_epochs


def test_a_warm_start_shortens_the_warm_up_of_a_rate_that_decays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = {"two_tower": {"best_epoch": 12}}
    monkeypatch.setattr(RunFolder, "results", lambda folder: {"training": trained})
    source = with_settings(RunConfig(), {"training.warmup_steps": 10, "training.max_epochs": 40})
    decaying = with_settings(source, {"training.decay": "cosine"})
    plain, shorter = (
        _fewer_epochs(RunFolder(tmp_path), theirs, MODEL, Plan.of(theirs))
        for theirs in (source, decaying)
    )
    assert plain == {"training.max_epochs": 3}
    assert shorter == {"training.max_epochs": 3, "training.warmup_steps": 0}
