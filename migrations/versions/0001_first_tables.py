"""The tables that say what has been applied, what is held and what may have been lost.

Everything that must survive lives here; Redis holds only what is on its way.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = """
-- One row: who reads the source, under which generation, and since when.
create table tailrace.source (
  id              smallint primary key default 1 check (id = 1),
  format          integer not null default 1,
  history         text not null default replace(gen_random_uuid()::text, '-', ''),
  delivery        text not null default 'plain' check (delivery in ('plain', 'proven')),
  generation      text,
  floor_lsn       bigint not null default 0,
  floor_ordinal   bigint not null default 0,
  lanes           integer,
  lease_token     text,
  lease_holder    text,
  lease_until     timestamptz not null default '-infinity',
  live_at         timestamptz,
  slot_target     bigint,
  server_started  timestamptz,
  timeline        integer,
  system          text,
  published       jsonb,
  reread          text,
  noted_lsn       bigint not null default 0,
  noted_ordinal   bigint not null default -1
);
comment on column tailrace.source.format is
  'of positions and lanes: a process that knows only lower ones reads and applies nothing';
comment on column tailrace.source.generation is
  'random name of one reading of the source; part of the names of the lanes in Redis';
comment on column tailrace.source.slot_target is
  'commits below it are accounted for: written before the slot is moved there';
comment on column tailrace.source.reread is
  'why a worker wants the source to be read again from the slot; null when nobody does';
comment on column tailrace.source.noted_lsn is
  'up to here what has no entry in any lane is written down: what was filtered out, and gaps';
comment on column tailrace.source.live_at is 'last moment at which the source was surely live';
insert into tailrace.source default values;

create table tailrace.handlers (
  name        text primary key,
  kind        text not null check (kind in ('derive', 'change')),
  state       text not null default 'active' check (state in ('active', 'orphaned')),
  tables      text[] not null,
  filtered    bigint not null default 0,
  paused      boolean not null default false,
  since       timestamptz not null default now(),
  orphaned_at timestamptz
);

-- One row for each lane: up to where it is applied. Moved in the handler's own transaction.
create table tailrace.lanes (
  handler         text not null references tailrace.handlers (name) on delete cascade,
  lane            integer not null,
  lsn             bigint not null default 0,
  ordinal         bigint not null default 0,
  arrived_lsn     bigint,
  arrived_ordinal bigint,
  read            bigint not null default 0,
  applied         bigint not null default 0,
  holding         integer not null default 0,
  parked          integer not null default 0,
  moved_at        timestamptz,
  primary key (handler, lane)
) with (fillfactor = 50);
comment on column tailrace.lanes.arrived_lsn is
  'position of a change of several lanes that this lane has reached and waits for';
comment on column tailrace.lanes.read is
  'changes that the lane has passed: applied, or in tailrace.held';
comment on column tailrace.lanes.holding is
  'rows of tailrace.held that concern this lane, without dead letters';
comment on column tailrace.lanes.parked is
  'rows of tailrace.held with status parked that this lane is to apply';

create function tailrace.present_history() returns text language sql stable
  as 'select history from tailrace.source';
create table tailrace.held (
  id              bigint generated always as identity primary key,
  handler         text not null references tailrace.handlers (name) on delete cascade,
  lanes           integer[] not null,
  keys            text[] not null,
  lsn             bigint not null,
  ordinal         bigint not null,
  history         text not null default tailrace.present_history(),
  status          text not null default 'retrying' check (status in ('retrying', 'parked', 'paused', 'dead')),
  source          text not null,
  payload         bytea,
  changes         integer not null default 1,
  attempts        integer not null default 0,
  held_at         timestamptz not null default clock_timestamp(),
  halts           boolean not null default false,
  waits           boolean not null generated always as (status <> 'dead' or halts) stored,
  waits_long      boolean not null generated always as ((status <> 'dead' or halts) and status <> 'parked'
    and (status <> 'retrying' or attempts > 0 or next_attempt_at is null)) stored,
  next_attempt_at timestamptz,
  error_class     text,
  error           text,
  traceback       text,
  hint            text,
  told_at         timestamptz,
  redriven        boolean not null default false,
  overtaken_by    bigint not null default 0,
  overtaken_lsn   bigint,
  overtaken_ordinal bigint,
  first_failed_at timestamptz,
  last_failed_at  timestamptz
);
comment on table tailrace.held is 'changes that wait: for a retry of their own, or behind one of their key';
comment on column tailrace.held.history is
  'the history to which its position belongs: the same position is another change in another one';
