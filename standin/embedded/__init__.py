"""Embedded servers: a real PostgreSQL and a real Redis from wheels, on loopback, for the demo and tests.

They live as long as the process that started them, and not a moment longer, however it ends.
"""

from standin.embedded.postgres import EmbeddedPostgres
from standin.embedded.redis import EmbeddedRedis
from standin.embedded.supabase import bootstrap_supabase

__all__ = ["EmbeddedPostgres", "EmbeddedRedis", "bootstrap_supabase"]
