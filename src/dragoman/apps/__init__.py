"""Programs around a trained model: the interactive page, the server."""
