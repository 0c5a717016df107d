// Package cluster is the primary of Node's cluster module, for worker
// processes that somebody else starts: unmodified servers
// (http.createServer().listen(port), several ports, Unix sockets, UDP) share
// listening sockets that belong to this side.
//
// Invariant: a listening socket lives from the first worker that asks for it
// until [Primary.Prune], [Primary.Remove] or Linger ends it, whatever becomes
// of the workers. What it has in its queue waits for the next worker. With a
// [Store] it outlives this process too. Nothing a worker writes makes this
// side block, panic, or keep a descriptor.
//
// By default the workers accept for themselves (Node's "none" policy): the
// primary is in no connection's way and takes none with it when it dies.
// RoundRobin has the primary accept and deal them out in turn, at the price of
// a message there and back for each connection, and of what it holds when it
// dies. Measured (BenchmarkPolicies, two workers, new connections): the busier
// worker got 50 % of them from one client and 56 % from 16, dealt out 50 % and
// 51 %; the median request took 1.9 ms from one client, dealt out 2.1 ms.
// Sticky deals out by the client's address, at the same price.
//
// It must never start or signal a process, decide when a worker is replaced,
// or import another package of Remuda than internal/nodeipc, internal/fdpass and
// internal/sockets.
package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
	"github.com/remuda-dev/remuda/internal/sockets"
)

const (
	// maxListeners of one app; a program that asks for more is told EMFILE.
	maxListeners = 256
	// maxKey is what a name in the store may have; no address is longer.
	maxKey = 180
	// maxData is what a server may leave for the others (the keys of TLS
	// tickets: some 100 bytes).
	maxData = 4 << 10

	defaultLinger = 30 * time.Second
)

// Store keeps copies of descriptors for a later process. A call should take
// no longer than a moment: the app's workers wait for it.
type Store interface {
	// Put keeps a copy of f, in place of what had the name before.
	Put(name string, f *os.File) error
	// Drop closes the copy; no error where there is none.
	Drop(name string) error
}

// Policy says who accepts the connections.
type Policy int

// Policies.
const (
	Shared     Policy = iota // the workers, as it comes
	RoundRobin               // the primary, which deals them out in turn
	// Sticky is the primary too: all connections of one client address go to
	// one worker, as long as that is there. A worker that comes or goes moves
	// the clients it gets or had, and no others; one that is replaced gets
	// those of the worker of that number before. Connections by Unix sockets
	// are dealt out in turn.
	Sticky
)

// ParsePolicy reads a value of NODE_CLUSTER_SCHED_POLICY: "none", "rr", or ""
// for the default, Shared. Any other is an error.
func ParsePolicy(s string) (Policy, error) {
	switch s {
	case "", "none":
		return Shared, nil
	case "rr":
		return RoundRobin, nil
	}
	return Shared, fmt.Errorf("NODE_CLUSTER_SCHED_POLICY=%.40q is not known: want none or rr", s)
}

// Options of a Primary. The zero value is of use.
type Options struct {
	// Store keeps the listeners, under the names that Listeners has them by
	// next time. Nil: they end with the process.
	Store Store
	// Listeners are those of an earlier Primary of the app. NewPrimary owns
	// the files and the map's content is not kept.
	Listeners map[string]*os.File
	Policy    Policy
	// Owner is whose files Unix sockets become, and whose rights decide
	// whether they may be made. Nil: this process's.
	Owner *sockets.Owner
	// Linger is how long a listener waits, when the program itself closed it
	// and goes on running without, before the port is given back. 0: 30 s;
	// less: for ever.
	Linger time.Duration
	// Preload is the path of the file of [WritePreload], which the workers'
	// user must be able to read. "": workers are as Node makes them, and one
	// that was asked to disconnect goes on for as long as a client uses a
	// connection that is kept alive.
	Preload string
	// OnError is told what went wrong without a caller to tell. It must not
	// call the Primary. Nil: not told.
	OnError func(error)
}

// Primary is the primary of one app. Make one with [NewPrimary]. Safe for use
// by several goroutines.
type Primary struct {
	o    Options
	bufs sync.Pool // *buffers
	wg   sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	seq       int64
	listeners map[string]*listener
	workers   map[*Worker]struct{}
	attached  int // workers so far
}

// listener is a socket of the app. Primary.mu guards it.
type listener struct {
	key    string
	fd     int // not an *os.File: Go's poller would wake up for each connection
	typ    string
	place  sockets.Place
	data   json.RawMessage
	users  map[*Worker]bool // true: it is dealt its connections
	linger *time.Timer
	dealer *dealer // nil where the workers accept
}

