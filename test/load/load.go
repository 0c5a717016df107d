// Package load is HTTP clients that put a server under load and hold every
// failure against it. Unlike net/http's client they never try again: a server
// that closes a connection on which the next request is already under way has
// failed it, unless its answer before had said "Connection: close".
//
// It must never import anything of the program.
package load

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Kinds of failure.
const (
	Refused  = "connection refused"
	Reset    = "connection reset"
	EOFKept  = "end of a connection that was kept, without an answer"
	EOFFresh = "end of a new connection, without an answer"
	Timeout  = "no answer in time"
	Status   = "a status other than 200"
	Other    = "other"
)

// Options of a load. Addr and at least one client are needed.
type Options struct {
	Network string // "tcp" (the default) or "unix"
	Addr    string
	Path    string // default "/"
	Kept    int    // clients that use one connection for as long as it is kept
	Fresh   int    // clients that open a connection for each request
	// Think is what a client waits between two requests. 0: nothing.
	Think time.Duration
	// Timeout of one request, connecting included. 0: 30 s.
	Timeout time.Duration
	// From is the client address to connect from, by number of the client.
	// nil: the system's choice.
	From func(client int) net.Addr
}

// Failure is a request that failed.
type Failure struct {
	Kind  string
	Begun time.Time // when the client began with the request
	Err   error
}

// Figures are what came of a load.
type Figures struct {
	Requests int
	Took     time.Duration
	By       map[string]int // answers, by the first line of their body
	Failures []Failure
	Longest  time.Duration // the longest request that did not fail
	// Places are the answers, by client and the first line of their body.
	Places []map[string]int
}

// Kinds counts the failures by their kind.
func (f *Figures) Kinds() map[string]int {
	m := map[string]int{}
	for _, x := range f.Failures {
		m[x.Kind]++
	}
	return m
}

// String is "1234 requests in 5.1s, 0 failed, longest 80ms".
func (f *Figures) String() string {
	s := fmt.Sprintf("%d requests in %v, %d failed, longest %v", f.Requests, f.Took.Round(10*time.Millisecond), len(f.Failures), f.Longest.Round(time.Millisecond))
	kinds := f.Kinds()
	for _, k := range slices.Sorted(maps.Keys(kinds)) {
		s += fmt.Sprintf("; %d × %s", kinds[k], k)
	}
	for i, x := range f.Failures {
		if i == 3 {
			break
		}
		s += fmt.Sprintf("; e.g. %v", x.Err)
	}
	return s
}

// Load is clients at work. End it with [Load.Stop].
type Load struct {
	o      Options
	cancel context.CancelFunc
	wg     sync.WaitGroup
	began  time.Time

	mu   sync.Mutex
	f    Figures
	more *sync.Cond // a request has ended
}

// Start puts clients to work.
func Start(o Options) *Load {
	if o.Network == "" {
		o.Network = "tcp"
	}
	if o.Path == "" {
		o.Path = "/"
	}
	if o.Timeout == 0 {
		o.Timeout = 30 * time.Second
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := &Load{o: o, cancel: cancel, began: time.Now(), f: Figures{By: map[string]int{}}}
	l.more = sync.NewCond(&l.mu)
	for n := range o.Kept + o.Fresh {
		c := &client{o: &l.o, keep: n < o.Kept}
		if o.From != nil {
			c.from = o.From(n)
		}
		l.f.Places = append(l.f.Places, map[string]int{})
		l.wg.Go(func() { l.work(ctx, n, c) })
	}
	return l
}

func (l *Load) work(ctx context.Context, n int, c *client) {
	defer c.close()
	for ctx.Err() == nil {
		begun := time.Now()
		answer, err := c.ask()
		took := time.Since(begun)
		l.mu.Lock()
		l.f.Requests++
		if err != nil {
			l.f.Failures = append(l.f.Failures, Failure{Kind: kindOf(err), Begun: begun, Err: err})
		} else {
			l.f.By[answer]++
			l.f.Places[n][answer]++
			l.f.Longest = max(l.f.Longest, took)
		}
		l.mu.Unlock()
		l.more.Broadcast()
		pause := l.o.Think
		if err != nil {
			pause = max(pause, 5*time.Millisecond)
		}
		if pause > 0 {
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
	}
}

// Wait returns when n more requests have ended, or with an error after the
// time.
func (l *Load) Wait(n int, within time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	late := false
	t := time.AfterFunc(within, func() {
		l.mu.Lock()
		late = true
		l.mu.Unlock()
		l.more.Broadcast()
	})
	defer t.Stop()
	for until := l.f.Requests + n; l.f.Requests < until; l.more.Wait() {
		if late {
			return fmt.Errorf("load: %d requests are still missing after %v", until-l.f.Requests, within)
		}
	}
	return nil
}

// Figures are those so far.
func (l *Load) Figures() Figures {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.f
	f.Took = time.Since(l.began)
	f.By, f.Failures = maps.Clone(f.By), slices.Clone(f.Failures)
	f.Places = nil
	for _, m := range l.f.Places {
		f.Places = append(f.Places, maps.Clone(m))
	}
	return f
}

// Stop has the clients finish the request they are at, and tells what came of
// it all.
func (l *Load) Stop() Figures {
	l.cancel()
	l.wg.Wait()
	return l.Figures()
}

// Get is one request over a connection of its own; the answer is the first
// line of the body.
func Get(network, addr string) (string, error) {
	c := &client{o: &Options{Network: network, Addr: addr, Path: "/", Timeout: 30 * time.Second}}
	defer c.close()
	return c.ask()
}

// client sends requests, one after the other.
type client struct {
	o    *Options
	keep bool
	from net.Addr
	conn net.Conn
	in   *bufio.Reader
}

func (c *client) close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// failure is an error with its kind.
type failure struct {
	kind string
	err  error
}

func (f *failure) Error() string { return f.kind + ": " + f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func kindOf(err error) string {
	var f *failure
	if errors.As(err, &f) {
		return f.kind
	}
	return Other
}

func (c *client) ask() (answer string, err error) {
	fresh := c.conn == nil
	if fresh {
		d := net.Dialer{Timeout: c.o.Timeout, LocalAddr: c.from}
		if c.conn, err = d.Dial(c.o.Network, c.o.Addr); err != nil {
			c.conn = nil
			return "", classify(err, fresh)
		}
		c.in = bufio.NewReader(c.conn)
	}
	defer func() {
		if err != nil || !c.keep {
			c.close()
		}
	}()
	_ = c.conn.SetDeadline(time.Now().Add(c.o.Timeout))
	closing := ""
	if !c.keep {
		closing = "Connection: close\r\n"
	}
	if _, err := io.WriteString(c.conn, "GET "+c.o.Path+" HTTP/1.1\r\nHost: x\r\n"+closing+"\r\n"); err != nil {
		return "", classify(err, fresh)
	}
	res, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return "", classify(err, fresh)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return "", classify(err, fresh)
	}
	if res.StatusCode != http.StatusOK {
		return "", &failure{Status, fmt.Errorf("%s: %.200s", res.Status, body)}
	}
	if res.Close {
		c.close()
	}
	answer, _, _ = strings.Cut(string(body), "\n")
	return answer, nil
}

func classify(err error, fresh bool) error {
	kind := Other
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		kind = Refused
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		kind = Reset
	case errors.Is(err, os.ErrDeadlineExceeded):
		kind = Timeout
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		if kind = EOFKept; fresh {
			kind = EOFFresh
		}
	}
	return &failure{kind, err}
}
