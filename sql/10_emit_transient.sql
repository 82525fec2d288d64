-- walpost 10/14: events without a table. walpost.emit_transient writes the event into the write-ahead log alone, with
-- pg_logical_emit_message; it takes the same route as a row, in its transaction's place and order.
-- Needs: CREATE on schema walpost. Before the slot. May be applied again.
--
-- Same guarantees as a row while there is a replication slot: published at least once, once where the broker deduplicates, in
-- commit order per key together with rows, never when rolled back, kept in walpost.straggler when it cannot be published. But
-- nothing of it is in a table: what was emitted before the slot was made, or between a slot that was lost and the next, is
-- gone; polling (WALPOST_MODE=poll) never sees it; walpost.outbox_status, WALPOST_AFTER_PUBLISH and WALPOST_RETENTION do not
-- concern it.
--
-- The envelope is a JSON object with these members, of which the log's prefix 'walpost' makes an event:
--   id, aggregateid                      texts, needed
--   aggregatetype, type, topic           texts
--   payload | payload_text | payload_base64   one of them: any JSON, whose text is the message's bytes as they stand here; a
--                                        text; any bytes. None of them: a tombstone
--   headers                              an object, as the column
--   deliver_at, created_at               texts, ISO 8601: 2026-01-02T03:04:05.678+00:00, or as Postgres prints a timestamptz
-- null stands for an absent member, except that a payload of null is the JSON text null. Any other member is an error.
-- Any application may write it itself: select pg_logical_emit_message(true, 'walpost', '{...}'). What is no such envelope is
-- kept as a dead straggler. A message that is not transactional is refused: walpost logs, counts and skips it.
--
-- Whoever may connect may call pg_logical_emit_message, and so publish. Where not everybody should, as a superuser (on 17 and
-- later each of the two has one more argument, boolean):
--   revoke execute on function pg_logical_emit_message(boolean, text, text), pg_logical_emit_message(boolean, text, bytea) from public;
--   grant execute on function pg_logical_emit_message(boolean, text, bytea) to walpost_producer;
--
-- Behind a /*:name*/ mark stands what "walpost init" and "walpost sql" fill in; edit it when you apply this by hand.

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

do $walpost$
declare
    old regprocedure;
begin
    -- One that took another type of payload would make calls ambiguous.
    for old in
        select oid from pg_proc where pronamespace = 'walpost'::regnamespace and proname = 'emit_transient'
    loop
        execute format('drop function %s', old);
    end loop;
end
$walpost$;

create function walpost.emit_transient(
    aggregatetype text,                       -- the arguments are those of walpost.emit
    aggregateid   text,
    type          text,
    payload       /*:payload*/ json,
    headers       jsonb default null,
    topic         text default null,
    deliver_at    timestamptz default null
) returns uuid
    language plpgsql volatile parallel unsafe
    set search_path = pg_catalog, pg_temp
as $walpost$
declare
    message_id uuid;
    wrong text;
    why text;
    envelope text;
    -- One partition of another topic; Pulsar reads the digits of all scripts.
    a_partition constant text := E'-partition-[0-9\\u0660-\\u0669\\u06f0-\\u06f9\\u07c0-\\u07c9\\u0966-\\u096f\\u09e6-\\u09ef\\u0a66-\\u0a6f\\u0ae6-\\u0aef\\u0b66-\\u0b6f\\u0be6-\\u0bef'
        '\\u0c66-\\u0c6f\\u0ce6-\\u0cef\\u0d66-\\u0d6f\\u0de6-\\u0def\\u0e50-\\u0e59\\u0ed0-\\u0ed9\\u0f20-\\u0f29\\u1040-\\u1049\\u1090-\\u1099'
        '\\u17e0-\\u17e9\\u1810-\\u1819\\u1946-\\u194f\\u19d0-\\u19d9\\u1a80-\\u1a89\\u1a90-\\u1a99\\u1b50-\\u1b59\\u1bb0-\\u1bb9\\u1c40-\\u1c49'
        '\\u1c50-\\u1c59\\ua620-\\ua629\\ua8d0-\\ua8d9\\ua900-\\ua909\\ua9d0-\\ua9d9\\ua9f0-\\ua9f9\\uaa50-\\uaa59\\uabf0-\\uabf9\\uff10-\\uff19]+$';
begin
    select w.name, w.why into wrong, why from (values
        (1, 'aggregatetype', aggregatetype is null, 'is null, and every event needs it'),
        (2, 'aggregateid', aggregateid is null, 'is null, and every event needs it'),
        (3, 'type', type is null, 'is null, and every event needs it'),
        (4, 'aggregatetype', aggregatetype = '', 'is empty'),
        (5, 'type', type = '', 'is empty'),
        (6, 'headers', jsonb_typeof(headers) <> 'object', 'is no JSON object'),
        (7, 'deliver_at', not isfinite(deliver_at), 'is infinite'),
        (8, 'topic', topic !~ '^((persistent://)?([-A-Za-z0-9_=:.]+/){2})?[^/]+$'
            or topic ~ E'(^|/)[.][.]?(/|$)|[\\u0001-\\u0020]$' or topic ~ a_partition, 'is no topic name'),
        (9, 'aggregatetype', topic is null and (aggregatetype ~ E'/|[\\u0001-\\u0020]$' or aggregatetype ~ a_partition),
            'cannot stand in a topic name')
    ) as w (number, name, is_wrong, why) where w.is_wrong order by w.number limit 1;
    if found then
        raise exception 'walpost.emit_transient: % %', wrong, why
            using errcode = case when why like 'is null%' then 'null_value_not_allowed' else 'invalid_parameter_value' end,
                  column = wrong;
    end if;

    -- Without native uuidv7() (before 18) or walpost.uuidv7() (no walpost.outbox) ids do not rise with time.
    if to_regprocedure('pg_catalog.uuidv7()') is not null then
        message_id := uuidv7();
    elsif to_regprocedure('walpost.uuidv7()') is not null then
        message_id := walpost.uuidv7();
    else
        message_id := gen_random_uuid();
    end if;
    -- Payload and headers go in behind: json_strip_nulls would take their nulls too.
    envelope := rtrim(json_strip_nulls(json_build_object(
        'id', message_id, 'aggregatetype', aggregatetype, 'aggregateid', aggregateid, 'type', type, 'topic', topic,
        'deliver_at', deliver_at, 'created_at', clock_timestamp()
    ))::text, '}');
    if headers is not null then
        envelope := envelope || ',"headers":' || headers::text;
    end if;
    -- The branches not taken are never planned, so a cast that this type has not does no harm.
    if payload is null then
        null;
    elsif pg_typeof(payload) = 'bytea'::regtype then
        envelope := envelope || ',"payload_base64":"' || translate(encode(payload::bytea, 'base64'), E'\n', '') || '"';
    elsif pg_typeof(payload) = 'text'::regtype then
        envelope := envelope || ',"payload_text":' || to_json(payload::text)::text;
    else
        envelope := envelope || ',"payload":' || payload::text;
    end if;
    -- Bytes: the content is not converted from the database's encoding on its way, and the envelope is UTF-8.
    perform pg_logical_emit_message(true, 'walpost', convert_to(envelope || '}', 'UTF8'));
    return message_id;
end
$walpost$;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
