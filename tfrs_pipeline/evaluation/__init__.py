"""Any retriever against any truth: exact top-k, metrics, baselines. Imports no TensorFlow."""
