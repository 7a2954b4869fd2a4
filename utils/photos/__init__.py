"""A photo as a file: its format, its pixels, its colours, its caption."""
