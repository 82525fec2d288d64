-- walpost 13/13: System B. The messages that each consumer has handled, so that one that comes again is recognised.
-- For the database of the consuming application; "walpost sql --inbox" prints it. Needs: CREATE on the database, or CREATE on
-- schema walpost where there is one; applied again: to own the tables. May be applied again. Whoever consumes needs SELECT, INSERT,
-- UPDATE and DELETE on both tables.
--
-- A consumer of a broker is handed a message at least once. It does its work once when the message id is written in the same
-- transaction as the work:
--
--   begin;
--   select walpost.inbox_claim('stock', '0198...');   -- false: handled before, or given up: leave the work out
--   update stock ...;                                  -- the work
--   commit;                                          -- and only now acknowledge to the broker
--
-- A second consumer with the same message waits in inbox_claim for the first one's end, and is told then.
-- Postgres answers the COMMIT of an aborted transaction by ROLLBACK and no error, which a driver may report as success: work that
-- goes on after a statement that failed would be lost. So a last statement (select 1) belongs before commit: it fails then.
-- A message that fails again and again is given up with inbox_give_up, in a transaction after the failed one; walpost::inbox, the
-- Rust library, counts the attempts with inbox_failed and does so. Later messages go on: those of the same key then overtake it.
-- An id is at most some 2,000 bytes long (more is refused by the index) and, as all text, has no NUL: walpost::inbox has a hash in
-- the place of one that does not fit.

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

do $walpost$
begin
    if to_regnamespace('walpost') is null then
        create schema walpost;
    end if;
end
$walpost$;

create table if not exists walpost.inbox (
    consumer   text not null,                 -- which application, or which part of it
    id         text not null,                 -- message id: the property "id"
    handled_at timestamptz not null default now(),
    primary key (consumer, id)
);
-- Retention goes by time.
create index if not exists inbox_handled_at on walpost.inbox (consumer, handled_at, id);

-- Messages that failed: being tried again, or set aside for a person to look at.
create table if not exists walpost.inbox_poison (
    consumer      text not null,
    id            text not null,
    topic         text not null default '',   -- where it is, for whoever reads it again
    message_id    text not null default '',   -- the broker's
    key           text,
    payload       bytea,                      -- written when it is set aside
    properties    json not null default '{}', -- json, not jsonb: it holds \u0000
    attempts      integer not null default 0, -- failed ones, and one under way that its process may not outlive
    reason        text not null,              -- why the last attempt failed
    set_aside_at  timestamptz,                -- null: it is still tried; its row goes when it succeeds
    first_at      timestamptz not null default now(),
    primary key (consumer, id)
);

-- What an earlier version made: functions with other arguments, of which one depends on the column; and jsonb.
drop function if exists walpost.inbox_failed(text, text, text);
drop function if exists walpost.inbox_give_up(text, text, text, text, text, text, bytea, jsonb);
do $walpost$
begin
    if 'jsonb'::regtype = (select atttypid from pg_attribute
                           where attrelid = 'walpost.inbox_poison'::regclass and attname = 'properties') then
        alter table walpost.inbox_poison alter column properties type json;
    end if;
end
$walpost$;

-- True for a message that is new to the consumer: its work is to be done in this transaction.
create or replace function walpost.inbox_claim(consumer text, id text) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $walpost$
begin
    if coalesce(consumer, '') = '' then
        raise exception 'walpost.inbox_claim: consumer is null or empty'
            using errcode = 'invalid_parameter_value', column = 'consumer', hint = 'name the application that consumes';
    elsif coalesce(id, '') = '' then
        raise exception 'walpost.inbox_claim: id is null or empty'
            using errcode = 'invalid_parameter_value', column = 'id', hint = 'it is the message''s property "id"';
    end if;
    insert into walpost.inbox as i (consumer, id) values (inbox_claim.consumer, inbox_claim.id) on conflict do nothing;
    return found;
end
$walpost$;

-- Notes a failed attempt and gives back how many there were. In a transaction of its own, after the failed one; or before the
-- attempt, so that one which its process does not outlive counts, and then again with counted => true, for its reason. A standard body is
-- bound to what it names when it is made.
create or replace function walpost.inbox_failed(consumer text, id text, reason text, counted boolean default false) returns integer
    language sql volatile
begin atomic
    insert into walpost.inbox_poison as p (consumer, id, attempts, reason)
        values (inbox_failed.consumer, inbox_failed.id, 1, coalesce(inbox_failed.reason, 'unknown'))
        on conflict (consumer, id) do update
        -- Set aside, and claimed anew: somebody has deleted its id to have it tried again.
        set attempts = case when p.set_aside_at is not null then 1
                            else p.attempts + case when inbox_failed.counted then 0 else 1 end end,
            reason = excluded.reason, set_aside_at = null
        returning p.attempts;
end;

-- Sets a message aside: claimed, so that it is never handled by itself again, and kept whole. False: it was handled meanwhile.
create or replace function walpost.inbox_give_up(
    consumer   text,
    id         text,
    reason     text,
    topic      text default '',
    message_id text default '',
    key        text default null,
    payload    bytea default null,
    properties json default '{}'
) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $walpost$
begin
    if not walpost.inbox_claim(consumer, id) then
        return false;
    end if;
    insert into walpost.inbox_poison as p (consumer, id, topic, message_id, key, payload, properties, reason, set_aside_at)
        values (inbox_give_up.consumer, inbox_give_up.id, coalesce(inbox_give_up.topic, ''), coalesce(inbox_give_up.message_id, ''),
                inbox_give_up.key, inbox_give_up.payload, coalesce(inbox_give_up.properties, '{}'),
                coalesce(inbox_give_up.reason, 'unknown'), now())
        on conflict on constraint inbox_poison_pkey do update
        set topic = excluded.topic, message_id = excluded.message_id, key = excluded.key, payload = excluded.payload,
            properties = excluded.properties, reason = excluded.reason, set_aside_at = excluded.set_aside_at;
    return true;
end
$walpost$;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
