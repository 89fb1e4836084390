//! End to end: real server processes, the real command line, the real kernel.

mod map;
