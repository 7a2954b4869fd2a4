"""Everything that is checked before a model is loaded, as one table."""
