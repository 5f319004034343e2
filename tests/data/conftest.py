from tests.fixtures import tiny, tiny_dataset, tiny_levels, tiny_root  # noqa: F401
