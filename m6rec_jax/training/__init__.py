"""Training: mesh, state, step, loop, checkpoints. `run.train` is the way in."""
