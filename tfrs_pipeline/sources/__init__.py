"""Public data sets and a simulated funnel, each turned into a log."""
