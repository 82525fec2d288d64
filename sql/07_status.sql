-- walpost 7/14: what became of each row of walpost.outbox, without a write for each.
-- Needs: CREATE on schema walpost, to own the tables. May be applied again.
--
--   pending    not known to be in its topic
--   sent       its receipt has come: it was marked, or the delivered snapshot of every slot that publishes the table shows its
--              transaction, and speaks of its partition
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
            -- "tables" says of which leaf tables (partitions, children) "delivered" speaks: of those with null. With an array: of what the
            -- snapshot in it shows, if there is one; with a text: the same, for one that did not belong to the outbox at that time.
            select coalesce(bool_and(coalesce(pg_visible_in_snapshot(o.txid,
                case when p.tables is null then p.delivered
                     else case jsonb_typeof(p.tables -> o.tableoid::text)
                          when 'null' then p.delivered
                          when 'array' then (p.tables -> o.tableoid::text ->> 0)::pg_snapshot
                          when 'string' then (p.tables ->> o.tableoid::text)::pg_snapshot end end), false)), false)
            from walpost.progress p
            where p.tables is null or p.slot = any (array(
                select h.slot from walpost.progress h, jsonb_each(h.tables) l
                where jsonb_typeof(l.value) in ('null', 'array') and l.key::oid in (
                    with recursive tree as (
                        select 'walpost.outbox'::regclass::oid as leaf
                        union select i.inhrelid from pg_inherits i join tree on i.inhparent = tree.leaf)
                    select leaf from tree)))
        ) then 'sent'
        else 'pending'
    end as status,
    s.reason, s.attempts
from walpost.outbox o
left join lateral (
    select g.state, g.reason, g.attempts from walpost.straggler g
    where g.outbox = 'walpost.outbox' and g.id = o.id::text
      -- Which of the rows with this id, where that is known.
      and (g.row_seq is null or g.row_seq = o.seq) and (g.row_txid is null or g.row_txid = o.txid::text::bigint)
    order by g.number limit 1
) s on true;

do $walpost$ begin perform pg_catalog.set_config('search_path', pg_catalog.current_setting('walpost.search_path'), false); end $walpost$;
