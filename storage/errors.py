"""What can be wrong with a database, in one line for its user. Apart from the engine, which takes long to import."""

from __future__ import annotations


class DatabaseUrlError(ValueError):
    """The database URL cannot be used: one line, the URL with its password as `***`."""


class DatabaseUnavailable(Exception):
    """The database cannot do this now (down, locked, full, not upgraded): one line, worth trying again."""


class SchemaError(Exception):
    """The schema is at, or was asked to go to, a revision that this version of burstgate does not know."""


class ArchiveError(Exception):
    """The archive cannot be used, or is not what it should be: one line that names the place."""


class RetentionBusy(DatabaseUnavailable):
    """Another process is archiving or pruning this database; worth trying again."""
