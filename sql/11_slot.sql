-- walpost 11/14: the replication slot: where the stream starts and what write-ahead log is kept for it. With two snapshots
-- around its making in walpost.progress: rows that were there before are published by the first "walpost run".
-- Needs: the REPLICATION attribute, wal_level = logical, SELECT, INSERT and UPDATE on walpost.progress. May be applied again.
--
-- Last, and each statement in a transaction of its own (so not with psql -1, nor by a tool that makes one of a file): a slot
-- cannot be made by a transaction that has written.
-- It waits for the transactions that are writing when it starts. From now on Postgres keeps its log until walpost has
-- confirmed it: do not create the slot long before the first "walpost run".
--
-- Behind a /*:name*/ mark stands what "walpost init" and "walpost sql" fill in; edit it when you apply this by hand.

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

select set_config('walpost.slot', /*:slot*/ 'walpost', false);

-- Who holds this lock writes the slot's row in walpost.progress: a running "walpost run" (in poll mode too), "walpost init", or
-- this session, to the end of the file.
select set_config(
    'walpost.slot_locked',
    pg_try_advisory_lock(hashtext('walpost'), hashtext(current_setting('walpost.slot')))::text,
    false
);

-- Empty where there is a slot, and where none can be made: then nothing is made or written below, also by a psql that goes on after
-- an error. Each statement sees what is committed when it begins.
select set_config(
    'walpost.scan_before',
    case
        when exists (select from pg_replication_slots where slot_name = current_setting('walpost.slot'))
            or current_setting('walpost.slot_locked') <> 'true'
            or exists (
                select from walpost.progress p, pg_control_system() c
                where p.slot = current_setting('walpost.slot') and p.system_id <> c.system_identifier::text
            )
        then ''
        else pg_current_snapshot()::text
    end,
    false
);

do $walpost$
declare
    slot constant text := current_setting('walpost.slot');
begin
    if current_setting('walpost.scan_before') = ''
        and not exists (select from pg_replication_slots where slot_name = slot)
    then
        if current_setting('walpost.slot_locked') <> 'true' then
            raise exception 'slot % does not exist and cannot be made: another walpost has its lock and writes its row in walpost.progress', slot
                using hint = 'stop that walpost, then apply this file again';
        end if;
        raise exception 'walpost.progress has a row of slot % from another cluster', slot
            using hint = 'delete it if this cluster is a copy that publishes on its own, then try again';
    end if;

    -- Kept in step on standbys that ask for it (sync_replication_slots), so that it survives a failover. Before 17 a statement
    -- that says "failover" is not understood, so one is prepared that is. It is executed below, by itself: inside of this block the
    -- making of a slot that has to wait for other transactions fails now and then ("snapshot reference ... is not owned by
    -- resource owner").
    if exists (select from pg_prepared_statements where name = 'walpost_make_slot') then
        deallocate walpost_make_slot;
    end if;
    execute format(
        'prepare walpost_make_slot (name, text) as
         select lsn from pg_create_logical_replication_slot($1, ''pgoutput''%s) where $2 <> %L',
        case when current_setting('server_version_num')::int >= 170000 then ', failover => true' end, ''
    );
end
$walpost$;

-- Noted before there is a slot: of one that is left behind half done "walpost run" then knows that it is.
insert into walpost.progress as p (slot, system_id, scan_before, timeline)
    select current_setting('walpost.slot'), c.system_identifier::text, current_setting('walpost.scan_before')::pg_snapshot,
           ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int
    from pg_control_system() c
    where current_setting('walpost.scan_before') <> ''
    on conflict (slot) do update
    set scan_before = excluded.scan_before, scan_upto = null, scan_position = null, confirmed_lsn = null, streamed = null,
        timeline = excluded.timeline, catalog = null, updated_at = clock_timestamp()
    where p.system_id = excluded.system_id;

execute walpost_make_slot (current_setting('walpost.slot'), current_setting('walpost.scan_before'));
deallocate walpost_make_slot;

-- The snapshot after is taken when every transaction that is running now has ended: before Postgres 14.13, 15.8 and 16.4 a slot may
-- begin inside of one, and then brings only a part of it.
select set_config(
    'walpost.begun',
    case when current_setting('walpost.scan_before') <> '' then pg_current_xact_id()::text else '0' end,
    false
);

begin isolation level read committed;
do $walpost$
declare
    begun constant xid8 := current_setting('walpost.begun')::xid8;
    since constant timestamptz := clock_timestamp();
    told boolean := false;
begin
    while exists (select from pg_snapshot_xip(pg_current_snapshot()) as running (id) where id < begun) loop
        if not told and clock_timestamp() > since + interval '5 s' then
            raise notice 'waiting for transactions that ran while the slot was made (pg_stat_activity: backend_xid is not null; pg_prepared_xacts)';
            told := true;
        end if;
        perform pg_sleep(0.05);
    end loop;
end
$walpost$;
commit;

-- Writes only to the row that was made above, and not if somebody has changed it since. confirmed_lsn is where the new slot stands.
update walpost.progress set scan_upto = pg_current_snapshot(), confirmed_lsn = s.confirmed_flush_lsn
    from pg_replication_slots s
    where slot = current_setting('walpost.slot') and s.slot_name = slot
      and scan_before::text = current_setting('walpost.scan_before') and scan_upto is null;

select pg_advisory_unlock(hashtext('walpost'), hashtext(current_setting('walpost.slot')))
    where current_setting('walpost.slot_locked') = 'true';

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
