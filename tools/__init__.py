"""What made the embedded model and the photos in instance/, and what compares two checkouts."""
