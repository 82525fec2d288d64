-- walpost 13/14: System B. The messages that each consumer has handled, so that one that comes again is recognised.
-- For the database of the consuming application; "walpost sql --inbox" prints it. Needs: CREATE on the database, or CREATE on
-- schema walpost where there is one; applied again: to own the tables. May be applied again. Whoever consumes needs SELECT, INSERT,
-- UPDATE and DELETE on both tables.
--
-- A consumer of a broker is handed a message at least once. It does its work once when the message id is written in the same
-- transaction as the work:
--
--   begin;
--   select walpost.inbox_claim('stock', '0198...', '');  -- false: handled before, or given up: leave the work out
--   update stock ...;                                  -- the work
--   commit;                                          -- and only now acknowledge to the broker
--
-- The third argument is where the id is unique: '' for UUIDs, the topic (without -partition-N) for numbers and other ids, which two
-- tables may both have. A claim whose source is '' counts for every source, and one with a source counts for a call without: so
-- what an earlier version of this file has claimed, which knew no source, still counts, and so do calls with two arguments. Once
-- it is known where all such claims come from, name it; or delete them once their messages cannot come again:
--   update walpost.inbox set source = 'persistent://public/default/outbox.order' where consumer = 'stock' and source = '';
--
-- A second consumer with the same message waits in inbox_claim for the first one's end, and is told then; also where one of the two
-- claims has a source and the other has none. For that each claim holds an advisory lock until its transaction ends, so a transaction
-- with thousands of claims needs a higher max_locks_per_transaction. In REPEATABLE READ and SERIALIZABLE the second one fails (40001), and
-- its transaction is to be tried again. One case is left there: a claim without source does not see one with a source that was committed
-- after its transaction began (two SERIALIZABLE ones fail then). In such transactions, name the source, or claim in the first statement.
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
    source     text not null default '',      -- where the id is unique: '' everywhere, else the topic
    primary key (consumer, id, source)
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
    source        text not null default '',
    primary key (consumer, id, source)
);

-- What an earlier version made: functions with other arguments, of which one depends on the column; jsonb; and tables without a
-- source, whose new primary keys take a moment in which nobody else can use them (some seconds for each ten million rows).
drop function if exists walpost.inbox_failed(text, text, text);
drop function if exists walpost.inbox_give_up(text, text, text, text, text, text, bytea, jsonb);
do $walpost$
declare
    old text;
    granted text := '';
    one record;
