package keeper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

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
type Client struct {
	file *os.File
	conn syscall.RawConn
	done chan struct{}

	sendMu sync.Mutex // one packet after another

	mu      sync.Mutex
	seq     uint32
	pending map[uint32]*call
	procs   map[uint64]*Process
	err     error // why the connection ended, once done is closed
}

// call is a request that waits for its reply.
type call struct {
	reply chan answer // holds one
	// spawn is the process to be filled in by the reply to a spawn request;
	// given up says that nobody waits for it any more.
	spawn   *Process
	givenUp bool
}

type answer struct {
	body []byte
	err  error
}

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
type Process struct {
	c    *Client
	run  uint64 // the keeper's number for it
	id   proc.ID
	key  string
	done chan struct{}
	exit proc.Exit // written before done is closed

	mu    sync.Mutex
	label []byte
}

var _ proc.Process = (*Process)(nil)

// Connect takes over fd, the controller's end of the socket (see [EnvFD]),
// agrees on a protocol version and fetches the inventory. It owns fd whatever
// it returns. ctx bounds the handshake only.
func Connect(ctx context.Context, fd int) (*Client, *Inventory, error) {
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, nil, fmt.Errorf("keeper: descriptor %d is no connection to a keeper: %w", fd, err)
	}
	c := &Client{
		file:    os.NewFile(uintptr(fd), "keeper"),
		done:    make(chan struct{}),
		pending: make(map[uint32]*call),
		procs:   make(map[uint64]*Process),
	}
	inv, in, err := c.handshake(ctx)
	if err != nil {
		_ = c.file.Close()
		if inv != nil {
			inv.close()
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, nil, fmt.Errorf("keeper: connecting: %w", err)
	}
	go c.read(in)
	return c, inv, nil
}

func (inv *Inventory) close() {
	for _, p := range inv.Processes {
		for _, f := range p.Files {
			_ = f.Close()
		}
	}
	for _, s := range inv.Stored {
		_ = s.File.Close()
	}
}

// handshake says hello and reads until the inventory is complete.
func (c *Client) handshake(ctx context.Context) (*Inventory, *receiver, error) {
	var err error
	if c.conn, err = c.file.SyscallConn(); err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.file.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if stop() {
			return
		}
		_ = c.file.SetDeadline(time.Time{})
	}()
	var e encoder
	e.u32(protoMin)
	e.u32(protoMax)
	if err := c.send(&message{kind: kindHello, body: e.b}); err != nil {
		return nil, nil, err
	}
	in := newReceiver()
	var inv *Inventory
	for {
		m, err := c.receive(in)
		if err != nil {
			return inv, nil, err
		}
		switch {
		case m.kind == kindError:
			cause, err := decodeError(m.body)
			m.closeFDs()
			return inv, nil, errors.Join(cause, err)
		case m.kind == kindWelcome && inv == nil:
			w, err := decodeWelcome(m.body)
			m.closeFDs()
			if err != nil {
				return nil, nil, err
			}
			inv = &Inventory{
				Keeper: w.keeper, Tag: w.tag, Protocol: int(w.version), Started: w.started,
				Restarts: int(w.restarts), Cgroup: w.cgroup, Memory: w.memory, Notice: w.notice,
			}
		case inv == nil:
			m.closeFDs()
			return nil, nil, malformed("message of kind %d before the welcome", m.kind)
		case m.kind == kindProcess:
			err = c.adopt(inv, m)
		case m.kind == kindStored:
			err = inv.store(m)
		case m.kind == kindInventoryEnd:
			m.closeFDs()
			return inv, in, nil
		default:
			err = c.dispatch(m)
		}
		if err != nil {
			return inv, nil, err
		}
	}
}

// adopt makes a process of an item of the inventory.
func (c *Client) adopt(inv *Inventory, m *message) error {
	item, err := decodeProcess(m.body, len(m.fds))
	if err != nil {
		m.closeFDs()
		return err
	}
	p := &Process{c: c, run: item.run, id: item.id, key: item.key, label: item.label, done: make(chan struct{})}
	if item.exit != nil {
		p.exit = *item.exit
		close(p.done)
	}
	a := Adopted{Process: p}
	if len(m.fds) > 0 {
		a.Files = make(map[string]*os.File, len(m.fds))
	}
	for i, fd := range m.fds {
		a.Files[item.names[i]] = os.NewFile(uintptr(fd), item.key+"/"+item.names[i])
	}
	inv.Processes = append(inv.Processes, a)
	c.mu.Lock()
	c.procs[p.run] = p
	c.mu.Unlock()
	return nil
}

