"""Makes training batches from samples and negatives."""
