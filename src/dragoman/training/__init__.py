"""One YAML file -> a trained model."""
