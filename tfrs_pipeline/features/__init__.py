"""Kinds of features: their columns, encodings and layers."""
