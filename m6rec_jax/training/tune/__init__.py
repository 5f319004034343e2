"""Tuning a frozen backbone for one task, by any of the methods of `model.tuning`."""
