from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401
