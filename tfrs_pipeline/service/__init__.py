"""A model in service, without TensorFlow: queries, users, live items, events, the server."""
