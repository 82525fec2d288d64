-- walpost 11/13: the replication slot: where the stream starts and what write-ahead log is kept for it. With two snapshots
-- around its making in walpost.progress: rows that were there before are published by the first "walpost run".
-- Needs: the REPLICATION attribute, wal_level = logical, SELECT, INSERT and UPDATE on walpost.progress. May be applied again.
--
-- Last, and each statement in a transaction of its own (so not with psql -1, nor by a tool that makes one of a file): a slot
-- cannot be made by a transaction that has written.
-- It waits for the transactions that are writing when it starts. From now on Postgres keeps its log until walpost has
-- confirmed it: do not create the slot long before the first "walpost run".
--
-- Behind a /*:name*/ mark stands what "walpost init" and "walpost sql" fill in; edit it when you apply this by hand.

select set_config('walpost.slot', /*:slot*/ 'walpost', false);

-- Empty where there is a slot: then nothing is made below. Each statement sees what is committed when it begins.
select set_config(
    'walpost.scan_before',
    case
        when exists (select from pg_replication_slots where slot_name = current_setting('walpost.slot')) then ''
        else pg_current_snapshot()::text
    end,
    false
);

do $walpost$
declare
    slot constant text := current_setting('walpost.slot');
begin
    if current_setting('walpost.scan_before') <> '' and exists (
        select from walpost.progress p, pg_control_system() c
        where p.slot = current_setting('walpost.slot') and p.system_id <> c.system_identifier::text
    ) then
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

-- Noted before there is a slot: one that is left behind half done is then made anew by "walpost run".
insert into walpost.progress (slot, system_id, scan_before)
    select current_setting('walpost.slot'), c.system_identifier::text, current_setting('walpost.scan_before')::pg_snapshot
    from pg_control_system() c
    where current_setting('walpost.scan_before') <> ''
    on conflict (slot) do update
    set scan_before = excluded.scan_before, scan_upto = null, scan_position = null, confirmed_lsn = null,
        updated_at = clock_timestamp();

execute walpost_make_slot (current_setting('walpost.slot'), current_setting('walpost.scan_before'));
deallocate walpost_make_slot;

update walpost.progress set scan_upto = pg_current_snapshot()
    where slot = current_setting('walpost.slot') and current_setting('walpost.scan_before') <> ''
      and exists (select from pg_replication_slots where slot_name = current_setting('walpost.slot'));