// NewPrimary makes the primary of an app. The caller must end it with
// [Primary.Close] or [Primary.Remove].
func NewPrimary(o Options) (*Primary, error) {
	if o.Linger == 0 {
		o.Linger = defaultLinger
	}
	p := &Primary{
		o:         o,
		listeners: make(map[string]*listener),
		workers:   make(map[*Worker]struct{}),
		// Not from 0: workers that are taken over may still answer what an
		// earlier primary said.
		seq: rand.Int64N(1 << 40),
	}
	p.bufs.New = func() any { return newBuffers() }
	var errs []error
	p.mu.Lock() // dealers begin at once
	for key, f := range o.Listeners {
		fd, err := fdpass.DupFile(f)
		f.Close()
		if err == nil {
			err = unix.SetNonblock(fd, true)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("take over listener %s: %w", key, err))
			continue
		}
		p.listeners[key] = p.newListener(key, fd)
	}
	p.mu.Unlock()
	p.o.Listeners = nil
	if err := errors.Join(errs...); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// newListener takes over fd. p.mu is held.
func (p *Primary) newListener(key string, fd int) *listener {
	l := &listener{key: key, fd: fd, typ: handleType(fd), place: sockets.PlaceOf(fd), users: make(map[*Worker]bool)}
	p.dealOut(l)
	return l
}

// dealOut has l dealt out where the policy says so. p.mu is held.
func (p *Primary) dealOut(l *listener) {
	if p.o.Policy == Shared || l.typ != "net.Native" {
		return
	}
	if l.dealer == nil {
		l.dealer = p.deal(l)
	}
	if d := l.dealer; d != nil {
		d.sticky = p.o.Policy == Sticky && !l.place.Is()
		d.wake.Broadcast()
	}
}

// SetPolicy changes who accepts for the workers that begin to listen from now
// on. Those there go on as they are.
func (p *Primary) SetPolicy(policy Policy) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.o.Policy == policy || p.closed {
		return
	}
	p.o.Policy = policy
	for _, l := range p.listeners {
		p.dealOut(l)
	}
}

// Names are the names of the listeners, in no order.
func (p *Primary) Names() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	names := make([]string, 0, len(p.listeners))
	for key := range p.listeners {
		names = append(names, key)
	}
	return names
}

// Prune closes the listeners that no worker has: after a reload to a version
// that listens elsewhere, or when the app is stopped. While a worker is
// attached that was resumed, of which nobody knows what it has, none is
// closed.
func (p *Primary) Prune() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for w := range p.workers {
		if w.resumed {
			return
		}
	}
	for _, l := range p.listeners {
		if len(l.users) == 0 {
			p.drop(l)
		}
	}
}

// drop closes a listener for good. p.mu is held.
func (p *Primary) drop(l *listener) {
	p.shut(l)
	l.place.Remove(p.o.Owner)
	delete(p.listeners, l.key)
	if p.o.Store != nil {
		if err := p.o.Store.Drop(l.key); err != nil {
			p.trouble(fmt.Errorf("forget listener %s: %w", l.key, err))
		}
	}
}

// shut gives up this process's end of a listener. p.mu is held.
func (p *Primary) shut(l *listener) {
	if l.linger != nil {
		l.linger.Stop()
	}
	if l.dealer != nil {
		l.dealer.stop()
	}
	_ = unix.Close(l.fd)
	l.fd = -1
}

// Close ends this side and waits for its goroutines: the workers' channels
// are closed, OnClose is not called. Listeners stay in the Store, for the next
// process. It must not be called from a handler.
func (p *Primary) Close() { p.end(false) }

// Remove is Close, and the end of the listeners too: the app is no more.
func (p *Primary) Remove() { p.end(true) }

func (p *Primary) end(drop bool) {
	p.mu.Lock()
	p.closed = true
	for _, l := range p.listeners {
		if drop {
			p.drop(l)
		} else {
			p.shut(l)
		}
	}
	clear(p.listeners)
	all := make([]*Worker, 0, len(p.workers))
	for w := range p.workers {
		all = append(all, w)
	}
	p.mu.Unlock()
	for _, w := range all {
		w.shut()
	}
	p.wg.Wait()
}

func (p *Primary) trouble(err error) {
	if p.o.OnError != nil {
		p.o.OnError(err)
	}
}

// nextSeq needs p.mu.
func (p *Primary) nextSeq() int64 {
	p.seq++
	return p.seq
}

