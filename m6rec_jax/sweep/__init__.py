"""Sweeps: many runs over a space of settings, chosen by Optuna, each trained by `m6rec train` in a process of its own."""
