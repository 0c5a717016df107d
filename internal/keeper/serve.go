package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/proc"
)

// connection is the keeper's side of the socket to one controller. Its mutex is
// the keeper's.
type connection struct {
	k     *keeper
	file  *os.File
	rc    syscall.RawConn
	fd    int
	ended chan struct{} // closed when the reading goroutine has handled all

	queue    []*message // what the full socket did not take
	draining bool       // a goroutine is busy with queue
	idle     *sync.Cond // queue became empty
	closed   bool
	dead     bool // the controller is: what it sent before is handled still
}

// queueLimit is the number of queued messages from which on the controller
// has to read before more of its requests are handled.
const queueLimit = 256

func newConnection(k *keeper, fd int) (*connection, error) {
	f := os.NewFile(uintptr(fd), "controller")
	rc, err := f.SyscallConn()
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("socket to the controller: %w", err)
	}
	return &connection{k: k, file: f, rc: rc, fd: fd, ended: make(chan struct{}), idle: sync.NewCond(&k.mu)}, nil
}

// send sends a message, at once if the socket takes it. Called under the lock;
// it never blocks.
func (c *connection) send(m *message) {
	if c.closed {
		return
	}
	if len(c.queue) == 0 {
		switch err := sendMessage(c.fd, m); {
		case err == nil:
			return
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ETOOMANYREFS):
		default:
			if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
				c.k.logf("sending to the controller: %v", err)
				c.close()
			}
			return
		}
	}
	c.queue = append(c.queue, m)
	if !c.draining {
		c.draining = true
		go c.drain()
	}
}

// drain sends the queue as the socket takes it.
func (c *connection) drain() {
	c.k.mu.Lock()
	defer c.k.mu.Unlock()
	for len(c.queue) > 0 && !c.closed {
		m := c.queue[0]
		c.k.mu.Unlock()
		var err error
		werr := c.rc.Write(func(fd uintptr) bool {
			err = sendMessage(int(fd), m)
			return !errors.Is(err, unix.EAGAIN)
		})
		if errors.Is(err, unix.ETOOMANYREFS) {
			// Too many descriptors are on their way: the controller has to
			// take some out, and nothing tells when it did.
			time.Sleep(5 * time.Millisecond)
			c.k.mu.Lock()
			continue
		}
		c.k.mu.Lock()
		if werr != nil || err != nil {
			c.queue = nil
			break
		}
		if len(c.queue) > 0 {
			c.queue = c.queue[1:]
		}
	}
	c.queue = nil
	c.draining = false
	c.idle.Broadcast()
}

// flush waits until at most limit messages are queued. Called under the lock,
// which it gives up while it waits.
func (c *connection) flush(limit int) {
	for len(c.queue) > limit && !c.closed {
		c.idle.Wait()
	}
}

// close ends the connection. Called under the lock.
func (c *connection) close() {
	if !c.closed {
		c.closed = true
		_ = c.file.Close()
		c.idle.Broadcast()
	}
}

// peerDead makes the reading goroutine end once it has handled what the dead
// controller had sent. Called under the lock. End of file does not tell: a
// child of the controller may still hold its end of the socket.
func (c *connection) peerDead() {
	c.dead = true
	_ = c.file.SetDeadline(time.Unix(1, 0))
}

// serve is the goroutine that handles a controller's requests one after
// another. It alone closes kept descriptors, so that a queued message that
// carries them stays right.
func (k *keeper) serve(c *connection) {
	defer close(c.ended)
	in := newReceiver()
	greeted := false
	for {
		m, err := c.next(in)
		if err == nil {
			if err = k.handle(c, m, &greeted); err == nil {
				k.touch()
				continue
			}
		}
		k.mu.Lock()
		if !errors.Is(err, io.EOF) && !c.closed {
			k.logf("the connection of the controller is ended: %v", err)
		}
		c.close()
		if !c.dead {
			select {
			case k.lost <- struct{}{}:
			default:
			}
		}
		k.mu.Unlock()
		return
	}
}