// internal handles one of Node's own messages of a worker.
func (p *Primary) internal(w *Worker, f fields) {
	seq := f.number("seq", -1)
	if ack := f.number("ack", -1); ack >= 0 {
		p.mu.Lock()
		p.dealt(w, ack, string(f["accepted"]) == "true")
		p.mu.Unlock()
		return
	}
	switch f.text("act") {
	case "queryServer":
		p.query(w, seq, f.query())
	case "listening":
		w.listens(Address{Type: f.query().addressType, Address: f.text("address"), Port: f.query().port})
	case "close":
		p.mu.Lock()
		if l := p.listeners[f.text("key")]; l != nil {
			p.leave(w, l)
			p.abandon(w, l)
		}
		p.mu.Unlock()
	case "exitedAfterDisconnect":
		p.mu.Lock()
		w.leaving = true
		_ = w.push(order{Cmd: cmdCluster, Ack: &seq, Seq: p.nextSeq()}, -1)
		p.mu.Unlock()
	}
}

// query answers a worker that wants to listen.
func (p *Primary) query(w *Worker, seq int64, q query) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w.leaving || p.closed { // as Node does: it wants the answer no more
		return
	}
	key := q.key()
	answer := reply{Cmd: cmdCluster, Ack: seq, Seq: p.nextSeq(), Key: key}
	l, errno := p.listener(key, q)
	if errno != 0 {
		answer.Errno = -int(errno)
		if len(q.data) <= maxData {
			answer.Data = q.data // a TLS server fails without
		}
		_ = w.push(answer, -1)
		return
	}
	if l.linger != nil {
		l.linger.Stop()
		l.linger = nil
	}
	answer.Data = l.data
	l.users[w] = l.dealer != nil && p.o.Policy != Shared
	if l.users[w] {
		answer.Sockname = nameOf(l.fd)
		_ = w.push(answer, -1)
		l.dealer.offer(w)
		return
	}
	fd, err := unix.FcntlInt(uintptr(l.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		answer.Errno = -int(number(err))
		_ = w.push(answer, -1)
		return
	}
	_ = w.push(withHandle{Cmd: cmdHandle, Type: l.typ, Msg: answer}, fd)
}

// listener finds or makes the listener for q. p.mu is held.
func (p *Primary) listener(key string, q query) (*listener, unix.Errno) {
	l := p.listeners[key]
	if l != nil && l.place.Lost() {
		// Those that have the old one finish what is in its queue.
		p.shut(l)
		delete(p.listeners, key)
		l = nil
	}
	if l == nil {
		if len(key) > maxKey {
			return nil, unix.EINVAL
		}
		if len(p.listeners) >= maxListeners {
			return nil, unix.EMFILE
		}
		fd, errno := bind(q, p.o.Owner)
		if errno != 0 {
			return nil, errno
		}
		if err := p.keep(key, fd); err != nil {
			p.trouble(err)
		}
		l = p.newListener(key, fd)
		p.listeners[key] = l
	}
	if len(l.data) == 0 || string(l.data) == "null" {
		if l.data = nil; len(q.data) <= maxData {
			l.data = append(l.data, q.data...)
		}
	}
	return l, 0
}

// keep puts a new listener into the store.
func (p *Primary) keep(key string, fd int) error {
	if p.o.Store == nil {
		return nil
	}
	second, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		f := os.NewFile(uintptr(second), key)
		err = p.o.Store.Put(key, f)
		f.Close()
	}
	if err != nil {
		return fmt.Errorf("listener %s will not outlive a restart of the daemon: %w", key, err)
	}
	return nil
}

// leave takes a worker from a listener's users. p.mu is held.
func (p *Primary) leave(w *Worker, l *listener) {
	delete(l.users, w)
	if l.dealer != nil {
		l.dealer.withdraw(w)
	}
}

// abandon starts the clock for a listener that the program closed: a program
// that closes before it ends is to find the socket again when it is back, but
// one that goes on without must not keep clients waiting. p.mu is held.
func (p *Primary) abandon(w *Worker, l *listener) {
	if len(l.users) > 0 || w.leaving || p.o.Linger < 0 || l.linger != nil {
		return
	}
	var t *time.Timer
	t = time.AfterFunc(p.o.Linger, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if l.linger != t || p.closed { // in use again, or gone
			return
		}
		l.linger = nil
		if _, alive := p.workers[w]; alive && !w.leaving && len(l.users) == 0 {
			p.drop(l)
		}
	})
	l.linger = t
}

// gone forgets a worker whose channel has ended. p.mu is held.
func (p *Primary) gone(w *Worker) {
	delete(p.workers, w)
	for _, l := range p.listeners {
		p.leave(w, l)
	}
	p.undealt(w)
}
