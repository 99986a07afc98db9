"""A user's own kinds: settings leave them out, and a folder compares them by name."""

import pytest

from tfrs_pipeline import ConfigError, FunnelLosers, Popularity, TwoTowerSettings
from tfrs_pipeline.model.two_tower import TwoTower


class Flat(Popularity):
    """A subclass of a built-in kind, which may draw otherwise."""


class FewLosers(FunnelLosers):
    """Losers that read the same pools in the samples as their parent."""


def test_a_subclass_of_a_kind_is_the_users_own() -> None:
    """Settings cannot describe it."""
    model = TwoTower(negatives=["popularity", Flat(2)], hard=FewLosers())
    assert model.settings.negatives == (Popularity(),)
    assert model.negatives == (Popularity(), Flat(2))
    assert model.settings.hard is None
    assert model.losers == FewLosers()
    for settings in ({"negatives": (Flat(2),)}, {"hard": FewLosers()}):
        with pytest.raises(ConfigError, match=r"is a subclass.*TwoTower\(negatives=\[...\], hard="):
            TwoTowerSettings(**settings)
