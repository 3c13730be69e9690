"""The tables that the example handlers keep."""

import sqlalchemy as sa
from alembic import op

revision = "handlers_0001"
down_revision = None
branch_labels = ("handlers",)
depends_on = None


def upgrade() -> None:
    """Create the derived tables."""
    op.create_table(
        "customer_totals",
        sa.Column("customer_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("orders", sa.Integer, nullable=False),
        sa.Column("amount", sa.Numeric(14, 2), nullable=False),
        schema="public",
    )
    op.create_table(
        "order_status_log",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("order_id", sa.BigInteger, nullable=False),
        sa.Column("old_status", sa.Text),
        sa.Column("new_status", sa.Text, nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True)),
        schema="public",
    )
    op.create_index("ix_public_order_status_log_order_id", "order_status_log", ["order_id"], schema="public")
    # Supabase's Data API serves schema public: without policies nobody but the owner and service_role reads.
    op.execute("alter table public.customer_totals enable row level security")
    op.execute("alter table public.order_status_log enable row level security")


def downgrade() -> None:
    """Drop them."""
    op.drop_table("order_status_log", schema="public")
    op.drop_table("customer_totals", schema="public")
