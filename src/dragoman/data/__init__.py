"""Text pairs -> token ids -> batches."""
