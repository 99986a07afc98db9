"""A run: from a log to a model in service, in one folder."""