// store makes an entry of the store of an item of the inventory.
func (inv *Inventory) store(m *message) error {
	d := decoder{b: m.body}
	s := Stored{Name: d.str(), Label: d.bytes()}
	if err := d.end("stored descriptor"); err != nil || len(m.fds) != 1 {
		m.closeFDs()
		if err == nil {
			err = malformed("a stored descriptor came with %d descriptors", len(m.fds))
		}
		return err
	}
	s.File = os.NewFile(uintptr(m.fds[0]), s.Name)
	inv.Stored = append(inv.Stored, s)
	return nil
}

// send writes a packet, waiting while the socket is full.
func (c *Client) send(m *message) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	var err error
	werr := c.conn.Write(func(fd uintptr) bool {
		err = sendMessage(int(fd), m)
		return !errors.Is(err, unix.EAGAIN)
	})
	if werr != nil {
		return werr
	}
	return err
}

// receive reads a packet, waiting for one.
func (c *Client) receive(in *receiver) (m *message, err error) {
	rerr := c.conn.Read(func(fd uintptr) bool {
		m, err = in.receive(int(fd))
		return !errors.Is(err, unix.EAGAIN)
	})
	if rerr != nil {
		return nil, rerr
	}
	return m, err
}

// read is the goroutine that reads for all.
func (c *Client) read(in *receiver) {
	for {
		m, err := c.receive(in)
		if err == nil {
			err = c.dispatch(m)
		}
		if err != nil {
			c.fail(err)
			return
		}
	}
}

// fail ends the connection: calls in flight and all later ones get ErrGone.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	pending := c.pending
	c.pending = nil
	c.mu.Unlock()
	_ = c.file.Close()
	close(c.done)
	for _, call := range pending {
		call.reply <- answer{err: ErrGone}
	}
}

// dispatch handles a reply or a notification.
func (c *Client) dispatch(m *message) error {
	defer m.closeFDs()
	if m.kind == kindExit {
		d := decoder{b: m.body}
		run, exit := d.u64(), decodeExit(&d)
		if err := d.end("exit"); err != nil {
			return err
		}
		c.mu.Lock()
		p := c.procs[run]
		c.mu.Unlock()
		if p == nil {
			return malformed("the exit of an unknown process %d", run)
		}
		select {
		case <-p.done:
			return malformed("a second exit of process %d", run)
		default:
			p.exit = exit
			close(p.done)
		}
		return nil
	}

	var a answer
	switch m.kind {
	case kindOK, kindSpawned:
	case kindPids:
		a.body = bytes.Clone(m.body)
	case kindError:
		cause, err := decodeError(m.body)
		if err != nil {
			return err
		}
		a.err = cause
	default:
		return malformed("unknown kind %d", m.kind)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	call := c.pending[m.seq]
	delete(c.pending, m.seq)
	if call == nil {
		return nil // its caller no longer waits
	}
	if m.kind == kindSpawned {
		p := call.spawn
		d := decoder{b: m.body}
		run, id := d.u64(), proc.ID{PID: int(d.i64()), Start: d.u64()}
		if err := d.end("reply to spawn"); err != nil || p == nil {
			call.reply <- answer{err: ErrGone}
			return errors.Join(err, malformed("a reply to spawn"))
		}
		p.run, p.id = run, id
		// Here and not in Spawn, because the exit may be the next message.
		c.procs[run] = p
		if call.givenUp {
			go p.discard()
			return nil
		}
	}
	call.reply <- a
	return nil
}

// request sends m and waits for the reply. fds of m are borrowed until then.
func (c *Client) request(ctx context.Context, m *message, spawn *Process) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	call := &call{reply: make(chan answer, 1), spawn: spawn}
	c.mu.Lock()
	if c.pending == nil {
		c.mu.Unlock()
		return nil, ErrGone
	}
	c.seq++
	m.seq = c.seq
	c.pending[m.seq] = call
	c.mu.Unlock()
	if err := c.send(m); err != nil {
		c.mu.Lock()
		delete(c.pending, m.seq)
		c.mu.Unlock()
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, os.ErrClosed) {
			return nil, ErrGone
		}
		return nil, err
	}
	select {
	case a := <-call.reply:
		return a.body, a.err
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case a := <-call.reply: // it came at the same moment
		return a.body, a.err
	default:
	}
	call.givenUp = true
	if spawn == nil {
		delete(c.pending, m.seq)
	}
	return nil, context.Cause(ctx)
}

