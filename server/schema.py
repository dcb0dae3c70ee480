"""The tables, as `migrations` leaves them. What cannot be derived is stored once; nothing secret is stored at all, tokens and keys only as hashes.

Times are seconds since 1970 as floats; hashes are bytes; JSON columns are text, so that both databases hold the same bytes.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

blobs = Table(
    "blobs",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("data", LargeBinary, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("public", Integer, nullable=False, default=0),  # of a public run
)

runs = Table(
    "runs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("spec", Text, nullable=False),
    Column("status", String(16), nullable=False),  # open, paused, finished
    Column("reason", Text),
    Column("created_at", Float, nullable=False),
    Column("version", Integer, nullable=False, default=0),
    Column("wanted", Integer, nullable=False),  # probes of the open round; 0: only the last evaluation is missing
    Column("opened_at", Float, nullable=False),
    Column("deadline", Float, nullable=False),
    Column("extensions", Integer, nullable=False, default=0),
    Column("head", LargeBinary, nullable=False),  # the ledger's last hash
    Column("ledger_bytes", BigInteger, nullable=False, default=0),
    Column("theta_digest", String(64), nullable=False),
    Column("mean_square", Float),
    Column("n_probes", BigInteger, nullable=False, default=0),  # in the ledger
    Column("n_results", BigInteger, nullable=False, default=0),
    Column("n_refused", BigInteger, nullable=False, default=0),
    Column("n_wasted", BigInteger, nullable=False, default=0),  # probes computed or leased in vain
    Column("mark", BigInteger, nullable=False, server_default="0"),  # drawn anew whenever a lease or a result changes the open round
    Column("best_version", Integer),
    Column("best_loss", Float),
    Column("since_best", Integer, nullable=False, default=0),  # scored versions since
    Column("snapshot_version", Integer),
    Column("snapshot_sha256", String(64)),
)

entries = Table(
    "entries",
    metadata,
    Column("run", String(64), ForeignKey("runs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),  # leads from version `number` to the next
    Column("payload", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("theta_digest", String(64), nullable=False),  # after it
    Column("closed_at", Float, nullable=False),
    Column("facts", Text, nullable=False),  # JSON: what the dashboard shows of the round
)

versions = Table(
    "versions",
    metadata,
    Column("run", String(64), ForeignKey("runs.id"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("parent", Integer),
    Column("theta_digest", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("n_probes", Integer, nullable=False),
    Column("n_devices", Integer, nullable=False),
    Column("loss", Float),
    Column("held_out_loss", Float),
    Column("n_evaluated", BigInteger, nullable=False, default=0),
    Column("adapter_sha256", String(64)),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("hash", String(64), nullable=False, unique=True),
    Column("name", String(64), nullable=False),
    Column("uses_left", Integer),  # NULL: any number
    Column("expires_at", Float),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)

devices = Table(
    "devices",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("token", String(64), ForeignKey("tokens.id"), nullable=False),
    Column("enrolled_at", Float, nullable=False),
    Column("revoked_at", Float),
    Column("last_nonce", BigInteger, nullable=False, default=0),
    Column("last_seen", Float, nullable=False),
    Column("battery", Float),
    Column("charging", Integer),
    Column("memory_bytes", BigInteger),
    Column("n_results", BigInteger, nullable=False, default=0),
    Column("n_probes", BigInteger, nullable=False, default=0),
    Column("n_refused", BigInteger, nullable=False, default=0),
    Column("n_wasted", BigInteger, nullable=False, default=0),
    Index("ix_devices_last_seen", "last_seen"),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("run", String(64), ForeignKey("runs.id"), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("version", Integer, nullable=False),
    Column("slot", Integer, nullable=False),
    Column("device", String(64), ForeignKey("devices.id"), nullable=False),
    Column("leased_at", Float, nullable=False),
    Column("until", Float, nullable=False),
    Column("counted", Integer),  # round; of an evaluation its version
    Column("wasted", Integer, nullable=False, default=0),  # whether it was counted as lost
    Column("result", Text),
    Index("ix_tasks_run_version", "run", "kind", "version"),
    Index("ix_tasks_run_counted", "run", "counted"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("run", String(64)),
    Column("kind", String(32), nullable=False),
    Column("at", Float, nullable=False),
    Column("data", Text, nullable=False),
    Index("ix_events_run_id", "run", "id"),
)

audit = Table(
    "audit",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("act", String(64), nullable=False),
    Column("data", Text, nullable=False),
    Column("hash", LargeBinary, nullable=False),
)
