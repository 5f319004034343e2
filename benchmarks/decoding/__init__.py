"""Constrained beam decoding side by side with Hugging Face, and the constraint alone."""
