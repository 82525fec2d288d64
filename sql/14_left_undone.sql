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

-- To whom walpost.straggler was granted by an earlier version, or by 12_roles.sql before this.
do $walpost$
declare
    who text;
begin
    for who in
        select distinct case a.grantee when 0 then 'public' else a.grantee::regrole::text end
        from pg_catalog.pg_class c, pg_catalog.aclexplode(c.relacl) a
        where c.oid = to_regclass('walpost.straggler') and a.privilege_type = 'DELETE' and a.grantee <> c.relowner
    loop
        execute format('grant select, insert, update on walpost.left_undone to %s', who);
    end loop;
end
$walpost$;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
