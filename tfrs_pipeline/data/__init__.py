"""Event, item and user tables, and their split. Imports no TensorFlow."""
