// Package keeper is the small process that is the parent of everything, and
// the protocol it speaks with the controller.
//
// The keeper spawns, waits, signals trees of processes and keeps descriptors,
// labels and exit statuses, so that a controller that was killed, crashed or
// upgraded finds all of it again: [Run] is the process, [Connect] the
// controller's side. It holds no policy, parses no file a user wrote and
// listens on no address.
//
// Invariant: whatever a controller sends, the keeper lives; an exit is never
// missed and no signal is sent to a pid that may have been reused.
//
// It imports package proc and nothing else of this module, and must never
// import a floor above.
package keeper
