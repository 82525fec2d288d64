-- walpost 1/14: the schema.
-- Needs: CREATE on the database. May be applied again.

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

do $walpost$
begin
    -- "create schema if not exists" asks for CREATE on the database even when there is nothing to do.
    if to_regnamespace('walpost') is null then
        create schema walpost;
    end if;
end
$walpost$;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
