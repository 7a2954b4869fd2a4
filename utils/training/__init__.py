"""One step, and what it needs on the device."""
