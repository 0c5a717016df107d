package ipc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestFrameRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		frames := rapid.SliceOf(rapid.Custom(func(t *rapid.T) Frame {
			f := Frame{
				Type: Type(rapid.SampledFrom([]int{3, 4, 5, 6, 128, 255}).Draw(t, "type")),
				ID:   rapid.Uint32().Draw(t, "id"),
			}
			f.Payload = bytes.Repeat([]byte{byte(f.ID)}, rapid.SampledFrom([]int{0, 1, 100, readSize - HeaderSize, readSize, 3 * readSize}).Draw(t, "size"))
			return f
		})).Draw(t, "frames")
		var wire []byte
		for _, f := range frames {
			wire = AppendFrame(wire, f)
		}
		var in io.Reader = bytes.NewReader(wire)
		switch rapid.IntRange(0, 2).Draw(t, "reader") {
		case 1:
			in = iotest.HalfReader(in)
		case 2:
			in = iotest.DataErrReader(in)
		}
		r := frameReader{r: in, limit: DefaultMaxFrame}
		for _, want := range frames {
			f, _, err := r.next()
			if err != nil || f.Type != want.Type || f.ID != want.ID || !bytes.Equal(f.Payload, want.Payload) {
				t.Fatalf("got %v %d (%d bytes), %v; want %v %d (%d bytes)", f.Type, f.ID, len(f.Payload), err, want.Type, want.ID, len(want.Payload))
			}
		}
		if _, _, err := r.next(); !errors.Is(err, io.EOF) {
			t.Fatalf("at the end: %v", err)
		}
	})
}