comment on column tailrace.held.halts is 'a dead letter that holds back its keys until a person has decided';
comment on column tailrace.held.waits is 'later changes of its keys wait behind it';
comment on column tailrace.held.waits_long is
  'it waits, but is not on its way, as what is parked is, or due and has never failed';
comment on column tailrace.held.told_at is 'when the hooks for dead letters had been called';
comment on column tailrace.held.overtaken_by is
  'newer changes of its keys that were applied while it was the last dead letter before them';
comment on column tailrace.held.redriven is 'a person has asked for it to be tried again';
comment on column tailrace.held.status is
  'paused: no change, but the mark of a lane key that a person has paused; its id is below all others';
comment on column tailrace.held.keys is
  'lane keys, as JSON arrays of canonical texts; empty for a TRUNCATE, which concerns all of them';
create index held_by_handler on tailrace.held (handler, id) where waits;
create index held_of_all_keys on tailrace.held (handler, id) where waits and keys = '{}';
-- Asked after nearly every write: a list of what is to be put in would be gone through each time.
create index held_by_key on tailrace.held using gin (keys) with (fastupdate = off) where waits;
create index held_parked on tailrace.held (handler, (lanes[1]), id) where status = 'parked';
create index held_dead on tailrace.held (handler, id) where status = 'dead';
create index held_dead_by_key on tailrace.held using gin (keys) with (fastupdate = off) where status = 'dead';
create index held_behind on tailrace.held (handler) where status = 'retrying' and next_attempt_at is null;
create index held_long on tailrace.held (handler) where waits_long;
create index held_due on tailrace.held (next_attempt_at)
  where status = 'retrying' and next_attempt_at is not null;

-- Payloads that Redis is spared, for entries of its lanes that would be too large for it.
create table tailrace.payloads (
  generation  text not null,
  handler     text not null,
  lanes       integer[] not null,
  lsn         bigint not null,
  ordinal     bigint not null,
  payload     bytea not null,
  primary key (generation, handler, lsn, ordinal)
);
comment on table tailrace.payloads is 'payloads too large for Redis, until their lanes have passed them';

-- Who decided what about dead letters and lanes. Outlives the handlers it names.
create table tailrace.audit (
  id          bigint generated always as identity primary key,
  at          timestamptz not null default clock_timestamp(),
  who         text not null,
  via         text not null check (via in ('command', 'http')),
  action      text not null check (action in ('redrive', 'discard', 'pause', 'resume')),
  handler     text not null,
  dead_letter bigint,
  lane_key    text,
  details     jsonb
);
comment on column tailrace.audit.details is
  'of a redrive with an edited record: the values before and after; of a discard: what was discarded';
create index audit_of_dead_letter on tailrace.audit (dead_letter) where dead_letter is not null;

create table tailrace.gaps (
  id          bigint generated always as identity primary key,
  since       timestamptz,
  until       timestamptz not null,
  cause       text not null,
  tables      text[] not null,
  state       text not null default 'open' check (state in ('open', 'backfilled', 'acknowledged')),
  recorded_at timestamptz not null default now(),
  closed_at   timestamptz
);
comment on table tailrace.gaps is 'intervals in which changes of these tables may have been lost';

create table tailrace.backfills (
  id          bigint generated always as identity primary key,
  handler     text not null references tailrace.handlers (name) on delete cascade,
  schema_name text not null,
  table_name  text not null,
  gap         bigint references tailrace.gaps (id) on delete set null,
  state       text not null default 'waiting' check (state in ('waiting', 'running', 'done', 'cancelled')),
  condition   text,
  rate        integer check (rate > 0),
  phase       text not null default 'rows' check (phase in ('rows', 'kept')),
  cursor      jsonb,
  passed      jsonb,
  secret      text not null default replace(gen_random_uuid()::text, '-', ''),
  rows        bigint not null default 0,
  keys        bigint not null default 0,
  estimated   bigint,
  asked_by    text,
  asked_at    timestamptz not null default now(),
  done_at     timestamptz
);
comment on column tailrace.backfills.cursor is
  'where a restart goes on: primary key of the last row whose key every lane has passed; of a change handler,'
  ' up to where the rows are in the log';
