"""Instances: rows of tasks, named fields made text by a template, tokens of which records are made."""

from m6rec_jax.data.instances.layout import Laid, encode_instance, encode_instances, lay_out
from m6rec_jax.data.instances.read import Instances, read_instances

__all__ = ["Instances", "Laid", "encode_instance", "encode_instances", "lay_out", "read_instances"]
