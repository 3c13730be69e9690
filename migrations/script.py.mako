"""${message}."""

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    """Go one revision up."""
    ${upgrades if upgrades else "op.execute('select 1')"}


def downgrade() -> None:
    """Go one revision down."""
    ${downgrades if downgrades else "op.execute('select 1')"}
