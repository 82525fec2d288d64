-- walpost 6/14: stragglers: events that could not be published when their turn came, whole, until they can.
-- Needs: CREATE on schema walpost; applied again: to own the table. May be applied again. Whoever runs walpost needs SELECT, INSERT, UPDATE and DELETE
-- on it, and SELECT, INSERT and DELETE on walpost.discarded.
--
-- A row is written before the replication slot (or the scan of the table) moves past its event, and deleted when the broker has
-- the message.
--   retrying  the first of its topic and key (or without order): tried when next_attempt_at has come
--   parked    waits behind an earlier one of the same topic and key
--   dead      no attempt is made any more; walpost stragglers retry and discard decide about it

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

create table if not exists walpost.straggler (
    number            bigint generated always as identity primary key,   -- order of arrival
    slot              text not null,          -- the replication slot it came through
    outbox            text not null,          -- the table it was inserted into, as in SQL; or walpost.emit_transient
    id                text,                   -- message id
    topic             text,                   -- null: no topic could be made of the row
    key               text,                   -- null: the row has none
    payload           bytea,                  -- null = tombstone
    properties        json not null default '[]',     -- [["name", "value"], ...]: an array keeps the order; json, not jsonb: it holds \u0000 and what the database's encoding has not
    event_time_ms     bigint not null default 0,      -- milliseconds since 1970, 0 = none
    deliver_at_ms     bigint,                 -- delayed delivery
    commit_lsn        pg_lsn not null,        -- its transaction; 0/0: it was read from the table
    ordinal           bigint not null,        -- its place among the transaction's rows; read from the table: its seq
    state             text not null check (state in ('retrying', 'parked', 'dead')),
    reason            text not null,          -- why it is here, or why the last attempt failed
    attempts          integer not null default 0,
    next_attempt_at   timestamptz not null default now(),
    dead_letter_at    timestamptz,            -- when a copy went to WALPOST_DEAD_LETTER_TOPIC
    created_at        timestamptz not null default clock_timestamp(),
    row_seq           bigint,                 -- which of the table's rows with this id it is: its seq,
    row_txid          bigint,                 -- and its txid (numbers may begin again); both NULL: not known
    xid               bigint                  -- the transaction that brought it, where only the log has told that
);

-- What an earlier version made: jsonb, no number of the row, and B-tree entries that hold only keys and ids of up to 2.7 kB.
alter table walpost.straggler alter column properties type json;
alter table walpost.straggler add column if not exists row_seq bigint, add column if not exists row_txid bigint,
    add column if not exists xid bigint;
drop index if exists walpost.straggler_once, walpost.straggler_identity, walpost.straggler_order, walpost.straggler_event, walpost.straggler_row;

-- A transaction that Postgres sends again, or a scan that goes on after a crash, stores nothing twice. (With the id: another
-- timeline may use the same positions. With the table: each counts its seq from 1. With the txid of a row that was read from the table:
-- its numbers begin again with TRUNCATE ... RESTART IDENTITY.)
create unique index if not exists straggler_place
    on walpost.straggler (slot, outbox, commit_lsn, ordinal, hashtextextended(coalesce(id, ''), 0),
                          (case when commit_lsn = '0/0' then coalesce(row_txid, 0) else 0 end));

-- What is due.
create index if not exists straggler_due on walpost.straggler (slot, next_attempt_at) where state <> 'parked';
-- A key's stragglers, in order.
create index if not exists straggler_key on walpost.straggler (slot, hashtextextended(key, 0), number);
-- By message, for walpost.outbox_status and retention.
create index if not exists straggler_id on walpost.straggler using hash (id);

-- What walpost stragglers discard has deleted, as long as the log or a scan may bring it again: it is then left out. walpost deletes
-- a row when its delivery is noted in walpost.progress, an hour after it was written or later.
create table if not exists walpost.discarded (
    number        bigint generated always as identity primary key,
    slot          text not null,
    outbox        text not null,              -- from here on as in walpost.straggler
    id            text,
    commit_lsn    pg_lsn not null,
    ordinal       bigint not null,
    seq           bigint,                     -- of the outbox row, by which a scan knows it,
    row_txid      bigint,                     -- and its txid; NULL: an earlier version noted it, or no scan can bring it
    txid          xid8 not null default pg_current_xact_id(),   -- who sees this transaction sees the straggler's
    discarded_at  timestamptz not null default clock_timestamp()
);
alter table walpost.discarded add column if not exists row_txid bigint;
create index if not exists discarded_place on walpost.discarded (slot, outbox, commit_lsn, ordinal);
-- To whom walpost.straggler was granted by an earlier version.
do $walpost$
declare
    who text;
begin
    for who in
        select distinct case a.grantee when 0 then 'public' else a.grantee::regrole::text end
        from pg_catalog.pg_class c, pg_catalog.aclexplode(c.relacl) a
        where c.oid = 'walpost.straggler'::regclass and a.privilege_type = 'DELETE' and a.grantee <> c.relowner
    loop
        execute format('grant select, insert, delete on walpost.discarded to %s', who);
    end loop;
end
$walpost$;
do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
