-- The tables of this example. Run it once in the SQL editor of a Supabase project, or by psql.

create table public.profiles (
  id         uuid primary key, -- of auth.users; on Supabase: references auth.users on delete cascade
  name       text not null check (length(name) between 1 and 80),
  created_at timestamptz not null default now()
);

create table public.posts (
  id         bigint generated always as identity primary key,
  author_id  uuid not null references public.profiles on delete cascade,
  title      text not null check (length(title) between 1 and 200),
  body       text not null default '' check (length(body) <= 20000),
  published  boolean not null default false,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);
create index posts_of_author on public.posts (author_id, id);
create index posts_by_words on public.posts
  using gin (to_tsvector('simple', title || ' ' || body));

-- One row for each file; its content is in Storage, under owner_id/id.
create table public.files (
  id           uuid primary key default gen_random_uuid(),
  owner_id     uuid not null references public.profiles on delete cascade,
  name         text not null check (length(name) between 1 and 200),
  content_type text not null,
  size         bigint not null,
  created_at   timestamptz not null default now()
);
create index files_of_owner on public.files (owner_id, created_at);

-- Derived: written by the worker alone.
create table public.derived_author_stats (
  author_id uuid primary key,
  posts     integer not null,
  published integer not null,
  words     bigint not null,
  latest_at timestamptz
);

alter table public.profiles enable row level security;
alter table public.posts enable row level security;
alter table public.files enable row level security;
alter table public.derived_author_stats enable row level security;

create policy everybody_reads on public.profiles for select to authenticated using (true);
create policy own_is_made on public.profiles for insert to authenticated with check (id = auth.uid());
create policy own_is_changed on public.profiles for update to authenticated
  using (id = auth.uid()) with check (id = auth.uid());
create policy own_is_deleted on public.profiles for delete to authenticated using (id = auth.uid());

create policy published_or_own on public.posts for select to authenticated
  using (published or author_id = auth.uid());
create policy own_is_made on public.posts for insert to authenticated with check (author_id = auth.uid());
create policy own_is_changed on public.posts for update to authenticated
  using (author_id = auth.uid()) with check (author_id = auth.uid());
create policy own_is_deleted on public.posts for delete to authenticated using (author_id = auth.uid());

create policy own on public.files for all to authenticated
  using (owner_id = auth.uid()) with check (owner_id = auth.uid());

create policy everybody_reads on public.derived_author_stats for select to authenticated using (true);

grant select, insert, update, delete on public.profiles, public.posts, public.files to authenticated;
grant select on public.derived_author_stats to authenticated;

-- With the whole old row the worker knows whose post was deleted.
alter table public.posts replica identity full;
alter publication supabase_realtime add table public.posts;
