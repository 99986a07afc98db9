"""Positives with their histories, items that are never a user's negatives, pools of losers."""