// next waits for a message; io.EOF once there is none to come.
func (c *connection) next(in *receiver) (m *message, err error) {
	rerr := c.rc.Read(func(fd uintptr) bool {
		m, err = in.receive(int(fd))
		return !errors.Is(err, unix.EAGAIN)
	})
	if rerr == nil && err != nil && (errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)) {
		return nil, io.EOF
	}
	if rerr == nil {
		return m, err
	}
	c.k.mu.Lock()
	defer c.k.mu.Unlock()
	if !c.dead || c.closed {
		return nil, io.EOF
	}
	m, err = in.receive(c.fd)
	if err != nil {
		return nil, io.EOF
	}
	return m, nil
}

// handle does one request. An error is one of the protocol and ends the
// connection; what cannot be done is a reply.
func (k *keeper) handle(c *connection, m *message, greeted *bool) error {
	// Whatever a request does not take out of m is closed.
	defer m.closeFDs()
	if !*greeted {
		if m.kind != kindHello {
			return malformed("kind %d before hello", m.kind)
		}
		*greeted = true
		return k.handleHello(c, m)
	}
	d := &decoder{b: m.body}
	var ferr error // of the form of the request
	var err error  // to be replied
	reply := &message{kind: kindOK, seq: m.seq}

	k.mu.Lock()
	defer k.mu.Unlock()
	switch m.kind {
	case kindSpawn:
		var req *spawnRequest
		if req, ferr = decodeSpawn(m.body, len(m.fds)); ferr == nil {
			var r *run
			if r, err = k.spawn(c, req, m); err == nil {
				var e encoder
				e.u64(r.num)
				e.i64(int64(r.tree.ID().PID))
				e.u64(r.tree.ID().Start)
				reply.kind, reply.body = kindSpawned, e.b
			}
		}
	case kindSignal:
		num, tree, sig := d.u64(), d.flag(), syscall.Signal(d.u32())
		if ferr = d.end("signal request"); ferr == nil {
			err = k.signal(num, tree, sig)
		}
	case kindKill:
		num := d.u64()
		if ferr = d.end("kill request"); ferr == nil {
			var later bool
			if later, err = k.kill(c, num, m.seq); later {
				return nil
			}
		}
	case kindMembers:
		num := d.u64()
		if ferr = d.end("request for members"); ferr == nil {
			var pids []int
			if pids, err = k.members(num); err == nil {
				var e encoder
				e.u32(uint32(len(pids)))
				for _, pid := range pids {
					e.u32(uint32(pid))
				}
				reply.kind, reply.body = kindPids, e.b
			}
		}
	case kindAllMembers:
		if ferr = d.end("request for all members"); ferr == nil {
			reply.kind, reply.body = kindPids, k.allMembers()
		}
	case kindForget:
		num := d.u64()
		if ferr = d.end("forget request"); ferr == nil {
			err = k.forget(num)
		}
	case kindLabel:
		num, label := d.u64(), d.bytes()
		if ferr = d.end("label request"); ferr == nil {
			if r := k.runs[num]; r == nil {
				err = errUnknownRun
			} else if len(label) > proc.MaxLabel {
				err = fmt.Errorf("keeper: a label of %d bytes", len(label))
			} else {
				r.label = label
			}
		}
	case kindPut:
		name, label := d.str(), d.bytes()
		ferr = d.end("put request")
		if ferr == nil && len(m.fds) != 1 {
			ferr = malformed("a put request with %d descriptors", len(m.fds))
		}
		if ferr == nil {
			if err = k.put(name, label, m.fds[0]); err == nil {
				m.fds = nil
			}
		}
	case kindDrop:
		name := d.str()
		if ferr = d.end("drop request"); ferr == nil {
			k.drop(name)
		}
	case kindReplace:
		path, args := d.str(), d.strs()
		if ferr = d.end("replace request"); ferr == nil {
			err = k.replace(path, args)
		}
	case kindShutdown:
		force := d.flag()
		if ferr = d.end("shutdown request"); ferr == nil {
			switch {
			case k.closing:
				err = errors.New("keeper: shutting down already")
			case len(k.byPID) > 0 && !force:
				err = ErrBusy
			default:
				k.closing = true
				k.shutdown <- shutdownRequest{c: c, seq: m.seq, force: force}
				return nil
			}
		}
	case kindStatus:
		state, text := d.u8(), d.str()
		if ferr = d.end("status request"); ferr == nil {
			err = k.manager.status(state, text)
		}
	default:
		return malformed("unknown kind %d", m.kind)
	}
	if ferr != nil {
		return ferr
	}
	if err != nil {
		reply = &message{kind: kindError, seq: m.seq, body: encodeError(err)}
	}
	c.send(reply)
	c.flush(queueLimit)
	return nil
}

