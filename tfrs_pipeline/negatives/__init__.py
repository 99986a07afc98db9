"""Kinds of negatives, and how often each candidate is expected among them."""
