package ipc

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
	"github.com/remuda-dev/remuda/test/leak"
)

// program is the other end of a Node channel, played by the test.
type program struct {
	t   testing.TB
	s   *socket
	in  *inbox
	buf *bufio.Reader
}

// node makes a channel and serves it; served is what Serve returned.
func node(t testing.TB, o Options) (conn *NodeConn, p *program, served chan error) {
	t.Helper()
	a, b := pair(t)
	conn, err := NewNode(a, o)
	if err != nil {
		t.Fatal(err)
	}
	s := sock(t, b)
	in := newInbox(s)
	t.Cleanup(in.close)
	if err := b.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	served = make(chan error, 1)
	go func() { served <- conn.Serve(nil) }()
	t.Cleanup(conn.Close)
	return conn, &program{t, s, in, bufio.NewReader(in)}, served
}

// line returns the next line.
func (p *program) line() string {
	p.t.Helper()
	s, err := p.buf.ReadString('\n')
	if err != nil {
		p.t.Fatalf("the program read %q, %v", s, err)
	}
	return strings.TrimSuffix(s, "\n")
}

func (p *program) want(lines ...string) {
	p.t.Helper()
	for _, w := range lines {
		if got := p.line(); got != w {
			p.t.Fatalf("the program got %s, want %s", got, w)
		}
	}
}

// send writes s with descriptors, in one system call.
func (p *program) send(s string, files ...*os.File) {
	p.t.Helper()
	w := newWriter(p.s, 0)
	fds, err := fdpass.Dup(files)
	if err != nil {
		p.t.Fatal(err)
	}
	if err := w.queueFDs([]byte(s), nil, fds); err != nil {
		p.t.Fatal(err)
	}
	w.flush(false)
}

func null(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// pipeEnd is a file that Node takes.
func pipeEnd(t testing.TB) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r
}

const (
	ack  = `{"cmd":"NODE_HANDLE_ACK"}`
	nack = `{"cmd":"NODE_HANDLE_NACK"}`
)

func TestNodeMessages(t *testing.T) {
	var stray []string
	conn, p, served := node(t, Options{MaxMessage: 1000, OnMessage: func(m json.RawMessage, f *os.File) { stray = append(stray, string(m)) }})
	e := newEnds()
	for _, body := range []string{`1`, `2`, "[3,\n4]"} {
		if err := conn.Start(&Request{Body: []byte(body), To: e}); err != nil {
			t.Fatal(err)
		}
	}
	p.want("1", "2", "[3,4]")
	// Node's own messages, and a handle that did not come, are no answers.
	p.send(`{"cmd":"NODE_CLUSTER"}` + "\n" + `{"cmd":"NODE_HANDLE","type":"net.Socket"}` + "\n" + `{"NODE_":1}` + "\n" +
		`{"error":"no"}` + "\n" + `{"error":{"message":"m","code":"c"},"x":1}` + "\n" + `"stray"` + "\n" +
		`{"cmd":"NODE_SOCKET_GET_COUNT","key":"6::::80"}` + "\n" + `{"cmd":"NODE_SOCKET_NOTIFY_CLOSE","key":"6::::80"}` + "\n")
	for range 3 {
		<-e.c
	}
	want := `1: {"NODE_":1}, <nil>|2: , no|` + "[3,\n4]" + `: {"error":{"message":"m","code":"c"},"x":1}, <nil>`
	if got := strings.Join(e.got, "|"); got != want {
		t.Errorf("ends: %s\nwant: %s", got, want)
	}
	p.want(nack, `{"cmd":"NODE_SOCKET_COUNT","count":0,"key":"6::::80"}`, `{"cmd":"NODE_SOCKET_ALL_CLOSED","key":"6::::80"}`)
	p.send(strings.Repeat("x", 2000))
	if err := <-served; !errors.Is(err, ErrTooLarge) {
		t.Errorf("Serve = %v", err)
	}
	if fmt.Sprint(stray) != `["stray"]` {
		t.Errorf("unsolicited: %q", stray)
	}
	if err := conn.Send(json.RawMessage("1"), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Send after the end: %v", err)
	}
}

