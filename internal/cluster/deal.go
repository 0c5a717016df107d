package cluster

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// acceptPause is how long accepting rests when there are no descriptors
	// left.
	acceptPause = 100 * time.Millisecond
	// stickyAhead is how many connections a worker may be dealt before it has
	// said that it has the first, where clients stick to theirs. One that takes
	// none is passed over from then on, so that its clients are not lost and
	// the others' do not wait behind them.
	stickyAhead = 64
)

// dealer accepts for a listener and gives each connection to the worker that
// has waited longest. A worker has one at a time until it says that it has
// it, and nothing is accepted while none waits: what is in the kernel's queue
// survives this process. A sticky one chooses by the client's address, and a
// worker may have several on their way.
type dealer struct {
	p *Primary
	l *listener
	f *os.File // a second descriptor of the listener, in Go's poller

	// The rest is guarded by p.mu.
	wake    *sync.Cond
	sticky  bool
	free    []*Worker // those whose turn it is, in that order; of no use to a sticky one
	back    []conn    // refused by a worker, or left by one that died
	stopped bool
}

// conn is an accepted connection on its way.
type conn struct {
	d     *dealer
	fd    int
	from  uint64  // hash of the client's address
	not   *Worker // who refused it last
	tries int
}

// deal starts to accept for l. p.mu is held.
func (p *Primary) deal(l *listener) *dealer {
	fd, err := unix.FcntlInt(uintptr(l.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		p.trouble(fmt.Errorf("listener %s is shared, not dealt out: %w", l.key, err))
		return nil
	}
	d := &dealer{p: p, l: l, f: os.NewFile(uintptr(fd), l.key), wake: sync.NewCond(&p.mu)}
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		d.run()
	}()
	return d
}

func (d *dealer) run() {
	defer d.f.Close()
	rc, err := d.f.SyscallConn()
	if err != nil {
		return
	}
	p := d.p
	for {
		p.mu.Lock()
		for !d.stopped && !d.able() {
			d.wake.Wait()
		}
		if d.stopped {
			p.mu.Unlock()
			return
		}
		if len(d.back) > 0 {
			c := d.back[0]
			d.back = d.back[1:]
			d.give(c)
			p.mu.Unlock()
			continue
		}
		p.mu.Unlock()

		c := conn{d: d, fd: -1}
		var aerr error
		err := rc.Read(func(fd uintptr) bool {
			var from unix.Sockaddr
			c.fd, from, aerr = unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if errors.Is(aerr, unix.EAGAIN) {
				// One that was given back is to be had without a new one.
				p.mu.Lock()
				defer p.mu.Unlock()
				return len(d.back) > 0
			}
			c.from = hashOf(from)
			return true
		})
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) { // closed
			return
		}
		if err != nil { // woken up, see offer and stop
			_ = d.f.SetReadDeadline(time.Time{})
			continue
		}
		switch {
		case aerr == nil:
			p.mu.Lock()
			switch {
			case d.stopped:
				_ = unix.Close(c.fd)
			case !d.able(): // the one that waited has gone
				d.back = append(d.back, c)
			default:
				d.give(c)
			}
			p.mu.Unlock()
		case errors.Is(aerr, unix.EMFILE), errors.Is(aerr, unix.ENFILE), errors.Is(aerr, unix.ENOMEM), errors.Is(aerr, unix.ENOBUFS):
			time.Sleep(acceptPause)
		}
	}
}

// able reports whether somebody can be given a connection. p.mu is held.
func (d *dealer) able() bool {
	if len(d.back) > 0 && d.anyone() != nil {
		return true
	}
	if !d.sticky {
		return len(d.free) > 0
	}
	for w, dealt := range d.l.users {
		if dealt && d.fit(w) {
			return true
		}
	}
	return false
}

// anyone is a worker that accepts for itself, where there are no others: what
// was accepted before the policy changed goes to that. p.mu is held.
func (d *dealer) anyone() (w *Worker) {
	for u, dealt := range d.l.users {
		if dealt {
			return nil
		}
		if !u.leaving {
			w = u
		}
	}
	return w
}

// fit reports whether a worker can be given a connection where clients stick to
// theirs. p.mu is held.
func (d *dealer) fit(w *Worker) bool { return !w.leaving && len(w.dealt) < stickyAhead }

