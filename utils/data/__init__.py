"""From photos and prompts to micro-batches."""
