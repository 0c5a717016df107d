package cluster

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// acceptPause is how long accepting rests when there are no descriptors left.
const acceptPause = 100 * time.Millisecond

// dealer accepts for a listener and gives each connection to the worker that
// has waited longest. A worker has one at a time until it says that it has
// it, and nothing is accepted while none waits: what is in the kernel's queue
// survives this process.
type dealer struct {
	p *Primary
	l *listener
	f *os.File // a second descriptor of the listener, in Go's poller

	// The rest is guarded by p.mu.
	wake    *sync.Cond
	free    []*Worker
	back    []conn // refused by a worker, or left by one that died
	stopped bool
}

// conn is an accepted connection on its way.
type conn struct {
	d     *dealer
	fd    int
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
		for !d.stopped && len(d.free) == 0 {
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
			c.fd, _, aerr = unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if errors.Is(aerr, unix.EAGAIN) {
				// One that was given back is to be had without a new one.
				p.mu.Lock()
				defer p.mu.Unlock()
				return len(d.back) > 0
			}
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
			case len(d.free) == 0: // the one that waited has gone
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

// give sends c to the next worker. p.mu is held, and one is free.
func (d *dealer) give(c conn) {
	w := d.free[0]
	d.free = d.free[1:]
	copied, err := unix.FcntlInt(uintptr(c.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		_ = unix.Close(c.fd)
		d.free = append(d.free, w)
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
	if _, user := d.l.users[w]; !user || w.leaving || d.stopped || slices.Contains(d.free, w) {
		return
	}
	d.free = append(d.free, w)
	d.wake.Signal()
}

// withdraw says that w takes none any more. p.mu is held.
func (d *dealer) withdraw(w *Worker) {
	d.free = slices.DeleteFunc(d.free, func(f *Worker) bool { return f == w })
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
