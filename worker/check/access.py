"""Examines who may see what: grants, the roles that handlers run as, and the effects of row-level security.

Since October 2026 hosted projects grant new tables to nobody; Realtime looks at the same grants as the Data
API does. What row-level security hides is hidden without an error.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.catalogue import Catalogue, Table, quote
from worker.check.findings import Finding, by_sql, listed
from worker.check.tables import CANARY
from worker.loader import Delivery
from worker.registry import Handler

_ROLES = text(
    "select current_user::text union"
    " select rolname::text from pg_catalog.pg_roles where rolname = 'service_role'"
)
_GRANTED = text(
    "select has_table_privilege(cast(:role as name), cast(:table as oid), 'select')"
    " and has_schema_privilege(cast(:role as name), cast(:schema as text), 'usage')"
)
# As what the owners of the handlers' tables make is granted, in all schemas or in this one.
_NEW_TABLES = text(
    """
    select n.nspname as schema, c.relowner::regrole::text as owner
    from unnest(cast(:oids as oid[])) as w (oid)
    join pg_catalog.pg_class c on c.oid = w.oid
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where not exists (
        select from pg_catalog.pg_default_acl d, pg_catalog.aclexplode(d.defaclacl) a
        where d.defaclrole = c.relowner and d.defaclobjtype = 'r'
          and d.defaclnamespace in (0, n.oid) and a.privilege_type = 'SELECT'
          and a.grantee in (0, pg_catalog.to_regrole('service_role')::oid)
    )
    group by 1, 2 order by 1, 2
    """
)
_OWN_TABLES = text(
    """
    select current_user::text as me,
           array(select c.relname::text from pg_catalog.pg_class c
                 where c.relnamespace = pg_catalog.to_regnamespace('tailrace') and c.relkind = 'r'
                   and not (pg_catalog.has_schema_privilege('tailrace', 'usage')
                     and pg_catalog.has_table_privilege(c.oid, 'select')
                     and (c.relname = 'migration' or pg_catalog.has_table_privilege(c.oid, 'insert')
                       and pg_catalog.has_table_privilege(c.oid, 'update')
                       and pg_catalog.has_table_privilege(c.oid, 'delete')))
                 order by 1) as lacking
    """
)
_ROLE = text(
    """
    select r.oid is not null as exists, r.rolbypassrls or r.rolsuper as sees_all,
           case when r.oid is not null then pg_catalog.pg_has_role(current_user, r.oid,
               case when current_setting('server_version_num')::int >= 160000 then 'SET' else 'MEMBER' end)
           end as ours, current_user::text as me
    from (select cast(:role as name) as name) w left join pg_catalog.pg_roles r on r.rolname = w.name
    """
)
# What a role sees of a table: all of it where it is exempt, or where a policy says simply `true`.
_SIGHT = text(
    """
    select c.relrowsecurity as on,
           not c.relrowsecurity or r.rolbypassrls or r.rolsuper
             or (not c.relforcerowsecurity and pg_catalog.pg_has_role(r.oid, c.relowner, 'usage')) as exempt,
           exists (select from pg_catalog.pg_policy p where p.polrelid = c.oid and p.polpermissive
             and p.polcmd in ('r', '*') and (p.polroles @> array[0::oid] or exists (
               select from unnest(p.polroles) o where o <> 0 and pg_catalog.pg_has_role(r.oid, o, 'usage')))
             and pg_catalog.pg_get_expr(p.polqual, p.polrelid) = 'true')
             and not exists (select from pg_catalog.pg_policy p where p.polrelid = c.oid
               and not p.polpermissive and p.polcmd in ('r', '*')) as everything,
           exists (select from pg_catalog.pg_policy p where p.polrelid = c.oid and p.polpermissive
             and p.polcmd in ('r', '*') and (p.polroles @> array[0::oid] or exists (
               select from unnest(p.polroles) o
               where o <> 0 and pg_catalog.pg_has_role(r.oid, o, 'usage')))) as something
    from pg_catalog.pg_class c, pg_catalog.pg_roles r
    where c.oid = cast(:table as oid) and r.rolname = cast(:role as name)
    """
)


async def examine_grants(connection: AsyncConnection, catalogue: Catalogue) -> list[Finding]:
    """Find tables for which Realtime would answer `401: Unauthorized`, or that we cannot use ourselves."""
    findings = []
    roles = [str(role) for role in (await connection.execute(_ROLES)).scalars()]
    for table in catalogue.tables.values():
        for role in roles:
            if not await _may_read(connection, role, table):
                detail = f"{role} may not select from {table.schema}.{table.name}"
                findings.append(by_sql("grants", "problem", detail, *_grant(role, table)))
    own = (await connection.execute(_OWN_TABLES)).one()
    if own.lacking and CANARY in catalogue.tables:
        me = quote(own.me)
        detail = f"{own.me} may not read and write tailrace.{listed(own.lacking)}"
        remedy = (
            f"run as their owner: grant usage on schema tailrace to {me};"
            f" grant select, insert, update, delete on all tables in schema tailrace to {me};"
        )
        findings.append(Finding("grants", "problem", detail, remedy))
    if not findings and "service_role" in roles and catalogue.tables:
        findings.append(Finding("grants", "ok", "service_role may read the tables"))
    if "service_role" in roles:
        findings += await _new_tables(connection, catalogue)
    return findings


def _grant(role: str, table: Table) -> tuple[str, str]:
    return (
        f"grant usage on schema {quote(table.schema)} to {quote(role)};",
        f"grant select on {table.sql_name} to {quote(role)};",
    )


async def _may_read(connection: AsyncConnection, role: str, table: Table) -> bool:
    parameters = {"role": role, "table": table.oid, "schema": table.schema}
    return bool(await connection.scalar(_GRANTED, parameters))


async def _new_tables(connection: AsyncConnection, catalogue: Catalogue) -> list[Finding]:
    oids = [table.oid for name, table in catalogue.tables.items() if name != CANARY]
    rows = (await connection.execute(_NEW_TABLES, {"oids": oids})).all()
    return [
        Finding(
            "grants",
            "note",
            f"tables that {row.owner} makes in schema {row.schema} are granted to service_role by nobody",
            f"grant each one that a handler follows, or run: alter default privileges for role {row.owner}"
            f" in schema {quote(row.schema)} grant select on tables to service_role;",
        )
        for row in rows
    ]


async def examine_roles(connection: AsyncConnection, handlers: Sequence[Handler]) -> list[Finding]:
    """Find roles that handlers run as, and that there are not, or that we may not take on."""
    findings = []
    for role, names in _by_role(handlers).items():
        found = (await connection.execute(_ROLE, {"role": role})).one()
        if not found.exists:
            detail = f"{names} runs as role {role}, which does not exist"
            findings.append(
                Finding("roles", "problem", detail, f"run: create role {quote(role)}; or correct role=")
            )
        elif not found.ours:
            detail = f"{found.me} may not take on role {role}, as which {names} runs"
            remedy = f"run as a superuser: grant {quote(role)} to {quote(found.me)};"
            findings.append(Finding("roles", "problem", detail, remedy))
    return findings


def _by_role(handlers: Iterable[Handler]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for handler in handlers:
        if handler.role is not None:
            found.setdefault(handler.role, []).append(handler.name)
    return {role: listed(names) for role, names in sorted(found.items())}


async def examine_row_security(
    connection: AsyncConnection, catalogue: Catalogue, handlers: Sequence[Handler], delivery: Delivery
) -> list[Finding]:
    """Say what row-level security hides, and from whom."""
    findings = []
    tables = [table for name, table in catalogue.tables.items() if name != CANARY and table.row_security]
    for table in tables:
        name = f"{table.schema}.{table.name}"
        for role in [str(one) for one in (await connection.execute(_ROLES)).scalars()]:
            sight = await _sight(connection, role, table)
            if not (sight.exempt or sight.everything):
                findings.append(_hidden(role, table, delivery))
        for role, names in _by_role(_of(handlers, table)).items():
            blind = await _sight(connection, role, table)
            if blind is not None and not (blind.exempt or blind.something):
                detail = f"{names} runs as {role}, and sees no row of {name}: no policy is for it"
                remedy = (
                    "run: create policy … on "
                    f"{table.sql_name} for select to {quote(role)} using (…); with the rows that it may see"
                )
                findings.append(Finding("row security", "warning", detail, remedy))
    if tables and delivery == "plain" and not findings:
        names = listed(f"{table.schema}.{table.name}" for table in tables)
        detail = f"on for {names}: a row that is gone when Realtime looks for it is told as its DELETE alone"
        remedy = "where each change counts, use proven delivery (WORKER_DELIVERY=proven)"
        findings.append(Finding("row security", "note", detail, remedy))
    return findings


def _of(handlers: Iterable[Handler], table: Table) -> list[Handler]:
    name = (table.schema, table.name)
    return [one for one in handlers if name in {(sub.schema, sub.table) for sub in one.subscriptions}]


async def _sight(connection: AsyncConnection, role: str, table: Table) -> Any:  # noqa: ANN401 - a row
    found = await connection.execute(_SIGHT, {"role": role, "table": table.oid})
    return found.one_or_none()


def _hidden(role: str, table: Table, delivery: Delivery) -> Finding:
    name = f"{table.schema}.{table.name}"
    policy = f"create policy {quote(f'all rows for {role}')} on {table.sql_name} for select"
    policy += f" to {quote(role)} using (true);"
    remedy = f"run: {policy} or, as a superuser: alter role {quote(role)} bypassrls;"
    if role == "service_role":
        detail = (
            f"row-level security hides rows of {name} from service_role: Realtime does not tell their changes"
        )
        state = "problem" if delivery == "plain" else "note"
        return Finding("row security", "problem" if state == "problem" else "note", detail, remedy)
    detail = (
        f"row-level security hides rows of {name} from {role}:"
        " backfills, and what is read again, go without them"
    )
    return Finding("row security", "problem", detail, remedy)