// handleHello agrees on a version and sends the inventory.
func (k *keeper) handleHello(c *connection, m *message) error {
	d := decoder{b: m.body}
	low, high := d.u32(), d.u32()
	if err := d.end("hello"); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	version := min(high, protoMax)
	if version < low || version < protoMin {
		err := fmt.Errorf("%w: the controller speaks %d to %d, the keeper %d to %d", errVersion, low, high, protoMin, protoMax)
		c.send(&message{kind: kindError, seq: m.seq, body: encodeError(err)})
		c.flush(0)
		return err
	}
	w := welcome{
		version: version, keeper: k.id, tag: k.opts.Tag, started: k.started, restarts: uint32(k.starts - 1),
		cgroup: k.cgroup, memory: k.memory, notice: k.notice,
	}
	c.send(&message{kind: kindWelcome, seq: m.seq, body: w.encode()})

	nums := make([]uint64, 0, len(k.runs))
	for num := range k.runs {
		nums = append(nums, num)
	}
	slices.Sort(nums)
	for _, num := range nums {
		r := k.runs[num]
		item := processItem{run: num, id: r.tree.ID(), key: r.key, label: r.label, exit: r.exit}
		var fds []int
		for _, f := range r.kept {
			item.names = append(item.names, f.name)
			fds = append(fds, f.fd)
		}
		c.send(&message{kind: kindProcess, body: item.encode(), fds: fds})
		r.told = c // from here on an exit is told
		c.flush(queueLimit)
	}
	for name, s := range k.stored {
		var e encoder
		e.str(name)
		e.bytes(s.label)
		c.send(&message{kind: kindStored, body: e.b, fds: []int{s.fd}})
		c.flush(queueLimit)
	}
	c.send(&message{kind: kindInventoryEnd, seq: m.seq})
	// Requests that close descriptors come after this one.
	c.flush(0)
	if c.closed {
		return io.EOF
	}
	if k.ctl.conn == c {
		k.ctl.hello = true
		k.old, k.notice = nil, ""
	}
	select {
	case k.hello <- struct{}{}:
	default:
	}
	return nil
}

// spawn starts a process and takes the descriptors to keep out of m.
func (k *keeper) spawn(c *connection, req *spawnRequest, m *message) (*run, error) {
	if k.closing {
		return nil, &proc.SpawnError{Op: proc.OpFork, Path: req.spec.Path, Err: errors.New("the keeper is shutting down")}
	}
	for _, r := range k.byPID {
		if r.key == req.spec.Key {
			return nil, &proc.SpawnError{Op: proc.OpSpec, Path: req.spec.Path, Err: fmt.Errorf("a process with the key %s is running (pid %d)", r.key, r.tree.ID().PID)}
		}
	}
	fds := make([]int, len(req.present))
	used := 0
	for i, present := range req.present {
		fds[i] = -1
		if present {
			fds[i] = m.fds[used]
			used++
		}
	}
	tree, err := k.launcher.Launch(&req.spec, fds)
	if err != nil {
		return nil, err
	}
	k.lastRun++
	r := &run{num: k.lastRun, tree: tree, key: req.spec.Key, label: req.spec.Label, told: c}
	for i, name := range req.keep {
		r.kept = append(r.kept, keptFD{name: name, fd: m.fds[used+i]})
	}
	for _, fd := range m.fds[:used] {
		_ = unix.Close(fd)
	}
	m.fds = nil
	k.runs[r.num] = r
	k.byPID[tree.ID().PID] = r
	k.wakeReaper()
	return r, nil
}

