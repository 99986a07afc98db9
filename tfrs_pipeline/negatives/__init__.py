"""Negatives, and the probability with which each was drawn."""
