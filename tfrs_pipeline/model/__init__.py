"""The two-tower model: features, towers, loss, training."""
