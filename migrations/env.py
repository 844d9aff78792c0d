"""Alembic's entry point, run in-process by `storage.engine`.

The caller passes an open connection, in a transaction, as `attributes["connection"]`; there is no alembic.ini and
nothing here opens a database, reads a URL or sets up logging. Migrations are written by hand for both dialects, and
never import `storage.schema`: a migration is what the schema was on its day.
"""

from alembic import context

from storage.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
