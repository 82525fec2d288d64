-- walpost 14/14: what walpost left undone in the modes mark and delete, for the retention and for partitions, one row for each replication
-- slot: rows that cannot be marked or deleted, partitions that cannot be dropped or made, each with the reason. Written by
-- "walpost run" when it changes; read by "walpost check" and by the next "walpost run", which does not publish such rows again.
-- Needs: CREATE on schema walpost; applied again: to own the table. May be applied again. (13 is for the other end, System B.)

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

create table if not exists walpost.left_undone (
    slot     text primary key,                -- the replication slot
    what     jsonb not null,                  -- {"count": n, "listed": [{"work", "table", "id", "reason", ...}, ...]}
    noted_at timestamptz not null default clock_timestamp()
);

do $walpost$
begin
    -- 12_roles.sql may have been applied before this.
    if exists (select from pg_roles where rolname = 'walpost_connector') then
        grant select, insert, update on walpost.left_undone to walpost_connector;
    end if;
end
$walpost$;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
