"""Texts about users and items: described, explained, summarised, asked for, answered, and held against the facts."""

from m6rec_jax.recommend.say.asking import TASKS, Setting
from m6rec_jax.recommend.say.speaker import Speaker

__all__ = ["TASKS", "Setting", "Speaker"]
