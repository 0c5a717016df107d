// Package ipc carries tasks to worker processes and their answers back.
//
// [Conn] is the parent's end of one worker's channel, and there are three of
// them: [NewFrames] speaks the binary protocol of docs/worker-protocol.md over
// a Unix stream socket, [NewJSONLines] a JSON value a line over the worker's
// standard input and output, [NewNode] the channel of Node's own child_process,
// with messages that expect no answer and handles both ways.
// [Channel] is the frame layer alone, which the worker's side stands on too.
// Descriptors go along with tasks and answers. [Topics] is a bus of messages that
// expect no answer, for workers and others.
//
// Invariants: nothing a worker writes can make the parent block, panic or hold
// more than the bound it was given; a request that was started ends exactly
// once, with an answer or an error; one goroutine reads a descriptor, one at a
// time writes it, and no lock is held across either.
//
// The package must never start or signal a process, decide what becomes of a
// worker that misbehaves, or know pools.
package ipc
