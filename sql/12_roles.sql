-- walpost 12/14: two roles to grant, so that neither end needs more than it does. Prints nothing secret and makes no login.
-- Needs: CREATEROLE, and to own what is in schema walpost (or a superuser). After the slot. May be applied again.
--
--   walpost_producer    may insert into walpost.outbox, with or without walpost.emit, and emit_transient; reads nothing but ids
--   walpost_connector   may do what "walpost run" does, in the mode filled in below, and nothing else
--
-- Roles are known to the whole cluster; what is granted here, to this database. To use them:
--   grant walpost_producer to shop;                                     -- the application's role
--   create role walpost login replication password '...';               -- replication is an attribute: no membership gives it
--   grant walpost_connector to walpost;
-- and WALPOST_POSTGRES_URL=postgres://walpost@.... On Amazon RDS: grant rds_replication to walpost, instead of the attribute.
-- The replication connection also has to be let in by pg_hba.conf (a line for the database, not for "replication").
--
-- Not granted, because only an owner has it: making and dropping partitions. For a partitioned outbox grant the owner's role to
-- the connector. "walpost init" stays with the owner, or a superuser.
--
-- Behind a /*:name*/ mark stands what "walpost init" and "walpost sql" fill in; edit it when you apply this by hand.

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

do $walpost$
declare
    mode constant text := /*:mode*/ 'keep';   -- WALPOST_AFTER_PUBLISH
    retention constant boolean := /*:retention*/ false;                 -- whether WALPOST_RETENTION is set
    tables constant text[] := array[/*:tables*/ 'walpost.outbox'];  -- as in SQL: 'schema.table', '"Schema"."Table"'
    one regclass;
    missing text;
begin
    foreach missing in array array['walpost_producer', 'walpost_connector'] loop
        if not exists (select from pg_roles where rolname = missing) then
            -- Two databases of a cluster at the same time: one of them is first.
            begin
                execute format('create role %I nologin', missing);
            exception when duplicate_object or unique_violation then
                null;
            end;
        end if;
    end loop;

    grant usage on schema walpost to walpost_producer, walpost_connector;
    -- Not txid and seq, which say what is delivered, and not sent_at. The id is for INSERT ... RETURNING id.
    if to_regclass('walpost.outbox') = any (tables::regclass[]) then
        grant insert (id, aggregatetype, aggregateid, type, payload, topic, headers, deliver_at, created_at), select (id)
            on walpost.outbox to walpost_producer;
    end if;

    grant select, insert, update on walpost.progress to walpost_connector;
    grant select, insert, update, delete on walpost.straggler to walpost_connector;
    if to_regclass('walpost.left_undone') is not null then
        grant select, insert, update on walpost.left_undone to walpost_connector;
    end if;
    if to_regclass('walpost.discarded') is not null then
        grant select, insert, delete on walpost.discarded to walpost_connector;
    end if;
    if to_regclass('walpost.after_publish') is not null then
        grant select, insert, update on walpost.after_publish to walpost_connector;
    end if;
    -- What was right in another mode is not for ever.
    foreach one in array tables::regclass[] loop
        execute format('revoke all on %s from walpost_connector', one);
        execute format('grant select on %s to walpost_connector', one);
        if mode = 'mark' then
            execute format('grant update (sent_at) on %s to walpost_connector', one);
        end if;
        if mode = 'delete' or retention then
            execute format('grant delete on %s to walpost_connector', one);
        end if;
        execute format(
            'grant usage on schema %s to walpost_connector',
            (select relnamespace::regnamespace::text from pg_class where oid = one)
        );
    end loop;
end
$walpost$;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
