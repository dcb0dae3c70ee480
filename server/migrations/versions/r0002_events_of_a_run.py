"""The dashboard of one run reads that run's events, not all of them."""

from alembic import op

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    """Bring 0001 to 0002."""
    op.create_index("ix_events_run_id", "events", ["run", "id"])


def downgrade() -> None:
    """Bring 0002 to 0001."""
    op.drop_index("ix_events_run_id", "events")