// choose is the worker for c. p.mu is held, and somebody is able.
func (d *dealer) choose(c *conn) *Worker {
	if w := d.anyone(); w != nil {
		return w
	}
	if !d.sticky {
		w := d.free[0]
		d.free = d.free[1:]
		return w
	}
	// Of all workers the one that has the highest score with this client: when
	// one comes or goes the scores of the others stay. Where two have one
	// number, one is there to replace the other.
	var best *Worker
	var top uint64
	better := func(w *Worker, score uint64) bool {
		switch {
		case best == nil:
			return true
		case w == c.not || best == c.not:
			return best == c.not
		case score != top:
			return score > top
		}
		return w.age > best.age
	}
	for w, dealt := range d.l.users {
		if !dealt || !d.fit(w) {
			continue
		}
		if s := score(c.from, w.number); better(w, s) {
			best, top = w, s
		}
	}
	return best
}

// score mixes a client and a worker's number (splitmix64).
func score(client uint64, worker int) uint64 {
	x := client + 0x9e3779b97f4a7c15*uint64(worker+1)
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// hashOf is a hash of a client's address without its port; IPv4 is the same by
// an IPv6 socket.
func hashOf(sa unix.Sockaddr) uint64 {
	var a netip.Addr
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		a = netip.AddrFrom4(sa.Addr)
	case *unix.SockaddrInet6:
		a = netip.AddrFrom16(sa.Addr).Unmap()
	default:
		return 0
	}
	h := fnv.New64a()
	_, _ = h.Write(a.AsSlice())
	return h.Sum64()
}

// give sends c to the next worker. p.mu is held, and somebody is able.
func (d *dealer) give(c conn) {
	w := d.choose(&c)
	copied, err := unix.FcntlInt(uintptr(c.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		_ = unix.Close(c.fd)
		d.offer(w)
		return
	}
	seq := d.p.nextSeq()
	if w.dealt == nil {
		w.dealt = make(map[int64]conn)
	}
	w.dealt[seq] = c
	o := order{Cmd: cmdCluster, Act: "newconn", Key: d.l.key, Seq: seq}
	if w.push(withHandle{Cmd: cmdHandle, Type: "net.Native", Msg: o}, copied) != nil {
		// It is about to be gone, and then the next one gets it; but it may
		// have been gone before.
		if _, alive := d.p.workers[w]; !alive {
			delete(w.dealt, seq)
			d.again(c)
		}
	}
}

// offer says that w can take one. p.mu is held.
func (d *dealer) offer(w *Worker) {
	if !d.l.users[w] || w.leaving || d.stopped {
		return
	}
	if !slices.Contains(d.free, w) {
		d.free = append(d.free, w)
	}
	d.wake.Signal()
}

// withdraw says that w takes none any more. p.mu is held.
func (d *dealer) withdraw(w *Worker) {
	d.free = slices.DeleteFunc(d.free, func(f *Worker) bool { return f == w })
	if !d.able() {
		_ = d.f.SetReadDeadline(time.Unix(1, 0)) // it may be accepting
	}
}

// again has c dealt once more, unless everybody refused it. p.mu is held.
func (d *dealer) again(c conn) {
	if c.tries++; d.stopped || c.tries > len(d.l.users)+1 {
		_ = unix.Close(c.fd)
		return
	}
	d.back = append(d.back, c)
	d.wake.Signal()
	_ = d.f.SetReadDeadline(time.Unix(1, 0)) // it may be accepting
}

// stop ends the dealer. p.mu is held.
func (d *dealer) stop() {
	d.stopped = true
	for _, c := range d.back {
		_ = unix.Close(c.fd)
	}
	d.back, d.free = nil, nil
	d.wake.Broadcast()
	_ = d.f.SetReadDeadline(time.Unix(1, 0))
}

// dealt handles a worker's answer to a connection. p.mu is held.
func (p *Primary) dealt(w *Worker, seq int64, accepted bool) {
	c, ok := w.dealt[seq]
	if !ok {
		return
	}
	delete(w.dealt, seq)
	if accepted {
		_ = unix.Close(c.fd)
	} else {
		c.not = w
		c.d.again(c)
	}
	c.d.offer(w)
}

// undealt has what a worker left unanswered dealt again: it is told to have a
// connection before it reads from it. p.mu is held.
func (p *Primary) undealt(w *Worker) {
	for seq, c := range w.dealt {
		delete(w.dealt, seq)
		c.d.again(c)
	}
}
