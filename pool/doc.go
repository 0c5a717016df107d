// Package pool spreads tasks over worker processes that are reused, watched and
// replaced.
//
// A worker is any program that speaks one of four protocols: frames (the SDKs
// in Go, Node and Python; docs/worker-protocol.md), JSON lines on its standard
// input and output, Node's own child_process channel, or none at all (a process
// per task). [Pool.Do] hands over one task and waits for its end.
//
// Invariants: every task ends exactly once, in a result or a typed error,
// whatever becomes of its worker; a worker that breaks its protocol, does not
// give up a task in time or dies costs the tasks that it has, and no other; no
// lock is held across I/O; an idle pool has no timer that ticks.
//
// The package must never know queues that outlive it, HTTP or configuration
// files. Restarts are supervise's, processes proc's, channels ipc's.
package pool