// What Node would take for its own must not come from a task.
func TestNodeRefuses(t *testing.T) {
	conn, _, _ := node(t, Options{MaxMessage: 1000})
	for _, c := range []struct {
		msg  string
		f    *os.File
		want error
	}{
		{`{"cmd":"NODE_HANDLE_ACK"}`, nil, ErrNodeMessage},
		{` {"a":1,"cmd":"\u004eODE_HANDLE_ACK"}`, nil, ErrNodeMessage},
		{`{"\u0063md":"NODE_X"}`, pipeEnd(t), ErrNodeMessage},
		{`{`, nil, ErrNotJSON},
		{`"` + strings.Repeat("x", 1000) + `"`, nil, ErrTooLarge},
		{`1`, null(t), ErrHandle},
		{`{"cmd":"NODE_"}`, nil, nil},
		{`{"x":{"cmd":"NODE_HANDLE_ACK"}}`, nil, nil},
	} {
		if err := conn.Send(json.RawMessage(c.msg), c.f); !errors.Is(err, c.want) {
			t.Errorf("Send(%s) = %v, want %v", c.msg, err, c.want)
		}
	}
	if err := conn.Start(&Request{Files: []*os.File{pipeEnd(t), pipeEnd(t)}}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("Start with two files: %v", err)
	}
}

// A handle holds up what is behind it until the program has it; one that does
// not arrive is sent four times and then given up.
func TestNodeHandleOrder(t *testing.T) {
	before := leak.Descriptors(t)
	conn, p, _ := node(t, Options{})
	e := newEnds()
	r := pipeEnd(t)
	handle := func(msg string) string {
		return `{"cmd":"NODE_HANDLE","type":"net.Socket","msg":` + msg + `}`
	}
	got := func() {
		t.Helper()
		files, err := p.in.take(1)
		if err != nil {
			t.Fatal(err)
		}
		files[0].Close()
	}
	start := func(body string, files ...*os.File) {
		t.Helper()
		if err := conn.Start(&Request{Body: []byte(body), To: e, Files: files}); err != nil {
			t.Fatal(err)
		}
	}
	start("1", r)
	start("2")
	if err := conn.Send(json.RawMessage("3"), r); err != nil {
		t.Fatal(err)
	}
	start("4", r)
	start("5")
	p.want(handle("1"))
	got()
	// Nothing else comes until it is acknowledged, and an answer is no
	// acknowledgement.
	p.send(`"one"` + "\n")
	<-e.c
	p.send(ack + "\n")
	p.want("2", handle("3"))
	got()
	for range maxRetransmissions {
		p.send(nack + "\n")
		p.want(handle("3"))
		got()
	}
	p.send(nack + "\n")
	p.want(handle("4"))
	got()
	for range maxRetransmissions {
		p.send(nack + "\n")
		p.want(handle("4"))
		got()
	}
	p.send(nack + "\n" + `"two"` + "\n")
	p.want("5")
	p.send(`"five"` + "\n")
	for range 3 {
		<-e.c
	}
	want := []string{`1: "one", <nil>`, `4: , ` + ErrHandleLost.Error(), `2: "two", <nil>`, `5: "five", <nil>`}
	if !slices.Equal(e.got, want) {
		t.Errorf("ends:\n%s\nwant:\n%s", strings.Join(e.got, "\n"), strings.Join(want, "\n"))
	}
	// The end comes behind what was accepted.
	start("6", r)
	start("7")
	conn.Stop()
	if err := conn.Send(json.RawMessage("8"), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Send after Stop: %v", err)
	}
	p.want(handle("6"))
	got()
	p.send(ack + "\n")
	p.want("7")
	if s, err := p.buf.ReadString('\n'); s != "" || !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %q, %v", s, err)
	}
	// Channel ends: 2, pipe: 2, and the poller's own which may come and go.
	leak.Settled(t, before+4+2)
}

// A program that does not acknowledge makes nothing grow without bound.
func TestNodeHandleUnacknowledged(t *testing.T) {
	before := leak.Descriptors(t)
	conn, _, served := node(t, Options{})
	r := pipeEnd(t)
	var err error
	n := 0
	for ; err == nil; n++ {
		err = conn.Send(json.RawMessage("1"), r)
	}
	if !errors.Is(err, ErrFull) || n != maxBehind+2 {
		t.Errorf("Send %d: %v", n, err)
	}
	conn.Close()
	if err := <-served; err != nil {
		t.Errorf("Serve = %v", err)
	}
	leak.Settled(t, before+3+2)
}

