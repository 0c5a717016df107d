package keeper

import (
	"context"
	"errors"
	"os"
	"syscall"
	"time"

	"github.com/remuda-dev/remuda/proc"
)

// ErrGone is returned by every method once the keeper, or the connection to
// it, is gone. Processes' Done channels are then not closed: see [Client.Done].
var ErrGone = errors.New("keeper: the keeper process is gone")

// ErrBusy is returned by [Client.Shutdown] without force while processes live.
var ErrBusy = errors.New("keeper: processes are still running")

// Client is the controller's connection to the keeper. It implements
// [proc.Spawner]. Its methods may be called concurrently; requests are
// pipelined. One goroutine reads for all processes.
type Client struct{}

var _ proc.Spawner = (*Client)(nil)

// Inventory is what the keeper had when the controller connected.
type Inventory struct {
	Keeper   proc.ID
	Tag      string    // instance tag
	Protocol int       // version agreed upon
	Started  time.Time // of the keeper
	Restarts int       // controllers started before this one
	Cgroup   string    // how runs are tracked, as [proc.Launcher.Describe] says it
	Memory   string    // where memory limits come from, as [proc.Launcher.Describe] says it
	// Notice tells what went wrong with an earlier controller (the new binary
	// of an upgrade that did not come up, say); "" where nothing did.
	Notice    string
	Processes []Adopted // those whose exit was not forgotten, oldest first
	Stored    []Stored  // descriptors put by [Client.Put], by name
}

// Adopted is a process that an earlier controller spawned.
type Adopted struct {
	*Process
	// Files are copies of the kept descriptors by name; the caller owns them.
	Files map[string]*os.File
}

// Stored is an entry of the descriptor store.
type Stored struct {
	Name  string
	Label []byte
	File  *os.File // a copy; the caller owns it
}

// Process is a process under the keeper. It implements [proc.Process].
type Process struct{}

var _ proc.Process = (*Process)(nil)

// Connect takes over fd, the controller's end of the socket (see [EnvFD]),
// agrees on a protocol version and fetches the inventory. It owns fd whatever
// it returns. ctx bounds the handshake only.
func Connect(ctx context.Context, fd int) (*Client, *Inventory, error) { return nil, nil, ErrGone }

// Done is closed when the keeper or the connection is gone.
func (c *Client) Done() <-chan struct{} { return nil }

// Close ends the connection; the keeper then expects this process to exit and
// starts another controller.
func (c *Client) Close() error { return nil }

// Spawn implements [proc.Spawner].
func (c *Client) Spawn(ctx context.Context, spec proc.Spec) (proc.Process, error) {
	return nil, ErrGone
}

// Put stores a copy of f under name for later controllers, with a label of at
// most [proc.MaxLabel] bytes, in place of what had the name before. The caller
// keeps ownership of f.
func (c *Client) Put(ctx context.Context, name string, label []byte, f *os.File) error {
	return ErrGone
}

// Drop closes the stored descriptor of that name; no error where there is none.
func (c *Client) Drop(ctx context.Context, name string) error { return ErrGone }

// Ready tells the keeper that the controller does its work, and through it the
// service manager (READY=1, with status in words). It may be called again for
// another status.
func (c *Client) Ready(ctx context.Context, status string) error { return ErrGone }

// Stopping tells the service manager that the service is about to end.
func (c *Client) Stopping(ctx context.Context) error { return ErrGone }

// Replace names the program that is started as the next controller, when the
// present one has exited. If it dies twice before it connects, the keeper goes
// back to the present program and says so in [Inventory.Notice]. A nil args
// keeps the present arguments.
func (c *Client) Replace(ctx context.Context, path string, args []string) error { return ErrGone }

// Shutdown ends the keeper; this process is expected to exit soon afterwards
// (the keeper waits for it, 5 s at most). While processes live it is refused
// with [ErrBusy], unless force is set, which kills them.
func (c *Client) Shutdown(ctx context.Context, force bool) error { return ErrGone }

// Key returns the run's [proc.Spec.Key].
func (p *Process) Key() string { return "" }

// Label returns the run's label; the caller must not change it.
func (p *Process) Label() []byte { return nil }

// SetLabel replaces the label that later controllers get.
func (p *Process) SetLabel(ctx context.Context, label []byte) error { return ErrGone }

// ID implements [proc.Process].
func (p *Process) ID() proc.ID { return proc.ID{} }

// Done implements [proc.Process].
func (p *Process) Done() <-chan struct{} { return nil }

// Exit implements [proc.Process].
func (p *Process) Exit() proc.Exit { return proc.Exit{} }

// Signal implements [proc.Process].
func (p *Process) Signal(sig syscall.Signal) error { return ErrGone }

// SignalTree implements [proc.Process].
func (p *Process) SignalTree(sig syscall.Signal) error { return ErrGone }

// KillTree implements [proc.Process].
func (p *Process) KillTree(ctx context.Context) error { return ErrGone }

// Members implements [proc.Process].
func (p *Process) Members() ([]int, error) { return nil, ErrGone }

// Release implements [proc.Process].
func (p *Process) Release() error { return ErrGone }
