"""The one search: candidates, exact and with ScaNN, exclusions, filters, bonuses."""
