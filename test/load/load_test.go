package load

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

const patience = 30 * time.Second

// TestFailuresCount: a load that sees no failures is of use only where it would.
func TestFailuresCount(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	raw := func(handle func(net.Conn)) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go handle(c)
			}
		}()
		return l.Addr().String()
	}
	answer := func(c net.Conn, header string) {
		_, _ = c.Read(make([]byte, 1000))
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\n%sContent-Length: 2\r\n\r\nok", header)
	}
	sick := httptest.NewServer(http.NotFoundHandler())
	defer sick.Close()
	for _, c := range []struct {
		name string
		o    Options
		want []string // nil: none may fail
	}{
		{"nobody listens", Options{Addr: closed.Addr().String(), Fresh: 1}, []string{Refused}},
		{"no socket", Options{Network: "unix", Addr: "/nosuch/socket", Kept: 1}, []string{Refused}},
		{"no answer", Options{Addr: raw(func(c net.Conn) { _, _ = c.Read(make([]byte, 1000)); c.Close() }), Fresh: 1}, []string{EOFFresh}},
		{"half an answer", Options{Addr: raw(func(c net.Conn) {
			_, _ = c.Read(make([]byte, 1000))
			_, _ = c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nok"))
			c.Close()
		}), Fresh: 1}, []string{EOFFresh}},
		// The end may be seen by the write or by the read.
		{"an idle connection is cut", Options{Addr: raw(func(c net.Conn) { answer(c, ""); c.Close() }), Kept: 1}, []string{EOFKept, Reset}},
		{"an end that was announced", Options{Addr: raw(func(c net.Conn) { answer(c, "Connection: close\r\n"); c.Close() }), Kept: 1}, nil},
		{"status", Options{Addr: sick.Listener.Addr().String(), Kept: 1}, []string{Status}},
		{"time", Options{Addr: raw(func(net.Conn) {}), Fresh: 1, Timeout: 10 * time.Millisecond}, []string{Timeout}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := Start(c.o)
			if err := l.Wait(4, patience); err != nil {
				t.Error(err)
			}
			f := l.Stop()
			n := 0
			for _, kind := range c.want {
				n += f.Kinds()[kind]
			}
			if (n == 0) != (c.want == nil) || n != len(f.Failures) {
				t.Errorf("want only %q: %s", c.want, &f)
			}
		})
	}
	if err := (Start(Options{Addr: raw(func(net.Conn) {}), Fresh: 1, Timeout: 50 * time.Millisecond})).stopAfter(time.Millisecond); err == nil {
		t.Error("no error after the time")
	}
}

func (l *Load) stopAfter(d time.Duration) error {
	defer l.Stop()
	return l.Wait(1000, d)
}
