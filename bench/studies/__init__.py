"""Studies that answered one question each; docs/decisions.md has the answers."""
