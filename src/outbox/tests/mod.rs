//! Extraction: rows of a real server, rows of an encoder, rows that are wrong.

mod golden;
mod properties;
mod router;
mod rows;
mod support;
mod tables;
