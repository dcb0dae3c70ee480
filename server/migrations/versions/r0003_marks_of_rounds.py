"""Workers remember an open round as long as its mark says that it is the same."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0003", "0002"


def upgrade() -> None:
    """Bring 0002 to 0003."""
    op.add_column("runs", sa.Column("mark", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Bring 0003 to 0002."""
    op.drop_column("runs", "mark")
