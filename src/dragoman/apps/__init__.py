"""Programs with a face: the interactive page."""
