"""What a Supabase project has in its database and a fresh cluster has not, as far as Realtime needs it.

Not a Supabase: no GoTrue, no storage, no `auth.users`.
"""

import asyncpg

_ROLES = """
do $$
declare
  role_name text;
begin
  -- Roles belong to the whole server: two databases may be set up at once.
  perform pg_advisory_xact_lock(7245173);
  foreach role_name in array array['anon', 'authenticated', 'service_role', 'authenticator'] loop
    if not exists (select from pg_roles where rolname = role_name) then
      execute format('create role %I', role_name);
    end if;
  end loop;
  alter role anon nologin noinherit;
  alter role authenticated nologin noinherit;
  alter role service_role nologin noinherit bypassrls;
  alter role authenticator login noinherit password 'postgres';
  grant anon, authenticated, service_role to authenticator;
  -- Only a superuser may act as any role without being its member.
  if not (select rolsuper from pg_roles where rolname = current_user) then
    execute format('grant anon, authenticated, service_role to %I', current_user);
  end if;
end $$;
"""

_GRANTS = """
grant usage on schema public to anon, authenticated, service_role;
grant all on all tables in schema public to anon, authenticated, service_role;
grant all on all sequences in schema public to anon, authenticated, service_role;
grant all on all routines in schema public to anon, authenticated, service_role;
alter default privileges in schema public grant all on tables to anon, authenticated, service_role;
alter default privileges in schema public grant all on sequences to anon, authenticated, service_role;
alter default privileges in schema public grant all on functions to anon, authenticated, service_role;
"""

# An unset claim reads as NULL before the first use of the setting and as '' after it.
_AUTH = """
create schema if not exists auth;
grant usage on schema auth to anon, authenticated, service_role;
create or replace function auth.jwt() returns jsonb language sql stable as $$
  select nullif(current_setting('request.jwt.claims', true), '')::jsonb
$$;
create or replace function auth.uid() returns uuid language sql stable as $$
  select nullif(auth.jwt() ->> 'sub', '')::uuid
$$;
create or replace function auth.role() returns text language sql stable as $$
  select auth.jwt() ->> 'role'
$$;
create or replace function auth.email() returns text language sql stable as $$
  select auth.jwt() ->> 'email'
$$;
grant execute on all functions in schema auth to anon, authenticated, service_role;
"""

_EXTENSIONS = """
create schema if not exists extensions;
grant usage on schema extensions to anon, authenticated, service_role;
"""

# The first version in which pgoutput can publish stored generated columns, which wal2json always did.
_GENERATED_COLUMNS_VERSION = 180000


async def bootstrap_supabase(dsn: str, *, publication: str = "supabase_realtime") -> None:
    """Give a database the roles, grants, functions and the empty publication of a Supabase project.

    May be repeated, and run at the same time for several databases of a server.

    Raises:
        OSError, asyncpg.PostgresError: if the database cannot be reached or the user may not do it.
    """
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.execute(_ROLES + _GRANTS + _AUTH + _EXTENSIONS)
            await _publication(connection, publication)
    finally:
        await connection.close()


async def _publication(connection: asyncpg.Connection, name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    if not await connection.fetchval("select exists (select from pg_publication where pubname = $1)", name):
        await connection.execute(f"create publication {quoted}")
    version = await connection.fetchval("select current_setting('server_version_num')::int")
    if version >= _GENERATED_COLUMNS_VERSION:
        await connection.execute(f"alter publication {quoted} set (publish_generated_columns = stored)")
