"""A model in one file, and what runs it with NumPy alone."""
