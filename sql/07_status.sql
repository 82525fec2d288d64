-- walpost 7/14: what became of each row of walpost.outbox, without a write for each.
-- Needs: CREATE on schema walpost, to own the tables. May be applied again.
--
--   pending    not known to be in its topic
--   sent       its receipt has come: it was marked, or its transaction is visible in every slot's delivered snapshot
--   retrying   it could not be published, or waits behind such a one, and will be tried again
--   dead       it will not be tried again by itself: see "walpost stragglers"
--
-- A row becomes "sent" up to WALPOST_SCAN_INTERVAL after its receipt, never before it.

-- Names mean what Postgres itself has, whatever somebody else has made in "public". The end of the file puts the setting back.
do $walpost$ begin
    perform pg_catalog.set_config('walpost.search_path', pg_catalog.current_setting('search_path'), false),
            pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);
end $walpost$;

create or replace view walpost.outbox_status as
select
    o.id, o.aggregatetype, o.aggregateid, o.type, o.created_at, o.seq, o.txid, o.sent_at,
    case
        when s.state = 'dead' then 'dead'
        when s.state is not null then 'retrying'
        when o.sent_at is not null then 'sent'
        when (
            select coalesce(bool_and(coalesce(pg_visible_in_snapshot(o.txid, p.delivered), false)), false)
            from walpost.progress p
        ) then 'sent'
        else 'pending'
    end as status,
    s.reason, s.attempts
from walpost.outbox o
left join lateral (
    select g.state, g.reason, g.attempts from walpost.straggler g
    where g.outbox = 'walpost.outbox' and g.id = o.id::text
    order by g.number limit 1
) s on true;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
