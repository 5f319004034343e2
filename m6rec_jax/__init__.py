"""m6rec_jax: pretrain generative recommenders in JAX and serve them."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
# Imported when first asked for: `import m6rec_jax` is quick, and `m6rec --help` loads no jax.
_EXPORTS = {"prepare": "m6rec_jax.data.prepare", "Recommender": "m6rec_jax.recommend.recommender"}
__all__ = ["Recommender", "__version__", "prepare"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
