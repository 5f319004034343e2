"""`make bench-faults`: what training survives, and what of a damaged checkpoint is noticed."""
