"""What made the embedded model and the photos in instance/, and what compares two checkouts."""

import utils as utils  # says so first if this Python is too old
