package ipc

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
	"github.com/remuda-dev/remuda/test/leak"
)

// enemy is a worker that sends what it likes.
type enemy struct {
	t    testing.TB
	f    *os.File
	null int
}

func (e *enemy) send(fds int, parts ...[]byte) {
	data := bytes.Join(parts, nil)
	v := unix.Iovec{Base: &data[0]}
	v.SetLen(len(data))
	var list []int
	for range fds {
		list = append(list, e.null)
	}
	e.sendFDs(list, data)
}

func (e *enemy) sendFDs(fds []int, parts ...[]byte) {
	data := bytes.Join(parts, nil)
	rc, err := e.f.SyscallConn()
	if err != nil {
		e.t.Fatal(err)
	}
	for len(data) > 0 {
		n := 0
		var errSend error
		err := rc.Write(func(fd uintptr) bool {
			v := unix.Iovec{Base: &data[0]}
			v.SetLen(len(data))
			n, errSend = fdpass.Send(fd, []unix.Iovec{v}, fds)
			return !errors.Is(errSend, unix.EAGAIN)
		})
		if err != nil || errSend != nil {
			return // the parent has had enough
		}
		data, fds = data[n:], nil
	}
}

func frame(t Type, id uint32, payload ...byte) []byte {
	return AppendFrame(nil, Frame{Type: t, ID: id, Payload: payload})
}

// fight runs a parent against an enemy and returns what Serve does. Whatever
// comes, the parent's one request ends once and no descriptor is left.
func fight(t *testing.T, o Options, attack func(*enemy)) error {
	t.Helper()
	before := leak.Descriptors(t)
	a, b := pair(t)
	conn, err := NewFrames(a, o)
	if err != nil {
		t.Fatal(err)
	}
	null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	got := newEnds()
	ready := func() {
		if err := conn.Start(&Request{To: got}); err != nil {
			t.Error(err)
		}
	}
	served := make(chan error, 1)
	go func() { served <- conn.Serve(ready) }()
	e := &enemy{t: t, f: b, null: null}
	e.send(0, AppendHello(nil, Hello{Remuda: Version, Files: true}))
	r := frameReader{r: b, limit: DefaultMaxFrame}
	for range 2 { // so that nothing unread turns the end into a reset
		if _, _, err := r.next(); err != nil {
			t.Fatal(err)
		}
	}
	attack(e)
	_ = unix.Close(null)
	b.Close()
	err = <-served
	got.mu.Lock()
	defer got.mu.Unlock()
	if len(got.got) != 1 {
		t.Errorf("%d ends: %q", len(got.got), got.got)
	}
	leak.Settled(t, before)
	return err
}

// What a hostile worker can do with descriptors.
func TestHostileFiles(t *testing.T) {
	result := frame(TypeResult, 1)
	for name, attack := range map[string]func(*enemy){
		"no announcement":     func(e *enemy) { e.send(1, result) },
		"announced, not sent": func(e *enemy) { e.send(0, frame(TypeHandles, 1, 1), result) },
		"too few":             func(e *enemy) { e.send(1, frame(TypeHandles, 1, 1, 1), result) },
		"too many by one":     func(e *enemy) { e.send(2, frame(TypeHandles, 1, 1), result) },
		"wrong kind":          func(e *enemy) { e.send(1, frame(TypeHandles, 1, 2), result) },
		"no kind":             func(e *enemy) { e.send(1, frame(TypeHandles, 1, 0), result) },
		"none":                func(e *enemy) { e.send(0, frame(TypeHandles, 1), result) },
		"too many":            func(e *enemy) { e.send(17, frame(TypeHandles, 1, bytes.Repeat([]byte{1}, 17)...), result) },
		"far too many":        func(e *enemy) { e.send(253, frame(TypeHandles, 1, 1), result) },
		"with a progress":     func(e *enemy) { e.send(1, frame(TypeHandles, 1, 1), frame(TypeProgress, 1)) },
		"with an error":       func(e *enemy) { e.send(1, frame(TypeHandles, 1, 1), AppendError(nil, 1, &TaskError{Message: "x"})) },
		"with a task":         func(e *enemy) { e.send(1, frame(TypeHandles, 1, 1), frame(TypeTask, 1, 0, 0, 0, 0, 0, 0)) },
		"of another id":       func(e *enemy) { e.send(1, frame(TypeHandles, 2, 1), result) },
		"of no task":          func(e *enemy) { e.send(1, frame(TypeHandles, 2, 1), frame(TypeResult, 2)) },
		"twice": func(e *enemy) {
			e.send(1, frame(TypeHandles, 1, 1))
			e.send(1, frame(TypeHandles, 1, 1), result)
		},
		"within a frame": func(e *enemy) {
			e.send(0, AppendHeader(nil, TypeResult, 1, 1<<20), make([]byte, 30000))
			for range 20 {
				e.send(16, []byte{1})
			}
		},
		"half a frame": func(e *enemy) { e.send(3, frame(TypeHandles, 1, 1, 1, 1), result[:5]) },
		"half alone":   func(e *enemy) { e.send(3, frame(TypeHandles, 1, 1, 1, 1)) },
		"half of half": func(e *enemy) { e.send(3, frame(TypeHandles, 1, 1, 1, 1)[:13]) },
	} {
		if err := fight(t, Options{}, attack); err == nil {
			t.Errorf("%s: taken", name)
		} else if !errors.Is(err, ErrProtocol) && !errors.Is(err, ErrTooLarge) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// And the way it should be.
	if err := fight(t, Options{}, func(e *enemy) { e.send(2, frame(TypeHandles, 1, 1, 1), result) }); err != nil {
		t.Error(err)
	}
}
