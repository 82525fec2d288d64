-- walpost 2/14: message ids that rise with time, as UUID version 7 (RFC 9562, section 5.7).
-- Needs: CREATE on schema walpost. May be applied again. Postgres 18 has uuidv7() of its own: nothing is made there.
--
--   48 bits  milliseconds since 1970
--    4 bits  version, 7
--   12 bits  fraction of the millisecond in 1/4096, so that ids of one session rise (section 6.2, method 3)
--    2 bits  variant, binary 10
--   62 bits  random
--
-- Milliseconds and fraction are one 60-bit number, 15 hexadecimal digits; the version digit goes in behind the 12th.
-- The last 16 digits are those of a random UUID (version 4), whose variant is the same. A single expression, so that
-- the planner puts it into the insert itself instead of calling a function. A standard body is bound to what it names when it is
-- made, so it needs no search_path of its own (which would keep the planner from doing so).

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

do $walpost$
begin
    if to_regprocedure('pg_catalog.uuidv7()') is null and to_regprocedure('walpost.uuidv7()') is null then
        create function walpost.uuidv7() returns uuid
            language sql volatile parallel safe
            return (
                overlay(
                    lpad(to_hex((extract(epoch from clock_timestamp()) * 4096000)::bigint), 15, '0')
                    placing '7' from 13 for 0
                )
                || substring(gen_random_uuid()::text from 20)
            )::uuid;
    end if;
end
$walpost$;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
