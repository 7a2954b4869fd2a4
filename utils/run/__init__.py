"""One run in its output folder."""
