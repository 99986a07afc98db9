"""What happened: sources of event, item and user tables, and their split. No TensorFlow."""
