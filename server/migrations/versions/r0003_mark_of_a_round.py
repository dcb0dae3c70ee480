"""A worker remembers the open round by a mark that changes with it, and need not read its leases for every request."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0003", "0002"


def upgrade() -> None:
    """Bring 0002 to 0003."""
    op.add_column("runs", sa.Column("mark", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Bring 0003 to 0002."""
    op.drop_column("runs", "mark")
