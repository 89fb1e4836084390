//! End to end: real server processes, the real command line, the real kernel.
// Where clippy takes helpers for parts of tests, too.
#![cfg(test)]

mod ahead;
mod attach;
mod bounds;
mod buckets;
mod changes;
mod cli;
mod connection;
mod criu;
mod damaged_stores;
mod documents;
mod durability;
mod firecracker;
mod gc;
mod hostile_requests;
mod huge;
mod lying;
mod map;
mod model;
mod mount;
mod origins;
mod pressure;
mod progress;
mod push;
mod python;
mod reverse_proxies;
mod scale;
mod selftests;
mod serve;
mod session;
mod successor;
mod threads;
mod trace;
mod ways_out;
mod working_set;
