"""Any retriever on any holdout: exact top-k, metrics, baselines. Imports no TensorFlow."""
