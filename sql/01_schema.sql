-- walpost 1/13: the schema.
-- Needs: CREATE on the database. May be applied again.

do $walpost$
begin
    -- "create schema if not exists" asks for CREATE on the database even when there is nothing to do.
    if to_regnamespace('walpost') is null then
        create schema walpost;
    end if;
end
$walpost$;
