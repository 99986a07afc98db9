"""From a fitted model to a version that serves; needs TensorFlow."""
