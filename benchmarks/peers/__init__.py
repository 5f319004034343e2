"""Other people's recommenders on the datasets of `benchmarks.quality`: python -m benchmarks.peers."""
