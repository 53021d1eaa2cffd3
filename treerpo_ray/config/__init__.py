"""Configuration of a run: `Config` and `load`; every other name is taken from its own module."""

from treerpo_ray.config.config import Config
from treerpo_ray.config.files import load

__all__ = ["Config", "load"]
