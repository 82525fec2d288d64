//! Any payload decodes or is refused; what decodes can be read to its end.

#![no_main]

use libfuzzer_sys::fuzz_target;
use walpost::pgoutput::{Message, RelationCache, parse};

fuzz_target!(|payload: &[u8]| {
    match parse(payload) {
        Ok(Message::Insert { tuple, .. }) => {
            assert_eq!(tuple.columns().count(), tuple.len());
        }
        Ok(Message::Relation(relation)) => {
            let id = relation.id;
            let mut cache = RelationCache::new();
            assert!(cache.insert(relation));
            assert!(cache.get(id).is_some_and(|r| !r.to_string().is_empty()));
        }
        Ok(Message::Type {
            id,
            namespace,
            name,
        }) => {
            RelationCache::new().note_type(id, namespace, name);
        }
        Ok(_) => {}
        Err(error) => {
            assert!(error.offset() <= payload.len());
            assert!(!error.to_string().is_empty());
        }
    }
});
