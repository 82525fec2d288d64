-- walpost 9/14: System A in one line. walpost.emit checks its arguments and inserts the row; the plain INSERT stays equally good.
-- Needs: CREATE on schema walpost, walpost.outbox as 03_outbox.sql makes it. Before the slot. May be applied again.
--
--   select walpost.emit('order', 'customer-7', 'OrderPlaced', '{"order": 1}');
--   select walpost.emit('order', 'customer-7', 'OrderPlaced', '{"order": 1}', headers => '{"traceparent": "00-..."}',
--                       deliver_at => now() + interval '5 minutes');
--
-- Gives back the message id. A wrong argument is an error that names it (SQLSTATE 22004: null, 22023: any other; the argument
-- is also the error's COLUMN field), so that the business transaction fails where the mistake was made, instead of leaving a
-- message behind that no topic takes. It runs with its caller's rights: whoever may insert may emit. Its search_path is its own:
-- a trigger on walpost.outbox runs with it, too, and needs qualified names or a search_path of its own.

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

-- One that took another type of payload would make calls ambiguous.
do $walpost$
declare
    old regprocedure;
begin
    for old in
        select p.oid from pg_proc p join pg_attribute a on a.attrelid = 'walpost.outbox'::regclass and a.attname = 'payload'
        where p.pronamespace = 'walpost'::regnamespace and p.proname = 'emit' and p.proargtypes[3] <> a.atttypid
    loop
        execute format('drop function %s', old);
    end loop;
end
$walpost$;

create or replace function walpost.emit(
    aggregatetype text,                       -- routes to a topic
    aggregateid   text,                       -- message key: order is kept per key
    type          text,                       -- event type
    payload       walpost.outbox.payload%type,                          -- the bytes of the message; null = tombstone
    headers       jsonb default null,         -- string properties, {"name": "value"}
    topic         text default null,          -- overrides the routing template
    deliver_at    timestamptz default null    -- delayed delivery
) returns walpost.outbox.id%type
    language plpgsql volatile parallel unsafe
    set search_path = pg_catalog, pg_temp
as $walpost$
declare
    -- "id" alone would be the column as well.
    message_id walpost.outbox.id%type;
    wrong text;
    -- One partition of another topic; Pulsar reads the digits of all scripts.
    a_partition constant text := E'-partition-[0-9\\u0660-\\u0669\\u06f0-\\u06f9\\u07c0-\\u07c9\\u0966-\\u096f\\u09e6-\\u09ef\\u0a66-\\u0a6f\\u0ae6-\\u0aef\\u0b66-\\u0b6f\\u0be6-\\u0bef'
        '\\u0c66-\\u0c6f\\u0ce6-\\u0cef\\u0d66-\\u0d6f\\u0de6-\\u0def\\u0e50-\\u0e59\\u0ed0-\\u0ed9\\u0f20-\\u0f29\\u1040-\\u1049\\u1090-\\u1099'
        '\\u17e0-\\u17e9\\u1810-\\u1819\\u1946-\\u194f\\u19d0-\\u19d9\\u1a80-\\u1a89\\u1a90-\\u1a99\\u1b50-\\u1b59\\u1bb0-\\u1bb9\\u1c40-\\u1c49'
        '\\u1c50-\\u1c59\\ua620-\\ua629\\ua8d0-\\ua8d9\\ua900-\\ua909\\ua9d0-\\ua9d9\\ua9f0-\\ua9f9\\uaa50-\\uaa59\\uabf0-\\uabf9\\uff10-\\uff19]+$';
begin
    -- All is well: one expression. Otherwise the same is asked once more, piece by piece.
    if (aggregatetype <> '' and aggregateid is not null and type <> ''
        and (headers is null or jsonb_typeof(headers) = 'object')
        and (deliver_at is null or isfinite(deliver_at))
        and case
                -- The local name of a topic is kept as it is; what is refused says src/outbox/topic.rs.
                when topic is null then strpos(aggregatetype, '/') = 0 and aggregatetype !~ E'[\\u0001-\\u0020]$'
                    and (strpos(aggregatetype, '-partition-') = 0 or aggregatetype !~ a_partition)
                else topic ~ '^((persistent://)?([-A-Za-z0-9_=:.]+/){2})?[^/]+$'
                    and topic !~ E'(^|/)[.][.]?(/|$)|[\\u0001-\\u0020]$'
                    and (strpos(topic, '-partition-') = 0 or topic !~ a_partition)
            end) is true
    then
        insert into walpost.outbox (aggregatetype, aggregateid, type, payload, headers, topic, deliver_at)
            values (emit.aggregatetype, emit.aggregateid, emit.type, emit.payload, emit.headers, emit.topic, emit.deliver_at)
            returning outbox.id into message_id;
        return message_id;
    end if;

    wrong := case
        when aggregatetype is null then 'aggregatetype' when aggregateid is null then 'aggregateid' when type is null then 'type'
    end;
    if wrong is not null then
        raise exception 'walpost.emit: % is null, and every event needs it', wrong
            using errcode = 'null_value_not_allowed', column = wrong;
    elsif aggregatetype = '' then
        raise exception 'walpost.emit: aggregatetype is empty'
            using errcode = 'invalid_parameter_value', column = 'aggregatetype',
                  hint = 'it says what the event is about and routes it, such as ''order''';
    elsif type = '' then
        raise exception 'walpost.emit: type is empty'
            using errcode = 'invalid_parameter_value', column = 'type', hint = 'it says what happened, such as ''OrderPlaced''';
    elsif jsonb_typeof(headers) <> 'object' then
        raise exception 'walpost.emit: headers is a JSON %, not an object', jsonb_typeof(headers)
            using errcode = 'invalid_parameter_value', column = 'headers', hint = 'such as ''{"traceparent": "00-..."}''';
    elsif not isfinite(deliver_at) then
        raise exception 'walpost.emit: deliver_at is infinite'
            using errcode = 'invalid_parameter_value', column = 'deliver_at', hint = 'null delivers at once';
    elsif topic is not null then
        raise exception 'walpost.emit: topic is no topic name: %', quote_literal(left(topic, 200))
            using errcode = 'invalid_parameter_value', column = 'topic',
                  hint = 'a name alone or behind persistent://tenant/namespace/ (both of A-Z a-z 0-9 - _ = : .), without / and without a blank at its end, not one partition of a topic';
    end if;
    raise exception 'walpost.emit: aggregatetype cannot stand in a topic name: %', quote_literal(left(aggregatetype, 200))
        using errcode = 'invalid_parameter_value', column = 'aggregatetype',
              hint = 'it may not have a / nor end in a blank or in -partition-<number>; or name a topic';
end
$walpost$;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
