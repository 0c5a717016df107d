package ipc

import (
	"errors"
	"sync"
	"time"
)

const (
	// spinFor bounds how long a caller reads for its answer itself, without
	// rest. An answer that takes longer is worth the switches that it costs.
	spinFor = 100 * time.Microsecond
	// lendFor is how long the goroutine in Serve leaves the reading to callers
	// that make no use of it.
	lendFor = time.Millisecond
	// expectFor bounds how long a worker looks for its next task so.
	expectFor = 30 * time.Microsecond
	// minSkip to maxSkip are how many messages are waited for in the ordinary
	// way after attempts that came to nothing.
	minSkip, maxSkip = 1, 1024
)

// spin says whether it is worth it to look for a message without rest: where
// that comes to nothing it is left for twice as many messages each time, so that
// what it costs in vain comes to nothing too.
type spin struct{ skip, pause int }

// skips reports whether this message is to be waited for in the ordinary way.
func (s *spin) skips() bool {
	if s.skip == 0 {
		return false
	}
	s.skip--
	return true
}

func (s *spin) paid() { s.pause /= 2 }

func (s *spin) failed() {
	s.pause = min(max(2*s.pause, minSkip), maxSkip)
	s.skip = s.pause
}

// errNothing: nothing was there to be read, for as long as was waited.
var errNothing = errors.New("ipc: nothing to read yet")

// Awaiter is a Conn whose callers may read their answer themselves, which
// spares the two switches between goroutines and threads that the way through
// Serve costs.
type Awaiter interface {
	Conn
	// Await is called after Start of a request with Request.Wait set. It reads
	// the channel in place of Serve until the request has ended, or for a very
	// short time: its return says nothing of the request. What arrives is handed
	// on in the caller's goroutine. It keeps a processor busy, so it should be
	// called for one request of the process at a time, and never where the
	// worker needs that processor.
	Await(r *Request)
}

// reader is who reads a channel. It is guarded by the Conn's lock.
type reader uint8

const (
	serving reader = iota // the goroutine in Serve
	free                  // nobody: nothing is under way
	leading               // a caller in Await
)

// lead hands the reading of a channel from the goroutine in Serve to callers
// that wait for an answer, and back: to a caller only while nothing else is
// under way, back as soon as something is that no caller reads for. Only who
// has the reading may touch what reads.
type lead struct {
	mu   *sync.Mutex // the Conn's
	sock *socket
	back chan struct{} // Serve is to go on; room for one

	who    reader
	asked  time.Time // when a caller came last
	wanted bool      // a caller would have read, soon after the one before
	used   bool      // one has, of late
	spin   spin
	err    error // what a caller read

	mine *Request // the caller's, until it has ended; of the one that reads
}

func (l *lead) init(mu *sync.Mutex, sock *socket) {
	l.mu, l.sock, l.back = mu, sock, make(chan struct{}, 1)
}

// giveBack makes Serve the one that reads; the lock is held.
func (l *lead) giveBack() {
	if l.who != serving {
		l.who = serving
		l.back <- struct{}{}
	}
}

// started is called when r was started; the lock is held.
func (l *lead) started(r *Request) {
	if l.who == free && !r.Wait {
		l.giveBack()
	}
}

// ended is called by the one that reads when r has ended.
func (l *lead) ended(r *Request) {
	if l.mine == r {
		l.mine = nil
	}
}

// lend is called by Serve between two reads. It leaves the reading to callers
// as long as they read, if nothing is under way.
func (l *lead) lend(pending func() int) error {
	l.mu.Lock()
	if !l.wanted || pending() > 0 {
		l.mu.Unlock()
		return nil
	}
	l.who, l.wanted, l.used = free, false, false
	l.mu.Unlock()
	l.sock.unpoll()
	t := time.NewTimer(lendFor)
	defer t.Stop()
	for {
		select {
		case <-l.back:
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.err
		case <-t.C:
		}
		l.mu.Lock()
		if l.who == free && !l.used {
			l.who = serving
			l.mu.Unlock()
			return nil
		}
		l.used = false
		l.mu.Unlock()
		t.Reset(lendFor)
	}
}

// await is Await: turn reads and handles what is there and returns errNothing
// where that is nothing.
func (l *lead) await(r *Request, pending func() int, turn func() error) {
	l.mu.Lock()
	switch {
	case l.who != serving || l.spin.skips():
	default:
		now := time.Now()
		l.wanted = now.Sub(l.asked) < lendFor
		l.asked = now
	}
	if l.who != free || pending() == 0 {
		l.mu.Unlock()
		return
	}
	l.who, l.used = leading, true
	l.mine = r
	l.mu.Unlock()
	err := errors.New("ipc: a receiver panicked")
	defer func() { // a receiver may panic, and its caller go on
		l.mu.Lock()
		defer l.mu.Unlock()
		l.mine = nil
		switch {
		case errors.Is(err, errNothing):
			l.spin.failed()
			l.giveBack()
		case err != nil:
			l.err = err
			l.giveBack()
		case pending() > 0:
			l.giveBack()
		default:
			l.spin.paid()
			l.who = free
		}
	}()
	begin := time.Now()
	for l.mine != nil {
		e := turn()
		switch {
		case e != nil && !errors.Is(e, errNothing):
			err = e
			return
		case l.mine != nil && time.Since(begin) > spinFor:
			err = errNothing // what came was something else, or pieces
			return
		}
		// No runtime.Gosched: it wakes a thread, each time.
	}
	err = nil
}