func TestNodeHandleFromProgram(t *testing.T) {
	type got struct {
		msg  string
		kind string
	}
	gots := make(chan got, 10)
	conn, p, _ := node(t, Options{OnMessage: func(m json.RawMessage, f *os.File) {
		g := got{msg: string(m)}
		if f != nil {
			g.kind = f.Name()
			f.Close()
		}
		gots <- g
	}})
	r := pipeEnd(t)
	p.send(`"plain"`+"\n"+`"plain too"`+"\n", nil...)
	p.send(`{"cmd":"NODE_HANDLE","type":"net.Server","msg":{"a":1},"key":"k"}`+"\n", r)
	p.send(`{"cmd":"NODE_HANDLE",`, r) // in two pieces
	p.send(`"type":"dgram.Socket"}` + "\n")
	for _, want := range []got{{`"plain"`, ""}, {`"plain too"`, ""}, {`{"a":1}`, "net.Server"}, {`null`, "dgram.Socket"}} {
		if g := <-gots; g != want {
			t.Errorf("got %v, want %v", g, want)
		}
	}
	p.want(ack, ack)
	e := newEnds()
	req := &Request{To: e}
	if err := conn.Start(req); err != nil {
		t.Fatal(err)
	}
	p.want("null")
	p.send(`{"cmd":"NODE_HANDLE","type":"net.Native","msg":"answer"}`+"\n", r)
	<-e.c
	if len(req.Got) != 1 || req.Got[0].Name() != "net.Native" || e.got[0] != `: "answer", <nil>` {
		t.Errorf("the answer is %q with %v", e.got, req.Got)
	}
	for _, f := range req.Got {
		f.Close()
	}
}

// A program that breaks the rules in whatever way ends its channel, what was
// under way on it ends, and no descriptor is left.
func TestNodeViolations(t *testing.T) {
	r, many := pipeEnd(t), []*os.File{}
	for range MaxFiles + 1 {
		many = append(many, r)
	}
	whole := `{"cmd":"NODE_HANDLE","type":"net.Socket","msg":1}` + "\n"
	for _, c := range []struct {
		name  string
		wire  string
		files []*os.File
		want  string
	}{
		{"end", "", nil, "<nil>"},
		{"garbage", "GET / HTTP/1.1\r\n", nil, "not a JSON value"},
		{"advanced", "\x00\x00\x00\x05\xff\x0f\x22\x01a", nil, "advanced"},
		{"empty line", "\n", nil, "not a JSON value"},
		{"deep", strings.Repeat("[", 600) + strings.Repeat("]", 600) + "\n", nil, "nested deeper"},
		{"half a line", `{"cmd":`, nil, "unexpected EOF"},
		{"half a line with a handle", `{"cmd":`, many[:1], "unexpected EOF"},
		{"handle without message", `{"no":1}` + "\n", many[:1], "no message has announced"},
		{"two handles", whole, many[:2], "no message has announced"},
		{"too many handles", whole, many, "more descriptors were passed"},
		{"unknown handle", `{"cmd":"NODE_HANDLE","type":"x"}` + "\n", many[:1], `type "\"x\""`},
		{"acknowledgement of nothing", ack + "\n", nil, "no handle was sent"},
		{"flood", strings.Repeat("1\n", 103), nil, "more than 100 messages"},
		{"flood of own messages", strings.Repeat(`{"cmd":"NODE_X"}`+"\n", 103), nil, "more than 100 messages"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := leak.Descriptors(t)
			conn, p, served := node(t, Options{MaxUnsolicited: 100})
			e := newEnds()
			req := &Request{Body: []byte("0"), To: e}
			if err := conn.Start(req); err != nil {
				t.Fatal(err)
			}
			if c.wire != "" {
				p.send(c.wire, c.files...)
			}
			rc, err := p.s.base.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			_ = rc.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_WR) })
			if err := <-served; !strings.Contains(fmt.Sprint(err), c.want) {
				t.Errorf("Serve = %v, want %s", err, c.want)
			}
			if len(e.got) != 1 {
				t.Errorf("ends: %q", e.got)
			}
			p.s.Close()
			closeFiles(req.Got)
			leak.Settled(t, before)
		})
	}
}

