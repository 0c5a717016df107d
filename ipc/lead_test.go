package ipc

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// answers is a Receiver that notes in whose goroutine it was told.
type answers struct {
	ends chan error
	led  *atomic.Int64
}

func (a *answers) End(r *Request, body []byte, err error) {
	if bytes.Contains(debug.Stack(), []byte("(*lead).await")) {
		a.led.Add(1)
	}
	if err == nil && !bytes.Equal(bytes.Trim(body, `"`), bytes.Trim(r.Body, `"`)) {
		err = fmt.Errorf("sent %s, got %s", r.Body, body)
	}
	a.ends <- err
}
func (a *answers) Progress(*Request, []byte) {}
func (a *answers) Chunk(*Request, []byte)    {}

// echo is a worker that returns what it gets, sometimes late or in pieces.
func echo(t *testing.T, b *os.File, node bool) {
	if node {
		buf := make([]byte, 1<<16)
		for {
			n, err := b.Read(buf)
			if err != nil {
				return
			}
			half := rand.IntN(n)
			if rand.IntN(50) == 0 {
				time.Sleep(time.Millisecond)
			}
			if _, err := b.Write(buf[:half]); err != nil {
				return
			}
			if _, err := b.Write(buf[half:n]); err != nil {
				return
			}
		}
	}
	ch, err := NewChannel(b, ChannelOptions{})
	if err != nil {
		t.Error(err)
		return
	}
	if ch.SendHello(Hello{}) != nil {
		return
	}
	for {
		f, _, _, err := ch.Receive()
		if err != nil {
			return
		}
		if f.Type != TypeTask {
			continue
		}
		_, _, body, err := ParseTask(f.Payload)
		if err != nil {
			t.Error(err)
			return
		}
		if rand.IntN(50) == 0 {
			time.Sleep(time.Millisecond)
		}
		frame := AppendFrame(nil, Frame{Type: TypeResult, ID: f.ID, Payload: body})
		half := rand.IntN(len(frame))
		ch.Flush(time.Second)
		if _, err := b.Write(frame[:half]); err != nil {
			return
		}
		if _, err := b.Write(frame[half:]); err != nil {
			return
		}
	}
}

// Whoever reads, every request ends once and with its own answer: one after
// the other, among others that are not awaited, and at the end of the channel.
func TestAwait(t *testing.T) {
	for _, node := range []bool{false, true} {
		t.Run(fmt.Sprint("node=", node), func(t *testing.T) {
			a, b := pair(t)
			var c Awaiter
			var l *lead
			if node {
				nc, err := NewNode(a, Options{})
				if err != nil {
					t.Fatal(err)
				}
				c, l = nc, &nc.lead
			} else {
				fc, err := NewFrames(a, Options{})
				if err != nil {
					t.Fatal(err)
				}
				c, l = fc.(Awaiter), &fc.(*frames).lead
			}
			var wg sync.WaitGroup
			wg.Go(func() { echo(t, b, node); b.Close() })
			served := make(chan error, 1)
			ready := make(chan struct{})
			go func() { served <- c.Serve(func() { close(ready) }) }()
			<-ready
			var led atomic.Int64
			one := func(wait bool, i int) error {
				to := &answers{ends: make(chan error, 2), led: &led}
				r := &Request{Body: fmt.Appendf(nil, `"%d"`, i), To: to, Wait: wait}
				if err := c.Start(r); err != nil {
					return err
				}
				if wait {
					c.Await(r)
				}
				return <-to.ends
			}
			// Until it is read so at all: how quick this machine is now is unknown.
			for i := 0; led.Load() < 100; i++ {
				l.mu.Lock()
				l.spin = spin{}
				l.mu.Unlock()
				if err := one(true, i); err != nil {
					t.Fatal(err)
				}
			}
			var callers sync.WaitGroup
			for k := range 4 {
				callers.Go(func() {
					for i := range 300 {
						if err := one(k < 2 && i%3 > 0, k*1000+i); err != nil {
							t.Error(err)
							return
						}
						if i%10 == 0 {
							time.Sleep(time.Duration(rand.IntN(4)) * time.Millisecond)
						}
					}
				})
			}
			for i := range 300 {
				if err := one(true, 5000+i); err != nil {
					t.Error(err)
				}
			}
			callers.Wait()
			c.Close()
			if err := <-served; err != nil {
				t.Error("Serve:", err)
			}
			wg.Wait()
		})
	}
}

