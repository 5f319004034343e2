"""What every section checks its values with: each check raises one line that names the setting and its value."""

from __future__ import annotations

import math
from typing import Any

from m6rec_jax.errors import InputError


def check(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition`."""
    if not condition:
        raise InputError(message)


def at_least(least: int, section: str, config: Any, *names: str) -> None:
    """Raise InputError unless these settings are finite numbers, `least` or above."""
    for name in names:
        value = getattr(config, name)
        check(least <= value < math.inf, f"{section}.{name}={value}: must be at least {least}")


def above_zero(section: str, config: Any, *names: str) -> None:
    """Raise InputError unless these settings are finite numbers above 0."""
    for name in names:
        value = getattr(config, name)
        check(0 < value < math.inf, f"{section}.{name}={value}: must be above 0")


def below_one(section: str, config: Any, *names: str) -> None:
    """Raise InputError unless these settings are at least 0 and below 1."""
    for name in names:
        value = getattr(config, name)
        check(0 <= value < 1, f"{section}.{name}={value}: must be at least 0 and below 1")
