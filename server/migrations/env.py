"""What alembic runs: the revisions, over the connection and in the transaction of whoever asked."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], version_table=context.config.attributes["version_table"])
context.run_migrations()
