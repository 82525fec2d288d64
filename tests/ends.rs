//! Both ends against real servers: System A's `walpost.emit` and `walpost.emit_transient`, System B's inbox.

#[path = "ends/demo.rs"]
mod demo;
#[path = "ends/emit.rs"]
mod emit;
#[path = "ends/inbox.rs"]
mod inbox;
mod support;
#[path = "ends/transient.rs"]
mod transient;
