-- walpost 8/14: what the modes WALPOST_AFTER_PUBLISH=mark and delete need; leave it out in the mode keep.
-- Behind a /*:name*/ mark stands what "walpost init" and "walpost sql" fill in; edit it when you apply this by hand.
-- Needs: CREATE on schema walpost; to own walpost.outbox. May be applied again.

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

-- Since when published rows are marked or deleted, one row for each replication slot: rows from before that are left alone.
create table if not exists walpost.after_publish (
    slot  text primary key,                   -- the replication slot
    mode  text not null,                      -- keep, mark or delete; written when "walpost run" starts
    since timestamptz not null
);

-- Before there is a slot nothing was published and kept: rows from now on count. (Those from before are published by the scan of
-- the gap, which reports them too; a mark of them that is lost with the process stays lost.) Otherwise the next "walpost run" notes
-- the time.
insert into walpost.after_publish (slot, mode, since)
    select slot, mode, clock_timestamp()
    from (values (/*:slot*/ 'walpost', /*:mode*/ 'mark')) as settings (slot, mode)
    where not exists (select from pg_replication_slots s where s.slot_name = settings.slot)
    on conflict (slot) do nothing;

-- Finds rows that were never marked; holds those only. Building it makes writers wait: on a table that has millions of unmarked
-- rows make it by hand, CONCURRENTLY and under this name, before.
do $walpost$
begin
    if (
        select count(*) = 3 from pg_attribute
        where attrelid = to_regclass('walpost.outbox') and attname in ('created_at', 'id', 'sent_at') and not attisdropped
    ) then
        create index if not exists outbox_unmarked on walpost.outbox (created_at, id) where sent_at is null;
    end if;
end
$walpost$;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