// Done is closed when the keeper or the connection is gone.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection; the keeper then expects this process to exit and
// starts another controller.
func (c *Client) Close() error {
	// The reading goroutine closes the descriptor and owns the rest.
	err := c.conn.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	if err != nil {
		return nil // gone already
	}
	<-c.done
	return nil
}

// Spawn implements [proc.Spawner].
func (c *Client) Spawn(ctx context.Context, spec proc.Spec) (proc.Process, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	req := spawnRequest{spec: spec, present: make([]bool, len(spec.Files))}
	files := make([]*os.File, 0, len(spec.Files)+len(spec.Keep))
	for i, f := range spec.Files {
		if f != nil {
			req.present[i] = true
			files = append(files, f)
		}
	}
	for name := range spec.Keep {
		req.keep = append(req.keep, name)
	}
	slices.Sort(req.keep)
	for _, name := range req.keep {
		files = append(files, spec.Keep[name])
	}
	body := req.encode()
	if len(body) > maxBody {
		return nil, &proc.SpawnError{Op: proc.OpSpec, Path: spec.Path, Err: fmt.Errorf("arguments, environment and label have %d bytes together, more than %d", len(body), maxBody)}
	}
	p := &Process{c: c, key: spec.Key, label: bytes.Clone(spec.Label), done: make(chan struct{})}
	fds := make([]int, len(files))
	err := proc.WithFDs(files, fds, func() error {
		_, err := c.request(ctx, &message{kind: kindSpawn, body: body, fds: fds}, p)
		return err
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

// call sends a request about a process or the keeper that has no body in its
// reply.
func (c *Client) call(ctx context.Context, k kind, e *encoder, fds ...int) error {
	if len(e.b) > maxBody {
		return fmt.Errorf("keeper: a request of %d bytes exceeds the limit of %d", len(e.b), maxBody)
	}
	_, err := c.request(ctx, &message{kind: k, body: e.b, fds: fds}, nil)
	return err
}

// Put stores a copy of f under name for later controllers, with a label of at
// most [proc.MaxLabel] bytes, in place of what had the name before. The caller
// keeps ownership of f.
func (c *Client) Put(ctx context.Context, name string, label []byte, f *os.File) error {
	if name == "" || len(name) > maxName || len(label) > proc.MaxLabel || f == nil {
		return fmt.Errorf("keeper: cannot store %.100q: want a name of 1 to %d bytes, a label of at most %d and an open file", name, maxName, proc.MaxLabel)
	}
	fds := make([]int, 1)
	return proc.WithFDs([]*os.File{f}, fds, func() error {
		var e encoder
		e.str(name)
		e.bytes(label)
		return c.call(ctx, kindPut, &e, fds...)
	})
}

// Drop closes the stored descriptor of that name; no error where there is none.
func (c *Client) Drop(ctx context.Context, name string) error {
	var e encoder
	e.str(name)
	return c.call(ctx, kindDrop, &e)
}

// Ready tells the keeper that the controller does its work, and through it the
// service manager (READY=1, with status in words). It may be called again for
// another status.
func (c *Client) Ready(ctx context.Context, status string) error {
	var e encoder
	e.u8(statusReady)
	e.str(status)
	return c.call(ctx, kindStatus, &e)
}

// Stopping tells the service manager that the service is about to end.
func (c *Client) Stopping(ctx context.Context) error {
	var e encoder
	e.u8(statusStopping)
	e.str("")
	return c.call(ctx, kindStatus, &e)
}

// Replace names the program that is started as the next controller, when the
// present one has exited. If it dies twice before it connects, the keeper goes
// back to the present program and says so in [Inventory.Notice]. A nil args
// keeps the present arguments.
func (c *Client) Replace(ctx context.Context, path string, args []string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("keeper: the program %.100q of the next controller is not an absolute path", path)
	}
	var e encoder
	e.str(path)
	e.strs(args)
	return c.call(ctx, kindReplace, &e)
}

// Shutdown ends the keeper; this process is expected to exit soon afterwards
// (the keeper waits for it, 5 s at most). While processes live it is refused
// with [ErrBusy], unless force is set, which kills them.
func (c *Client) Shutdown(ctx context.Context, force bool) error {
	var e encoder
	e.flag(force)
	return c.call(ctx, kindShutdown, &e)
}

// AllMembers lists the pids of every live run, by the pid of its leader. It
// costs one message, whatever their number.
func (c *Client) AllMembers(ctx context.Context) (map[int][]int, error) {
	body, err := c.request(ctx, &message{kind: kindAllMembers}, nil)
	if err != nil {
		return nil, err
	}
	out := map[int][]int{}
	d := decoder{b: body}
	for len(d.b) > 0 && !d.bad {
		leader := int(d.u32())
		pids := make([]int, d.count(4))
		for i := range pids {
			pids[i] = int(d.u32())
		}
		out[leader] = pids
	}
	return out, d.end("list of all pids")
}

// Key returns the run's [proc.Spec.Key].
func (p *Process) Key() string { return p.key }

// Label returns the run's label; the caller must not change it.
func (p *Process) Label() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.label
}

// SetLabel replaces the label that later controllers get.
func (p *Process) SetLabel(ctx context.Context, label []byte) error {
	if len(label) > proc.MaxLabel {
		return fmt.Errorf("keeper: a label of %d bytes exceeds the limit of %d", len(label), proc.MaxLabel)
	}
	e := p.encoder()
	e.bytes(label)
	if err := p.c.call(ctx, kindLabel, e); err != nil {
		return err
	}
	p.mu.Lock()
	p.label = bytes.Clone(label)
	p.mu.Unlock()
	return nil
}

func (p *Process) encoder() *encoder {
	var e encoder
	e.u64(p.run)
	return &e
}

// ID implements [proc.Process].
func (p *Process) ID() proc.ID { return p.id }

// Done implements [proc.Process]. It is not closed when the keeper goes: see
// [Client.Done].
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit implements [proc.Process].
func (p *Process) Exit() proc.Exit {
	select {
	case <-p.done:
		return p.exit
	default:
		return proc.Exit{}
	}
}

// Signal implements [proc.Process].
func (p *Process) Signal(sig syscall.Signal) error { return p.signal(sig, false) }

// SignalTree implements [proc.Process].
func (p *Process) SignalTree(sig syscall.Signal) error { return p.signal(sig, true) }

func (p *Process) signal(sig syscall.Signal, tree bool) error {
	e := p.encoder()
	e.flag(tree)
	e.u32(uint32(sig))
	return p.c.call(context.Background(), kindSignal, e)
}

// KillTree implements [proc.Process]. When ctx ends first, the keeper goes on
// killing all the same.
func (p *Process) KillTree(ctx context.Context) error {
	return p.c.call(ctx, kindKill, p.encoder())
}

// Members implements [proc.Process].
func (p *Process) Members() ([]int, error) {
	body, err := p.c.request(context.Background(), &message{kind: kindMembers, body: p.encoder().b}, nil)
	if err != nil {
		return nil, err
	}
	d := decoder{b: body}
	pids := make([]int, d.count(4))
	for i := range pids {
		pids[i] = int(d.u32())
	}
	return pids, d.end("list of pids")
}

// Release implements [proc.Process].
func (p *Process) Release() error {
	select {
	case <-p.done:
	default:
		return proc.ErrRunning
	}
	err := p.c.call(context.Background(), kindForget, p.encoder())
	if err == nil || errors.Is(err, errUnknownRun) {
		p.c.mu.Lock()
		delete(p.c.procs, p.run)
		p.c.mu.Unlock()
		return nil
	}
	return err
}

// discard ends and forgets a process whose Spawn was given up before the
// keeper had started it.
func (p *Process) discard() {
	if p.KillTree(context.Background()) != nil {
		return // the keeper is gone; the next one sweeps
	}
	select {
	case <-p.done:
		_ = p.Release()
	case <-p.c.done:
	}
}
