-- walpost 4/14: the publication: which tables' inserts the replication slot hands out.
-- Needs: CREATE on the database and to own the tables; to change one that is there: to own it. May be applied again.
--
-- Behind a /*:name*/ mark stands what "walpost init" and "walpost sql" fill in; edit it when you apply this by hand.

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

do $walpost$
declare
    publication constant text := /*:publication*/ 'walpost';
    tables constant text[] := array[/*:tables*/ 'walpost.outbox'];  -- as in SQL: 'schema.table', '"Schema"."Table"'
    published text;
    one text;
begin
    if not exists (select from pg_publication where pubname = publication) then
        -- Rows of a partition carry the name of the partitioned table, which is the one that walpost knows.
        execute format(
            'create publication %I with (publish = ''insert'', publish_via_partition_root = true)',
            publication
        );
    end if;

    -- One that was there before may lack inserts. What else it publishes is left to its other readers.
    select concat_ws(
            ', ',
            'insert',
            case when pubupdate then 'update' end,
            case when pubdelete then 'delete' end,
            case when pubtruncate then 'truncate' end
        )
        into published
        from pg_publication
        where pubname = publication and not (pubinsert and pubviaroot);
    if found then
        execute format(
            'alter publication %I set (publish = %L, publish_via_partition_root = true)',
            publication, published
        );
    end if;

    -- The view also knows FOR ALL TABLES and FOR TABLES IN SCHEMA.
    foreach one in array tables loop
        if not exists (
            select from pg_publication_tables p
            join pg_namespace n on n.nspname = p.schemaname
            join pg_class c on c.relnamespace = n.oid and c.relname = p.tablename
            where p.pubname = publication and c.oid = one::regclass
        ) then
            execute format('alter publication %I add table %s', publication, one::regclass);
        end if;
    end loop;
end
$walpost$;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