comment on column tailrace.backfills.passed is
  'of a change handler: the cursor up to which every lane has passed the rows';
comment on column tailrace.backfills.secret is
  'by which the listener knows rows in the log as written by this backfill';
comment on column tailrace.backfills.asked_by is 'a person; null where a gap has asked';
create unique index backfills_waiting on tailrace.backfills (handler, schema_name, table_name)
  where state = 'waiting' and condition is null;

-- The row that proves the path end to end: written here, it must come back by every path.
create table tailrace.canary (
  id         smallint primary key default 1 check (id = 1),
  token      text not null,
  written_at timestamptz not null default clock_timestamp()
);
insert into tailrace.canary (token) values ('none');
"""

# How a pass begins, in one round trip. Each statement of a volatile function has a snapshot of its own, so
# that what is read after the lock is what the last holder left; and the lock never waits. A pass over several
# lanes goes without those that somebody else has locked.
_TAKE = """
create function tailrace.{name}(the_handler text, {argument}, idle text, total text)
returns table (
  lane integer, lsn bigint, ordinal bigint, arrived_lsn bigint, arrived_ordinal bigint, holding integer,
  parked integer, generation text, floor_lsn bigint, floor_ordinal bigint, lanes integer, history text,
  delivery text, same_server boolean, paused boolean, has_dead boolean, snapshot text, format integer
)
language plpgsql volatile as $$
#variable_conflict use_column
declare
  taken integer[];
begin
  perform set_config('idle_in_transaction_session_timeout', idle, true),
    set_config('client_connection_check_interval', '1000', true),
    case when total is not null then set_config('transaction_timeout', total, true) end;
  {lock};
  return query
    select l.lane, l.lsn, l.ordinal, l.arrived_lsn, l.arrived_ordinal, l.holding, l.parked,
      s.generation, s.floor_lsn, s.floor_ordinal, s.lanes, s.history, s.delivery,
      s.delivery = 'plain' or (s.server_started = pg_postmaster_start_time()
        and s.timeline = (select timeline_id from pg_control_checkpoint())),
      coalesce((select h.paused from tailrace.handlers h where h.name = the_handler), false),
      exists (select from tailrace.held d where d.handler = the_handler and d.status = 'dead'),
      pg_current_snapshot()::text, s.format
    from tailrace.lanes l, tailrace.source s where l.handler = the_handler and l.lane {which};
end
$$
"""
TAKE_LANE = _TAKE.format(
    name="take_lane",
    argument="the_lane integer",
    lock="perform from tailrace.lanes l"
    " where l.handler = the_handler and l.lane = the_lane for update nowait",
    which="= the_lane",
)
TAKE_LANES = _TAKE.format(
    name="take_lanes",
    argument="the_lanes integer[]",
    lock="taken := array(select l.lane from tailrace.lanes l"
    " where l.handler = the_handler and l.lane = any (the_lanes) order by l.lane for update skip locked)",
    which="= any (taken)",
)

# What is deferred is checked now, and deferred again, in one round trip: after each call made with care.
CHECK_CONSTRAINTS = """
create function tailrace.check_constraints() returns void language plpgsql volatile as $$
begin
  set constraints all immediate;
  set constraints all deferred;
end
$$
"""

GRANTS = """
do $$
begin
  if exists (select from pg_roles where rolname = 'service_role') then
    grant usage on schema tailrace to service_role;
    grant select on tailrace.canary to service_role;
  end if;
end
$$;
"""


def upgrade() -> None:
    """Make the tables."""
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
    op.execute(TAKE_LANE)
    op.execute(TAKE_LANES)
    op.execute(CHECK_CONSTRAINTS)
    op.execute(GRANTS)


def downgrade() -> None:
    """Drop the tables, and with them all knowledge of what was applied."""
    op.execute("drop function tailrace.take_lane, tailrace.take_lanes, tailrace.check_constraints")
    op.execute(
        "drop table tailrace.canary, tailrace.backfills, tailrace.gaps, tailrace.audit, tailrace.payloads,"
        " tailrace.held, tailrace.lanes, tailrace.handlers, tailrace.source"
    )
    op.execute("drop function tailrace.present_history")