func (k *keeper) signal(num uint64, tree bool, sig syscall.Signal) error {
	r := k.runs[num]
	switch {
	case r == nil:
		return errUnknownRun
	case sig < 0 || sig > 64:
		return fmt.Errorf("keeper: there is no signal %d", sig)
	case tree:
		return r.tree.Signal(sig)
	}
	return r.tree.SignalLeader(sig)
}

func (k *keeper) members(num uint64) ([]int, error) {
	r := k.runs[num]
	if r == nil {
		return nil, errUnknownRun
	}
	return r.tree.Members()
}

// allMembers lists leader, number of pids and pids of each live run. A run that
// cannot be looked at is left out.
func (k *keeper) allMembers() []byte {
	var e encoder
	for _, r := range k.runs {
		if r.exit != nil || len(e.b) > maxBody/2 {
			continue
		}
		pids, err := r.tree.Members()
		if err != nil || len(pids) > maxBody/16 {
			continue
		}
		e.u32(uint32(r.tree.ID().PID))
		e.u32(uint32(len(pids)))
		for _, pid := range pids {
			e.u32(uint32(pid))
		}
	}
	return e.b
}

// kill ends a run's tree. Where something is left to be killed a goroutine
// does it, one per run, and replies to all who wait.
func (k *keeper) kill(c *connection, num uint64, seq uint32) (later bool, err error) {
	r := k.runs[num]
	if r == nil {
		return false, errUnknownRun
	}
	if empty, err := r.tree.Empty(); err == nil && empty && !r.killing {
		return false, nil
	}
	r.killers = append(r.killers, killer{c: c, seq: seq})
	if !r.killing {
		r.killing = true
		go k.killTree(r)
	}
	return true, nil
}

func (k *keeper) killTree(r *run) {
	err := r.tree.Kill(context.Background())
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, w := range r.killers {
		reply := &message{kind: kindOK, seq: w.seq}
		if err != nil {
			reply.kind, reply.body = kindError, encodeError(err)
		}
		w.c.send(reply)
	}
	r.killers, r.killing = nil, false
}

// forget drops a run that has ended. Its descriptors are closed when no
// message with them is queued any more.
func (k *keeper) forget(num uint64) error {
	r := k.runs[num]
	if r == nil {
		return errUnknownRun
	}
	if r.exit == nil {
		return proc.ErrRunning
	}
	for _, f := range r.kept {
		_ = unix.Close(f.fd)
	}
	delete(k.runs, num)
	r.tree.Remove()
	return nil
}

func (k *keeper) put(name string, label []byte, fd int) error {
	if name == "" || len(name) > maxName || len(label) > proc.MaxLabel {
		return fmt.Errorf("keeper: cannot store under the name %.100q with a label of %d bytes", name, len(label))
	}
	if _, known := k.stored[name]; !known && len(k.stored) >= maxStored {
		return fmt.Errorf("keeper: %d descriptors are stored already", len(k.stored))
	}
	k.drop(name)
	k.stored[name] = storedFD{label: label, fd: fd}
	return nil
}

func (k *keeper) drop(name string) {
	if s, ok := k.stored[name]; ok {
		_ = unix.Close(s.fd)
		delete(k.stored, name)
	}
}

// replace notes the program of the next controller.
func (k *keeper) replace(path string, args []string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("keeper: the program %.100q of the next controller is not an absolute path", path)
	}
	if err := unix.Access(path, unix.X_OK); err != nil {
		return fmt.Errorf("keeper: the program %.100q of the next controller cannot be executed: %w", path, err)
	}
	cmd := Command{Path: path, Args: args, Env: k.ctl.cmd.Env}
	if len(args) == 0 && len(k.ctl.cmd.Args) > 0 {
		cmd.Args = slices.Clone(k.ctl.cmd.Args)
		cmd.Args[0] = path
	}
	k.next = &cmd
	return nil
}
