"""Samples and negatives made into batches."""
