package daemon

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/logs"
)

// keeperWait bounds a call to the keeper that others wait for.
const keeperWait = time.Second

// relayName is what the keeper knows the second pipe of a run's stream by. An
// instance may have two runs, so the inode of the first pipe goes into it.
func relayName(id int, stream string, pipe uint64) string {
	return fmt.Sprintf("relay-%d-%s-%d", id, stream, pipe)
}

// pipeInode is 0 where there is no pipe.
func pipeInode(f *os.File) uint64 {
	if f == nil {
		return 0
	}
	st, err := f.Stat()
	if err != nil {
		return 0
	}
	sys, _ := st.Sys().(*syscall.Stat_t)
	if sys == nil {
		return 0
	}
	return sys.Ino
}

// relay gives the logs a second pipe for a program that writes much, of which
// the keeper has a copy. It implements [logs.Options.Relay].
func (d *Daemon) relay(src logs.Source, pipe uint64) (*os.File, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	_ = unix.Close(p[1]) // opened again by who needs it
	r := os.NewFile(uintptr(p[0]), "relay")
	ctx, cancel := context.WithTimeout(context.Background(), keeperWait)
	defer cancel()
	if err := d.keeper.Put(ctx, relayName(src.ID, src.Stream, pipe), nil, r); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (d *Daemon) unrelay(src logs.Source, pipe uint64) {
	ctx, cancel := context.WithTimeout(context.Background(), keeperWait)
	defer cancel()
	_ = d.keeper.Drop(ctx, relayName(src.ID, src.Stream, pipe))
}
