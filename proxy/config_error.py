"""The error of settings and flags, apart from the settings, which take long to import."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that can not be used: place, value and rule in one line."""
