-- walpost 3/14: the outbox table. An application inserts one row for each message, in the transaction that the
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
-- sent: so a change of what makes the event is refused. Inserts do not pay for it; a mark of sent_at pays for one comparison. The
-- trigger names columns as texts, so that they can be altered and dropped. Columns that an application adds are its own. A person
-- who mends rows says so in that session: SET walpost.mend = on.
create or replace function walpost.refuse_update() returns trigger
    language plpgsql set search_path = pg_catalog, pg_temp
as $walpost$
declare
    before constant json := to_json(old);
    after constant json := to_json(new);
    one text;
begin
    if current_setting('walpost.mend', true) = 'on' then
        return null;
    end if;
    foreach one in array tg_argv loop
        if (before -> one)::text is distinct from (after -> one)::text then
            raise exception 'an update of %.% sends no event', tg_table_schema, tg_table_name
                using errcode = 'feature_not_supported', column = one,
                      detail = format('It changes column %I. Only inserts are events, and ON CONFLICT DO UPDATE is an update.', one),
                      hint = 'Insert a new row; ON CONFLICT DO NOTHING is allowed. To mend rows by hand: SET walpost.mend = on.';
        end if;
    end loop;
    return null;
end
$walpost$;

do $walpost$
declare
    marked constant boolean := exists (
        select from pg_attribute where attrelid = 'walpost.outbox'::regclass and attname = 'sent_at' and not attisdropped
    );
begin
    execute format(
        'create or replace trigger walpost_refuse_update after update on walpost.outbox for each row %s
         execute function walpost.refuse_update(''id'', ''aggregatetype'', ''aggregateid'', ''type'', ''payload'', ''topic'', ''headers'',
                                                ''deliver_at'', ''created_at'', ''seq'', ''txid'')',
        case when marked then 'when (old.sent_at is not distinct from new.sent_at)' end
    );
end
$walpost$;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