func TestNodeHealthCheck(t *testing.T) {
	var stray []string
	done := make(chan struct{})
	conn, p, _ := node(t, Options{HealthCheck: true, OnMessage: func(m json.RawMessage, _ *os.File) {
		stray = append(stray, string(m))
		close(done)
	}})
	e := newEnds()
	if err := conn.Start(&Request{To: e}); err != nil {
		t.Fatal(err)
	}
	if !conn.Ping() {
		t.Error("Ping = false")
	}
	p.want("null", `{"type":"health_check"}`)
	p.send(`{"pid":1,"type":"health_check_response"}` + "\n" + `"answer"` + "\n" + `{"type":"health_check_response"}` + "\n")
	<-done
	if fmt.Sprint(e.got) != `[: "answer", <nil>]` || fmt.Sprint(stray) != `[{"type":"health_check_response"}]` {
		t.Errorf("ends %q, unsolicited %q", e.got, stray)
	}
	plain, _, _ := node(t, Options{})
	if plain.Ping() {
		t.Error("Ping without HealthCheck = true")
	}
}

// startNode runs a Node program as the other end.
func startNode(t *testing.T, script string, o Options) *NodeConn {
	t.Helper()
	parent, child, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := NewNode(parent, o)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "program.js")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("node", file)
	cmd.Env = append(os.Environ(), NodeEnv(3)...)
	cmd.ExtraFiles = []*os.File{child}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	child.Close()
	served := make(chan error, 1)
	go func() { served <- conn.Serve(nil) }()
	t.Cleanup(func() {
		conn.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve = %v", err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the program: %v", err)
		}
	})
	return conn
}

