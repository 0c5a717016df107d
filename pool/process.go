package pool

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"

	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/proc"
)

// starter starts workers.
type starter struct {
	o   Options
	run string // makes the keys of this pool's runs its own
	seq atomic.Uint64
}

// framesFD is the descriptor of a worker's channel.
const framesFD = 3

func (s *starter) spec(slot int, files []*os.File, env []string) proc.Spec {
	return proc.Spec{
		Key:   s.o.Name + "-" + s.run + "-" + strconv.Itoa(slot) + "-" + strconv.FormatUint(s.seq.Add(1), 36),
		Path:  s.o.Command[0],
		Args:  s.o.Command,
		Env:   append(s.o.Env[:len(s.o.Env):len(s.o.Env)], env...),
		Dir:   s.o.Dir,
		Files: files,
	}
}

// handles says whether a worker needs a channel of Node's to get files: one of
// frames that is a program of Node.
func (s *starter) handles() bool {
	switch filepath.Base(s.o.Command[0]) {
	case "node", "nodejs":
		return s.o.Protocol == Frames
	}
	return false
}

// channel starts a worker that has a channel.
func (s *starter) channel(ctx context.Context, slot int) (proc.Process, ipc.Conn, error) {
	var (
		opts   = ipc.Options{MaxMessage: s.o.MaxMessage, Concurrency: s.o.Concurrency, Topics: s.o.Topics, Shared: s.o.SharedMemory, HealthCheck: s.o.Heartbeat > 0}
		files  = []*os.File{nil, s.o.Stdout, s.o.Stderr}
		theirs []*os.File
		ours   []*os.File
		env    []string
	)
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
	}()
	fail := func(err error) (proc.Process, ipc.Conn, error) {
		for _, f := range ours {
			f.Close()
		}
		return nil, nil, err
	}
	if s.o.Protocol == JSONLines {
		in, to, err := os.Pipe()
		if err != nil {
			return fail(fmt.Errorf("pool: make the worker's standard input: %w", err))
		}
		theirs, ours = append(theirs, in), append(ours, to)
		from, out, err := os.Pipe()
		if err != nil {
			return fail(fmt.Errorf("pool: make the worker's standard output: %w", err))
		}
		theirs, ours = append(theirs, out), append(ours, from)
		files = []*os.File{in, out, s.o.Stderr}
	} else {
		parent, child, err := ipc.Pair()
		if err != nil {
			return fail(err)
		}
		theirs, ours = append(theirs, child), append(ours, parent)
		files = append(files, child)
		if s.o.Protocol == Node {
			env = ipc.NodeEnv(framesFD)
		} else {
			env = []string{ipc.FDVar + "=" + strconv.Itoa(framesFD)}
		}
		if s.handles() {
			parent, child, err := ipc.Pair()
			if err != nil {
				return fail(err)
			}
			theirs, ours = append(theirs, child), append(ours, parent)
			files, env = append(files, child), append(env, ipc.NodeEnv(framesFD+1)...)
			opts.NodeChannel = parent
		}
	}
	pr, err := s.o.Spawner.Spawn(ctx, s.spec(slot, files, env))
	if err != nil {
		return fail(err)
	}
	var conn ipc.Conn
	switch s.o.Protocol {
	case JSONLines:
		conn, err = ipc.NewJSONLines(ours[0], ours[1], opts)
	case Node:
		conn, err = ipc.NewNode(ours[0], opts)
	default:
		conn, err = ipc.NewFrames(ours[0], opts)
	}
	if err != nil {
		// Not seen to happen: the descriptors are new and open.
		kill, cancel := context.WithTimeout(context.Background(), killWait)
		defer cancel()
		_ = pr.KillTree(kill)
		if wait(pr.Done(), killWait) {
			_ = pr.Release()
		}
		return fail(err)
	}
	return pr, conn, nil
}
