package daemon

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/logs"
)

// keeperWait bounds a call to the keeper that others wait for.
const keeperWait = time.Second

// relayName is what the keeper knows the second pipe of an instance's stream
// by. An instance has one run at a time, so it needs no more.
func relayName(id int, stream string) string { return fmt.Sprintf("relay-%d-%s", id, stream) }

// relay gives the logs a second pipe for a program that writes much, of which
// the keeper has a copy. It implements [logs.Options.Relay].
func (d *Daemon) relay(src logs.Source) (*os.File, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	_ = unix.Close(p[1]) // opened again by who needs it
	r := os.NewFile(uintptr(p[0]), "relay")
	ctx, cancel := context.WithTimeout(context.Background(), keeperWait)
	defer cancel()
	if err := d.keeper.Put(ctx, relayName(src.ID, src.Stream), nil, r); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (d *Daemon) unrelay(src logs.Source) {
	ctx, cancel := context.WithTimeout(context.Background(), keeperWait)
	defer cancel()
	_ = d.keeper.Drop(ctx, relayName(src.ID, src.Stream))
}