// file returns the descriptor of a connection or listener.
func file(t testing.TB, c interface{ File() (*os.File, error) }) *os.File {
	t.Helper()
	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// Node finds every kind of handle as what it is, and uses it.
func TestNodeProgramTakesHandles(t *testing.T) {
	got := make(chan string, 1)
	conn := startNode(t, `
const net = require('net')
process.on('message', (m, h) => {
  const name = h && h.constructor.name
  switch (m) {
    case 'conn': return h.end('hello from ' + name)
    case 'pipe': return h.on('data', (b) => process.send(name + ' read ' + b))
    case 'write': return new net.Socket({ handle: h, readable: false, writable: true }).end('hello from ' + name)
    case 'server':
      h.on('connection', (s) => { s.end('hello from ' + name); h.close() })
      return
    case 'udp':
      h.on('message', (b, from) => { h.send('hello from ' + name, from.port, from.address, () => h.close()) })
      return
    case 'raw': {
      const s = net.createServer((c) => { c.end('hello from ' + name); s.close() })
      s.listen(h)
      return
    }
    case 'file': return process.send({ name })
  }
})`, Options{OnMessage: func(m json.RawMessage, _ *os.File) { got <- string(m) }})
	read := func(c net.Conn, want string) {
		t.Helper()
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		b, err := io.ReadAll(c)
		if string(b) != want {
			t.Errorf("the program said %q, %v; want %q", b, err, want)
		}
	}
	next := func() string {
		t.Helper()
		select {
		case m := <-got:
			return m
		case <-time.After(time.Minute):
			t.Fatal("the program says nothing")
			return ""
		}
	}
	send := func(how func(json.RawMessage, *os.File) error, msg string, f *os.File) {
		t.Helper()
		if err := how(json.RawMessage(msg), f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	for _, network := range []string{"tcp", "unix"} {
		addr := "127.0.0.1:0"
		if network == "unix" {
			addr = filepath.Join(t.TempDir(), "s")
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		dial := func() net.Conn {
			c, err := net.Dial(network, l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		client := dial()
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		send(conn.Send, `"conn"`, file(t, server.(interface{ File() (*os.File, error) })))
		server.Close()
		read(client, "hello from Socket")
		listener := l.(interface{ File() (*os.File, error) })
		send(conn.Send, `"server"`, file(t, listener))
		read(dial(), "hello from Server")
		send(conn.SendRaw, `"raw"`, file(t, listener))
		name := "TCP"
		if network == "unix" {
			name = "Pipe"
		}
		read(dial(), "hello from "+name)
	}
	u, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	send(conn.Send, `"udp"`, file(t, u.(*net.UDPConn)))
	_ = u.Close()
	c, err := net.Dial("udp", u.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := c.Write([]byte("?")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	c.Close()
	if string(b[:n]) != "hello from Socket" {
		t.Errorf("by UDP: %q, %v", b[:n], err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_ = r.SetDeadline(time.Now().Add(time.Minute))
	send(conn.Send, `"write"`, w)
	all, err := io.ReadAll(r)
	r.Close()
	if string(all) != "hello from Pipe" {
		t.Errorf("by a pipe: %q, %v", all, err)
	}
	if r, w, err = os.Pipe(); err != nil {
		t.Fatal(err)
	}
	send(conn.Send, `"pipe"`, r)
	if _, err := w.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if m := next(); m != `"Socket read x"` {
		t.Errorf("by a pipe: %s", m)
	}
	w.Close()
	if err := conn.Send(json.RawMessage(`"file"`), nil); err != nil {
		t.Fatal(err)
	}
	if m := next(); m != `{}` {
		t.Errorf("without a handle: %s", m)
	}
}

// A program gives its handles away, keeps its messages in order behind them,
// and its server closes without waiting for what it gave away.
func TestNodeProgramGivesHandles(t *testing.T) {
	type message struct {
		msg string
		f   *os.File
	}
	got := make(chan message, 10)
	conn := startNode(t, `
const net = require('net'), dgram = require('dgram')
const server = net.createServer((s) => {
  process.send('conn', s)
  process.send('behind')
  server.getConnections((err, n) => {
    process.send({ err: err && err.message, n })
    server.close(() => {
      process.send('closed')
      const u = dgram.createSocket('udp4')
      u.bind(0, '127.0.0.1', () => process.send(u.address(), u, () => u.close()))
    })
  })
})
server.listen(0, '127.0.0.1', () => process.send({ port: server.address().port }))
const other = net.createServer()
process.once('message', () => {
  other.listen(0, '127.0.0.1', () => process.send({ port: other.address().port }, other, () => other.close()))
})
`, Options{OnMessage: func(m json.RawMessage, f *os.File) { got <- message{string(m), f} }})
	next := func(want string) (m message) {
		t.Helper()
		select {
		case m = <-got:
		case <-time.After(time.Minute):
			t.Fatalf("nothing came in place of %s", want)
		}
		if want != "" && m.msg != want {
			t.Fatalf("got %s, want %s", m.msg, want)
		}
		return m
	}
	port := func(m message) int {
		t.Helper()
		var p struct{ Port int }
		if err := json.Unmarshal([]byte(m.msg), &p); err != nil {
			t.Fatal(err)
		}
		return p.Port
	}
	dial := func(network string, port int) net.Conn {
		t.Helper()
		c, err := net.Dial(network, fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		return c
	}
	client := dial("tcp", port(next("")))
	defer client.Close()
	m := next(`"conn"`)
	if m.f.Name() != "net.Socket" {
		t.Errorf("the connection is a %s", m.f.Name())
	}
	c, err := net.FileConn(m.f)
	m.f.Close()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("from the parent")); err != nil {
		t.Error(err)
	}
	c.Close()
	if b, err := io.ReadAll(client); string(b) != "from the parent" {
		t.Errorf("the client got %q, %v", b, err)
	}
	next(`"behind"`)
	next(`{"err":null,"n":0}`)
	next(`"closed"`)
	m = next("")
	u, err := net.FilePacketConn(m.f)
	if err != nil || m.f.Name() != "dgram.Socket" {
		t.Fatal(m.f.Name(), err)
	}
	m.f.Close()
	uc := dial("udp", port(m))
	if _, err := uc.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	uc.Close()
	_ = u.SetDeadline(time.Now().Add(time.Minute))
	if n, _, err := u.ReadFrom(make([]byte, 10)); n != 1 {
		t.Errorf("by UDP: %d, %v", n, err)
	}
	_ = u.Close()
	if err := conn.Send(nil, nil); err != nil {
		t.Fatal(err)
	}
	m = next("")
	l, err := net.FileListener(m.f)
	if err != nil || m.f.Name() != "net.Server" {
		t.Fatal(m.f.Name(), err)
	}
	m.f.Close()
	dial("tcp", port(m)).Close()
	if c, err := l.Accept(); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
	l.Close()
}

// A frames worker that is a Node program gets descriptors over Node's channel,
// and what it breaks there costs it the other one.
func TestNodeSide(t *testing.T) {
	for _, c := range []struct {
		name string
		wire string // what the worker says on Node's channel in the end
		want string
	}{
		{"garbage", "no JSON\n", "protocol violation"},
		{"half", `{"cmd`, "unexpected EOF"},
		{"end", "", "<nil>"},
		{"acknowledgement of nothing", ack + "\n" + ack + "\n" + ack + "\n" + ack + "\n", "no handle was sent"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := leak.Descriptors(t)
			a, b := pair(t)
			sideA, sideB := pair(t)
			conn, err := NewFrames(a, Options{NodeChannel: sideA})
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 1)
			ready := make(chan struct{})
			go func() { served <- conn.Serve(func() { close(ready) }) }()
			if _, err := b.Write(AppendHello(nil, Hello{Remuda: 1, Handles: true})); err != nil {
				t.Fatal(err)
			}
			<-ready
			e := newEnds()
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			lf, r := file(t, listener.(*net.TCPListener)), pipeEnd(t)
			if err := conn.Start(&Request{Files: []*os.File{null(t)}, To: e}); !errors.Is(err, ErrHandle) {
				t.Errorf("Start with a file: %v", err)
			}
			if err := conn.Start(&Request{Body: []byte("x"), Files: []*os.File{r, lf}, To: e}); err != nil {
				t.Fatal(err)
			}
			_ = sideB.SetDeadline(time.Now().Add(time.Minute))
			side := sock(t, sideB)
			in := newInbox(side)
			p := &program{t, side, in, bufio.NewReader(in)}
			p.want(`{"cmd":"NODE_HANDLE","type":"net.Socket","msg":{"remuda":[1,0,false]}}`)
			p.send(ack + "\n")
			p.want(`{"cmd":"NODE_HANDLE","type":"net.Native","msg":{"remuda":[1,1,true]}}`)
			fr := frameReader{r: b, limit: DefaultMaxFrame}
			var got []string
			for range 3 {
				f, _, err := fr.next()
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, fmt.Sprintf("%s %d", f.Type, f.ID))
			}
			if fmt.Sprint(got) != "[HELLO 0 HANDLES 1 TASK 1]" {
				t.Errorf("the worker got %v", got)
			}
			if c.wire != "" {
				p.send(c.wire)
			}
			_ = side.rc.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_WR) })
			if err := <-served; !strings.Contains(fmt.Sprint(err), c.want) {
				t.Errorf("Serve = %v, want %s", err, c.want)
			}
			if len(e.got) != 1 {
				t.Errorf("ends: %q", e.got)
			}
			in.close()
			b.Close()
			side.Close()
			listener.Close()
			lf.Close()
			leak.Settled(t, before+3) // the pipe, and null
		})
	}
}

// FuzzNode feeds a parent what a program may write, with descriptors.
func FuzzNode(f *testing.F) {
	f.Add([]byte("1\n{\"error\":\"x\"}\n"), []byte{}, uint8(0))
	f.Add([]byte("{\"cmd\":\"NODE_HANDLE\",\"type\":\"net.Socket\",\"msg\":1}\n"), []byte("{\"cmd\":\"NODE_HANDLE_ACK\"}\n2\n"), uint8(1))
	f.Add([]byte("{\"cmd\":\"NODE_HANDLE_NACK\"}\n[[[\n"), []byte("{\"cmd\":\"NODE_SOCKET_GET_COUNT\",\"key\":1}\n"), uint8(2))
	f.Add([]byte("{\"type\":\"health_check_response\"}\n"), []byte("\n"), uint8(20))
	f.Fuzz(func(t *testing.T, one, two []byte, files uint8) {
		before := leak.Descriptors(t)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		a, b := pair(t)
		conn, err := NewNode(a, Options{MaxMessage: 1 << 16, HealthCheck: true, OnMessage: func(m json.RawMessage, f *os.File) {
			if !json.Valid(m) {
				t.Errorf("message %q", m)
			}
			closeFile(f)
		}})
		if err != nil {
			t.Fatal(err)
		}
		e := newEnds()
		reqs := []*Request{{To: e}, {To: e, Files: []*os.File{r}}, {To: e}}
		for _, q := range reqs {
			if err := conn.Start(q); err != nil {
				t.Fatal(err)
			}
		}
		conn.Ping()
		wrote := make(chan struct{})
		s := sock(t, b)
		go func() {
			defer close(wrote)
			p := &program{t: t, s: s}
			files := slices.Repeat([]*os.File{w}, int(files%24))
			if len(one) > 0 {
				p.send(string(one), files...)
			}
			if len(two) > 0 {
				p.send(string(two))
			}
			_ = s.rc.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_WR) })
		}()
		_ = conn.Serve(nil)
		<-wrote
		s.Close()
		r.Close()
		w.Close()
		if len(e.got) != len(reqs) {
			t.Errorf("%d of %d requests ended: %q", len(e.got), len(reqs), e.got)
		}
		for _, q := range reqs {
			closeFiles(q.Got)
		}
		leak.Settled(t, before)
	})
}