// The end of the channel reaches a request that nobody reads for, and one whose
// caller does.
func TestAwaitEnds(t *testing.T) {
	for i := range 20 {
		a, b := pair(t)
		c, err := NewNode(a, Options{})
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			buf := make([]byte, 100)
			for range 50 + i {
				n, err := b.Read(buf)
				if err != nil {
					return
				}
				if _, err := b.Write(buf[:n]); err != nil {
					return
				}
			}
			b.Close()
		})
		served := make(chan error, 1)
		go func() { served <- c.Serve(nil) }()
		var led atomic.Int64
		for {
			to := &answers{ends: make(chan error, 2), led: &led}
			r := &Request{Body: []byte("1"), To: to, Wait: true}
			err := c.Start(r)
			if err == nil {
				c.Await(r)
				err = <-to.ends
			}
			if err != nil {
				if !errors.Is(err, ErrClosed) {
					t.Error(err)
				}
				break
			}
		}
		if err := <-served; err != nil {
			t.Error("Serve:", err)
		}
		wg.Wait()
	}
}

// A receiver that panics in its caller's goroutine ends the channel, whose
// caller may go on.
func TestAwaitPanics(t *testing.T) {
	a, b := pair(t)
	c, err := NewNode(a, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { echo(t, b, true) })
	served := make(chan error, 1)
	go func() { served <- c.Serve(nil) }()
	var led atomic.Int64
	for panicked := false; !panicked; {
		to := &onlyLed{answers{ends: make(chan error, 2), led: &led}}
		r := &Request{Body: []byte("1"), To: to, Wait: true}
		if err := c.Start(r); err != nil {
			t.Fatal(err)
		}
		func() {
			defer func() { panicked = recover() != nil }()
			c.Await(r)
		}()
		if err := <-to.ends; err != nil {
			t.Error(err)
		}
	}
	if err := <-served; err == nil {
		t.Error("Serve: no error")
	}
	wg.Wait()
}

// onlyLed panics where it is told in a caller's goroutine.
type onlyLed struct{ answers }

func (o *onlyLed) End(r *Request, body []byte, err error) {
	before := o.led.Load()
	o.answers.End(r, body, err)
	if o.led.Load() > before {
		panic("receiver")
	}
}

// A socket that is polled only while somebody waits: nothing is lost whichever
// way it is read, and close and interrupt end whoever waits.
func TestSocket(t *testing.T) {
	a, b := pair(t)
	s := sock(t, a)
	in := newInbox(s)
	defer in.close()
	far := sock(t, b)
	w := newWriter(far, 0)
	const total = 2000
	go func() {
		for i := range total {
			if err := w.queue([]byte{byte(i)}, nil); err != nil {
				t.Error(err)
			}
			w.flush(false)
			if rand.IntN(20) == 0 {
				time.Sleep(time.Duration(rand.IntN(100)) * time.Microsecond)
			}
		}
	}()
	buf := make([]byte, 7)
	for got := 0; got < total; {
		switch rand.IntN(4) {
		case 0:
			s.unpoll()
		case 1:
			in.expected = true
		case 2:
			in.nowait = true
		}
		n, err := in.Read(buf)
		if in.nowait && errors.Is(err, errNothing) {
			err = nil
		}
		in.nowait = false
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range buf[:n] {
			if x != byte(got) {
				t.Fatalf("byte %d is %d", got, x)
			}
			got++
		}
	}
	// One that waits for room, in a socket that is full.
	body := bytes.Repeat([]byte{1}, 4<<20)
	if err := far.base.SetDeadline(time.Time{}); err == nil {
		t.Error("the base is polled")
	}
	if err := w.queue(nil, body); err != nil {
		t.Fatal(err)
	}
	w.flush(false)
	big := make([]byte, 64<<10)
	for left := len(body); left > 0; {
		n, err := in.Read(big)
		if err != nil {
			t.Fatal(err)
		}
		left -= n
	}
	// Interrupted, while it waits and before it does.
	for _, first := range []bool{false, true} {
		end := make(chan error, 1)
		if first {
			s.unpoll()
		}
		go func() {
			_, err := in.Read(buf)
			end <- err
		}()
		if err := s.interrupt(); err != nil {
			t.Fatal(err)
		}
		if err := <-end; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("interrupted: %v", err)
		}
	}
	// Closed, while one waits to read and one to write.
	a, b = pair(t)
	s, far = sock(t, a), sock(t, b)
	in2 := newInbox(s)
	defer in2.close()
	end := make(chan error, 1)
	go func() {
		_, err := in2.Read(buf)
		end <- err
	}()
	w = newWriter(s, 0)
	if err := w.queue(nil, body); err != nil {
		t.Fatal(err)
	}
	w.flush(false)
	s.Close()
	if err := <-end; !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	far.Close()
}
