-- walpost 3/13: the outbox table. An application inserts one row for each message, in the transaction that the
-- message is about.
-- Needs: CREATE on schema walpost; applied again: to own the table. May be applied again.
--
-- Behind a /*:name*/ mark stands what "walpost init" and "walpost sql" fill in; edit it when you apply this by hand.

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

create table if not exists walpost.outbox (
    id            uuid /*:key*/ primary key,  -- message id; its default is set below
    aggregatetype text not null,              -- routes to a topic
    aggregateid   text not null,              -- message key: order is kept per key
    type          text not null,              -- event type, becomes the property "type"
    payload       /*:payload*/ json,          -- or jsonb, bytea, text; the bytes of the message; null = tombstone
    topic         text,                       -- optional: overrides the routing template
    headers       jsonb,                      -- optional: string properties, {"name": "value"}
    deliver_at    timestamptz,                -- optional: delayed delivery
    created_at    timestamptz not null default clock_timestamp(),       -- becomes the event time
    seq           bigint generated always as identity,                  -- order of insertion
    txid          xid8 not null default pg_current_xact_id(),           -- the inserting transaction
    sent_at       timestamptz                 -- written only when sent rows are to be marked
/*:end*/ );

-- BRIN: a few kilobytes for millions of rows, and next to nothing for an insert. xid8 has no BRIN operator class of
-- its own (up to Postgres 18, at least), so its number is indexed: search with txid::text::bigint.
create index if not exists outbox_txid_brin on walpost.outbox using brin ((txid::text::bigint));

do $walpost$
begin
    if exists (select from pg_attrdef where adrelid = 'walpost.outbox'::regclass and adnum = 1) then
        return;
    end if;
    if to_regprocedure('pg_catalog.uuidv7()') is not null then
        alter table walpost.outbox alter column id set default uuidv7();
    else
        alter table walpost.outbox alter column id set default walpost.uuidv7();
    end if;
end
$walpost$;

-- An event is an INSERT. An update of a row, also by INSERT ... ON CONFLICT DO UPDATE, sends nothing, and the row would count as
-- sent: so the columns that make the event are not updated. One trigger for each statement: inserts, COPY and the marks of
-- sent_at do not pay for it. Columns that an application adds are its own. A person who mends rows says so in that session:
-- SET walpost.mend = on. (An UPDATE that names a partition, not walpost.outbox, is not seen.)
create or replace function walpost.refuse_update() returns trigger
    language plpgsql set search_path = pg_catalog, pg_temp
as $walpost$
begin
    if current_setting('walpost.mend', true) = 'on' then
        return null;
    end if;
    raise exception 'an update of walpost.outbox sends no event'
        using errcode = 'feature_not_supported',
              detail = 'Only inserts are events; also INSERT ... ON CONFLICT DO UPDATE changes a row without sending it.',
              hint = 'Insert a new row; ON CONFLICT DO NOTHING is allowed. To mend rows by hand: SET walpost.mend = on.';
end
$walpost$;

do $walpost$
declare
    columns text;
begin
    select string_agg(quote_ident(attname), ', ' order by attnum) into columns
        from pg_attribute
        where attrelid = 'walpost.outbox'::regclass and not attisdropped
          and attname in ('id', 'aggregatetype', 'aggregateid', 'type', 'payload', 'topic', 'headers', 'deliver_at', 'created_at',
                          'seq', 'txid');
    if columns is null then
        return;
    end if;
    execute format(
        'create or replace trigger walpost_refuse_update before update of %s on walpost.outbox
         for each statement execute function walpost.refuse_update()',
        columns
    );
end
$walpost$;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