func TestFrameReaderRefuses(t *testing.T) {
	big := AppendHeader(nil, TypeResult, 1, 1<<31-1)
	for _, c := range []struct {
		name string
		wire []byte
		want error
	}{
		{"type 0", make([]byte, 12), ErrProtocol},
		{"reserved", []byte{0, 0, 0, 0, 5, 1, 0, 0, 0, 0, 0, 0}, ErrProtocol},
		{"too large", big, ErrTooLarge},
		{"hello too large", AppendHeader(nil, TypeHello, 0, maxHello+1), ErrTooLarge},
		{"ping too large", AppendHeader(nil, TypePing, 0, 65), ErrTooLarge},
		{"half a header", make([]byte, 5), io.ErrUnexpectedEOF},
		{"half a payload", append(AppendHeader(nil, TypeResult, 1, 10), 1, 2), io.ErrUnexpectedEOF},
		{"announced only", append(AppendHeader(nil, TypeResult, 1, 60<<20), 1, 2), io.ErrUnexpectedEOF},
	} {
		r := frameReader{r: bytes.NewReader(c.wire), limit: DefaultMaxFrame}
		if _, _, err := r.next(); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

func TestTaskPayload(t *testing.T) {
	b := append(appendTask(nil, 7, "näme", 1500*time.Microsecond, 4), "body"...)
	_, id, n, err := parseHeader(b, DefaultMaxFrame)
	if err != nil || id != 7 || n != len(b)-HeaderSize {
		t.Fatal(id, n, err)
	}
	name, timeout, body, err := ParseTask(b[HeaderSize:])
	if err != nil || name != "näme" || timeout != 2*time.Millisecond || string(body) != "body" {
		t.Errorf("%q, %s, %q, %v", name, timeout, body, err)
	}
}

// pair returns both ends of a channel as non-blocking files.
func pair(t testing.TB) (a, b *os.File) {
	t.Helper()
	a, c, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(c.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	b = os.NewFile(uintptr(fd), "child")
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// sock takes over f until the end of the test.
func sock(t testing.TB, f *os.File) *socket {
	t.Helper()
	s, err := newSocket(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// Many writers, and a reader that is slow at first: everything arrives, whole,
// and each writer's frames in order.
func TestChannelOrder(t *testing.T) {
	a, b := pair(t)
	ca, err := NewChannel(a, ChannelOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cb, err := NewChannel(b, ChannelOptions{})
	if err != nil {
		t.Fatal(err)
	}
	const writers, each = 8, 300
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				payload := bytes.Repeat([]byte{byte(w)}, []int{0, 8, 1000, 20 << 10}[i%4])
				send := func(id uint32, payload []byte) error { return ca.Send(TypeChunk, id, payload) }
				if i%3 == 0 {
					send = func(id uint32, payload []byte) error { return ca.SendResult(id, payload, Answer{Soon: true}) }
				}
				if i%50 == 0 {
					ca.Hold()
				}
				if err := send(uint32(w<<16|i), payload); err != nil {
					t.Error(err)
				}
				if i%50 == 0 {
					ca.Release()
				}
			}
		})
	}
	next := make([]int, writers)
	for range writers * each {
		f, _, _, err := cb.Receive()
		if err != nil {
			t.Fatal(err)
		}
		w, i := int(f.ID>>16), int(f.ID&0xffff)
		if i != next[w] || len(f.Payload) != []int{0, 8, 1000, 20 << 10}[i%4] || len(bytes.Trim(f.Payload, string(rune(w)))) != 0 {
			t.Fatalf("writer %d: frame %d with %d bytes, want %d", w, i, len(f.Payload), next[w])
		}
		next[w]++
	}
	wg.Wait()
	ca.Flush(time.Minute)
	ca.Close()
	if _, _, _, err := cb.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	if err := ca.Send(TypeChunk, 1, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Send after Close: %v", err)
	}
}

func TestChannelFull(t *testing.T) {
	a, _ := pair(t)
	c, err := NewChannel(a, ChannelOptions{MaxQueued: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if err = c.Send(TypeChunk, 1, make([]byte, 1<<20)); err != nil {
			break
		}
	}
	if !errors.Is(err, ErrFull) {
		t.Errorf("Send to a side that does not read: %v", err)
	}
	c.SetPeer(Hello{MaxFrame: 10})
	if err := c.Send(TypeChunk, 1, make([]byte, 11)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("Send of more than the other side takes: %v", err)
	}
	c.Close()
}

// ends records what a Receiver is told.
type ends struct {
	mu  sync.Mutex
	got []string
	c   chan struct{}
}

func newEnds() *ends { return &ends{c: make(chan struct{}, 1000)} }

func (e *ends) End(r *Request, body []byte, err error) {
	closeFiles(r.Got)
	if r.Release != nil {
		r.Release()
	}
	e.mu.Lock()
	e.got = append(e.got, fmt.Sprintf("%s: %s, %v", r.Body, body, err))
	e.mu.Unlock()
	e.c <- struct{}{}
}
func (e *ends) Progress(*Request, []byte) {}
func (e *ends) Chunk(*Request, []byte)    {}

// A worker that breaks the protocol in whatever way ends its channel and what
// was under way on it, and nothing panics.
func TestFramesViolations(t *testing.T) {
	hello := AppendHello(nil, Hello{Remuda: 1})
	for _, c := range []struct {
		name string
		wire []byte
		want string
	}{
		{"end", hello, "<nil>"},
		{"garbage", []byte("GET / HTTP/1.1\r\n\r\n"), "protocol violation"},
		{"no hello", AppendFrame(nil, Frame{Type: TypeResult, ID: 1}), "not HELLO"},
		{"two hellos", append(hello[:len(hello):len(hello)], hello...), "second HELLO"},
		{"version", AppendHello(nil, Hello{Remuda: 2}), "version 2"},
		{"bad hello", AppendFrame(nil, Frame{Type: TypeHello, Payload: []byte("{")}), "hello"},
		{"unknown id", AppendFrame(hello[:len(hello):len(hello)], Frame{Type: TypeResult, ID: 99}), "no task under way"},
		{"progress of nothing", AppendFrame(hello[:len(hello):len(hello)], Frame{Type: TypeProgress, ID: 99}), "no task under way"},
		{"task", AppendFrame(hello[:len(hello):len(hello)], Frame{Type: TypeTask, ID: 1}), "unexpected frame TASK"},
		{"bad error", AppendFrame(hello[:len(hello):len(hello)], Frame{Type: TypeError, ID: 1, Payload: []byte("x")}), "error"},
		{"half", append(hello[:len(hello):len(hello)], 1, 2, 3), "unexpected EOF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := pair(t)
			conn, err := NewFrames(a, Options{})
			if err != nil {
				t.Fatal(err)
			}
			e := newEnds()
			if err := conn.Start(&Request{Body: []byte("x"), To: e}); err != nil {
				t.Fatal(err)
			}
			if _, err := b.Write(c.wire); err != nil {
				t.Fatal(err)
			}
			fd := int(b.Fd())
			_ = unix.Shutdown(fd, unix.SHUT_WR)
			err = conn.Serve(nil)
			if !strings.Contains(fmt.Sprint(err), c.want) {
				t.Errorf("Serve = %v, want %s", err, c.want)
			}
			if len(e.got) != 1 || !strings.Contains(e.got[0], "channel closed") {
				t.Errorf("ends: %q", e.got)
			}
			if err := conn.Start(&Request{To: e}); !errors.Is(err, ErrClosed) {
				t.Errorf("Start after the end: %v", err)
			}
		})
	}
}

func TestFramesConn(t *testing.T) {
	a, b := pair(t)
	conn, err := NewFrames(a, Options{Concurrency: 3})
	if err != nil {
		t.Fatal(err)
	}
	w, err := NewChannel(b, ChannelOptions{})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error)
	ready := make(chan struct{})
	go func() { served <- conn.Serve(func() { close(ready) }) }()
	f, _, _, err := w.Receive()
	if err != nil || f.Type != TypeHello {
		t.Fatal(f.Type, err)
	}
	if h, err := ParseHello(f.Payload); err != nil || h.Concurrency != 3 {
		t.Fatal(h, err)
	}
	if err := w.SendHello(Hello{}); err != nil {
		t.Fatal(err)
	}
	<-ready
	e := newEnds()
	one, two, three := &Request{Body: []byte("1"), To: e}, &Request{Body: []byte("2"), To: e}, &Request{Body: []byte("3"), To: e}
	conn.Cancel(three) // before it was sent
	if err := errors.Join(conn.Start(one), conn.Start(two)); err != nil {
		t.Fatal(err)
	}
	if err := conn.Start(three); !errors.Is(err, ErrCancelled) {
		t.Errorf("Start of a cancelled request: %v", err)
	}
	conn.Cancel(one)
	conn.Ping()
	var got []string
	for range 4 {
		f, _, _, err := w.Receive()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%s%d", f.Type, f.ID))
	}
	if want := []string{"TASK1", "TASK2", "CANCEL1", "PING1"}; fmt.Sprint(got) != "["+strings.Join(want, " ")+"]" {
		t.Errorf("the worker got %v, want %v", got, want)
	}
	before := conn.Heard()
	if err := errors.Join(w.Send(TypePong, 1, nil), w.Send(200, 0, []byte("extension")), w.Send(TypeResult, 2, []byte("two")), w.SendError(1, &TaskError{Message: "no"}, Answer{})); err != nil {
		t.Fatal(err)
	}
	<-e.c
	<-e.c
	if want := "2: two, <nil>|1: , no"; strings.Join(e.got, "|") != want {
		t.Errorf("ends: %q, want %q", strings.Join(e.got, "|"), want)
	}
	if conn.Heard() == before {
		t.Error("nothing was heard")
	}
	conn.Stop()
	if f, _, _, err := w.Receive(); err != nil || f.Type != TypeStop {
		t.Errorf("after Stop: %v, %v", f.Type, err)
	}
	w.Close()
	if err := <-served; err != nil {
		t.Errorf("Serve = %v", err)
	}
}

// FuzzFrames feeds a parent what a worker may write, with descriptors from the
// byte at on.
func FuzzFrames(f *testing.F) {
	hello := AppendHello(nil, Hello{Remuda: 1})
	f.Add(AppendFrame(hello, Frame{Type: TypeResult, ID: 1, Payload: []byte("x")}), uint16(0), uint8(0))
	f.Add(AppendError(hello, 2, &TaskError{Message: "m", Code: "c"}), uint16(0), uint8(0))
	f.Add([]byte{1, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0}, uint16(0), uint8(1))
	at := uint16(len(hello))
	f.Add(bytes.Join([][]byte{hello, frame(TypeHandles, 1, 1, 2), frame(TypeResult, 1)}, nil), at, uint8(2))
	f.Add(bytes.Join([][]byte{hello, segmentFrame(1, 64<<10), sharedFrame(1, 1, 0, 100), frame(TypeResult, 1), frame(TypeForget, 1)}, nil), at, uint8(1))
	f.Add(bytes.Join([][]byte{hello, frame(TypeSubscribe, 0, 0, 'a', '*'), frame(TypePublish, 0, 1, 'a', 'b'), frame(TypeUnsubscribe, 0, 'a', '*')}, nil), at, uint8(0))
	f.Add(bytes.Join([][]byte{hello, frame(TypeProgress, 1, 1), frame(TypeChunk, 1, 2), frame(TypeResult, 1)}, nil), at, uint8(0))
	f.Fuzz(func(t *testing.T, wire []byte, at uint16, n uint8) {
		a, b := pair(t)
		topics := NewTopics()
		conn, err := NewFrames(a, Options{MaxMessage: 1 << 16, Topics: topics})
		if err != nil {
			t.Fatal(err)
		}
		e := newEnds()
		for i := range 3 {
			if err := conn.Start(&Request{To: e, Share: i == 0}); err != nil {
				t.Fatal(err)
			}
		}
		mem := memfd(t, 64<<10, 0, segmentSeals)
		defer func() { _ = unix.Close(mem) }()
		var fds []int
		for range n % 20 {
			fds = append(fds, mem)
		}
		var wg sync.WaitGroup
		defer wg.Wait()
		w := &enemy{t: t, f: b}
		cut := min(int(at), len(wire))
		wg.Go(func() {
			w.sendFDs(nil, wire[:cut])
			w.sendFDs(fds, wire[cut:])
			b.Close()
		})
		_ = conn.Serve(func() {})
		if len(e.got) != 3 {
			t.Errorf("%d of 3 requests ended: %q", len(e.got), e.got)
		}
		if len(topics.exact)+len(topics.prefix) > 0 || mapped(t) > 0 {
			t.Error("subscriptions or shared memory are left")
		}
	})
}

// FuzzJSONLines feeds a parent what a worker may write to its standard output.
func FuzzJSONLines(f *testing.F) {
	f.Add([]byte("1\n{\"error\":\"x\"}\n"))
	f.Add([]byte("\n\r\n[[[\n"))
	f.Fuzz(func(t *testing.T, wire []byte) {
		e := newEnds()
		devnull, err := os.OpenFile("/dev/null", os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		conn, err := NewJSONLines(devnull, r, Options{MaxMessage: 1 << 16})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := conn.Start(&Request{To: e}); err != nil {
				t.Fatal(err)
			}
		}
		go func() {
			_, _ = w.Write(wire)
			w.Close()
		}()
		_ = conn.Serve(nil)
		if len(e.got) != 2 {
			t.Errorf("%d of 2 requests ended: %q", len(e.got), e.got)
		}
	})
}

// FuzzTask feeds a worker's parser.
func FuzzTask(f *testing.F) {
	f.Add(appendTask(nil, 1, "n", time.Second, 0)[HeaderSize:])
	f.Fuzz(func(t *testing.T, b []byte) {
		name, _, body, err := ParseTask(b)
		if err == nil && len(name)+len(body)+taskHeader != len(b) {
			t.Errorf("%d bytes are a name of %d and a body of %d", len(b), len(name), len(body))
		}
		if err == nil && int(binary.LittleEndian.Uint16(b[4:])) != len(name) {
			t.Error("wrong name")
		}
	})
}
