-- walpost 5/14: how far delivery is, one row for each replication slot. walpost writes it about every ten seconds while
-- events pass, and not at all while none do.
-- Needs: CREATE on schema walpost; applied again: to own the table. May be applied again, and brings a table of an earlier
-- version up to date.
--
-- A snapshot says of every transaction whether it had committed at that moment (documentation, "Transaction ID and
-- Snapshot Information Functions"): one value a table's rows can be compared with, however many there are.

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

create table if not exists walpost.progress (
    slot          text primary key,           -- the replication slot
    system_id     text not null,              -- of the cluster that the snapshots are from
    delivered     pg_snapshot,                -- every row visible in it has its receipt, unless it is a straggler
    scan_before   pg_snapshot,                -- taken before the slot was made: rows visible in it are never streamed
    scan_upto     pg_snapshot,                -- taken after: rows not visible in it are always streamed
    scan_position jsonb,                      -- by table: rows up to this seq are out of the gap; "done" ends it
    session       text,                       -- the process that streamed last
    confirmed_lsn pg_lsn,                     -- what it told the slot last, written when it stopped in good order
    updated_at    timestamptz not null default clock_timestamp()
);

-- Of the cluster when the slot was made or last taken by a process: on another one the slot may be another one too.
alter table walpost.progress add column if not exists timeline integer;
-- By OID, the tables (partitions, children) whose rows "delivered" speaks of: with null. With an array: one that belongs to the outbox
-- too, of which only what the snapshot in it shows is delivered; with a text: the same of one that does not belong to it any more.
alter table walpost.progress add column if not exists tables jsonb;
-- How many rows the stream brought since "delivered", written when the process stopped in good order.
alter table walpost.progress add column if not exists streamed jsonb;
-- Version of the publication and of the tables' definitions, read before "delivered" (in a gap: "scan_upto"). A different version now means that one
-- of them was changed.
alter table walpost.progress add column if not exists catalog text;
-- Part of the names of the producers. A process raises it when the broker may have left out an event and stored a later one under the names in use: it
-- would call the event "stored before". The next process then uses names that the broker does not know.
alter table walpost.progress add column if not exists producer_generation bigint not null default 0;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
