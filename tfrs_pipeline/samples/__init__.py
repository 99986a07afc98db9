"""Positives with their histories, what is never a negative of whom, and pools of losers."""