begin
    -- Who may call a function is kept for the one that takes its place.
    foreach old in array array['inbox_claim(text, text)', 'inbox_failed(text, text, text, boolean)',
                               'inbox_give_up(text, text, text, text, text, text, bytea, json)'] loop
        for one in
            select p.proname, a.grantee, a.is_grantable from pg_catalog.pg_proc p, pg_catalog.aclexplode(p.proacl) a
            where p.oid = to_regprocedure('walpost.' || old) and p.proacl is not null and a.privilege_type = 'EXECUTE'
        loop
            granted := granted || case when position(one.proname || ' from' in granted) = 0
                                       then format('revoke execute on function walpost.%s from public; ', one.proname) else '' end
                || format('grant execute on function walpost.%s to %s%s; ', one.proname,
                          case one.grantee when 0 then 'public' else one.grantee::regrole::text end,
                          case when one.is_grantable then ' with grant option' else '' end);
        end loop;
        execute 'drop function if exists walpost.' || old;
    end loop;
    perform set_config('walpost.inbox_granted', granted, false);
    foreach old in array array['inbox', 'inbox_poison'] loop
        if not exists (select from pg_catalog.pg_attribute
                       where attrelid = ('walpost.' || old)::regclass and attname = 'source' and not attisdropped) then
            execute format('alter table walpost.%1$I add column source text not null default %2$L,
                                drop constraint %3$I, add constraint %3$I primary key (consumer, id, source)', old, '', old || '_pkey');
        end if;
    end loop;
    if 'jsonb'::regtype = (select atttypid from pg_attribute
                           where attrelid = 'walpost.inbox_poison'::regclass and attname = 'properties') then
        alter table walpost.inbox_poison alter column properties type json;
    end if;
end
$walpost$;

-- True for a message that is new to the consumer: its work is to be done in this transaction.
create or replace function walpost.inbox_claim(consumer text, id text, source text default '') returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $walpost$
declare
    has_one_snapshot constant boolean := current_setting('transaction_isolation') in ('repeatable read', 'serializable');
    message constant bigint := hashtextextended(consumer || '/' || id, 0);
    has_waited boolean;
begin
    if coalesce(consumer, '') = '' then
        raise exception 'walpost.inbox_claim: consumer is null or empty'
            using errcode = 'invalid_parameter_value', column = 'consumer', hint = 'name the application that consumes';
    elsif coalesce(id, '') = '' then
        raise exception 'walpost.inbox_claim: id is null or empty'
            using errcode = 'invalid_parameter_value', column = 'id', hint = 'it is the message''s property "id"';
    elsif source is null then
        raise exception 'walpost.inbox_claim: source is null'
            using errcode = 'invalid_parameter_value', column = 'source', hint = 'it is the message''s topic, or empty where ids are UUIDs';
    end if;
    -- The primary key keeps two claims of one source apart. A claim without source and one with have different keys: the lock makes one
    -- wait for the other's end, and the next statement sees what that has committed. Claims of different sources share the lock.
    if source = '' then
        has_waited := not pg_try_advisory_xact_lock(message);
    else
        has_waited := not pg_try_advisory_xact_lock_shared(message);
    end if;
    if has_waited and source = '' then
        perform pg_advisory_xact_lock(message);
    elsif has_waited then
        perform pg_advisory_xact_lock_shared(message);
    end if;
    if has_waited and has_one_snapshot then
        -- The next statement would not see it.
        raise exception 'walpost.inbox_claim: another transaction was claiming this message'
            using errcode = 'serialization_failure', hint = 'try the transaction again';
    end if;
    if exists (
        select from walpost.inbox i
        where i.consumer = inbox_claim.consumer and i.id = inbox_claim.id
              and (i.source = '' or inbox_claim.source = '') and i.source <> inbox_claim.source
    ) then
        return false;
    end if;
    if has_one_snapshot and source <> '' then
        -- Fails where a claim without source was committed after the snapshot: an index entry conflicts although it is not visible.
        insert into walpost.inbox as i (consumer, id, source) values (inbox_claim.consumer, inbox_claim.id, '') on conflict do nothing;
        delete from walpost.inbox i where i.consumer = inbox_claim.consumer and i.id = inbox_claim.id and i.source = '';
    end if;
    insert into walpost.inbox as i (consumer, id, source) values (inbox_claim.consumer, inbox_claim.id, inbox_claim.source)
        on conflict do nothing;
    return found;
end
$walpost$;

-- Notes a failed attempt and gives back how many there were. In a transaction of its own, after the failed one; or before the
-- attempt, so that one which its process does not outlive counts, and then again with counted => true, for its reason. A standard body is
-- bound to what it names when it is made.
create or replace function walpost.inbox_failed(
    consumer text, id text, reason text, counted boolean default false, source text default ''
) returns integer
    language sql volatile
begin atomic
    insert into walpost.inbox_poison as p (consumer, id, source, attempts, reason)
        values (inbox_failed.consumer, inbox_failed.id, inbox_failed.source, 1, coalesce(inbox_failed.reason, 'unknown'))
        on conflict (consumer, id, source) do update
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
    properties json default '{}',
    source     text default ''
) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $walpost$
begin
    if not walpost.inbox_claim(consumer, id, source) then
        return false;
    end if;
    insert into walpost.inbox_poison as p (consumer, id, source, topic, message_id, key, payload, properties, reason, set_aside_at)
        values (inbox_give_up.consumer, inbox_give_up.id, inbox_give_up.source, coalesce(inbox_give_up.topic, ''), coalesce(inbox_give_up.message_id, ''),
                inbox_give_up.key, inbox_give_up.payload, coalesce(inbox_give_up.properties, '{}'),
                coalesce(inbox_give_up.reason, 'unknown'), now())
        on conflict on constraint inbox_poison_pkey do update
        set topic = excluded.topic, message_id = excluded.message_id, key = excluded.key, payload = excluded.payload,
            properties = excluded.properties, reason = excluded.reason, set_aside_at = excluded.set_aside_at;
    return true;
end
$walpost$;

-- The grants that the functions had under their earlier arguments.
do $walpost$
begin
    execute coalesce(current_setting('walpost.inbox_granted', true), '');
    perform set_config('walpost.inbox_granted', '', false);
end
$walpost$;
do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
