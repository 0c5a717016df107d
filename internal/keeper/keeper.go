package keeper

import (
	"context"
	"os"
)

// EnvFD is the environment variable that tells the controller the number of
// its socket.
const EnvFD = "REMUDA_KEEPER_FD"

// Command is a program to run.
type Command struct {
	Path string   // absolute
	Args []string // Args[0] included; empty means {Path}
	Env  []string // nil: the keeper's own, less what the service manager meant for it
}

// Options configure [Run]. Controller.Path and Tag are required.
type Options struct {
	Controller Command
	// Tag names the instance (one daemon home): [proc.ValidTag]. Two keepers
	// with one tag must never run at once; the caller holds the lock.
	Tag string
	// Log takes the keeper's own lines and the controller's stdout and
	// stderr; nil is the keeper's stderr.
	Log *os.File
}

// Run is the keeper process: it starts with a [proc.Sweep] of what an earlier
// keeper of the same tag left, becomes child subreaper, starts the controller,
// and returns when a controller asked for shutdown (nil), when ctx ended (the
// processes are then killed), or with an error if it could not begin. It takes
// over signals and child reaping of the whole process: nothing else in the
// process may start or wait for children.
func Run(ctx context.Context, opts Options) error { return nil }
