package cluster

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
	"github.com/remuda-dev/remuda/internal/nodeipc"
	"github.com/remuda-dev/remuda/test/harness"
	"github.com/remuda-dev/remuda/test/load"
)

const patience = 30 * time.Second

// shelf is a Store in memory, of which the next primary gets copies.
type shelf struct {
	mu sync.Mutex
	m  map[string]*os.File
}

func newShelf(t *testing.T) *shelf {
	s := &shelf{m: map[string]*os.File{}}
	t.Cleanup(func() {
		for _, f := range s.m {
			f.Close()
		}
	})
	return s
}

func (s *shelf) Put(name string, f *os.File) error {
	fd, err := fdpass.DupFile(f)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.m[name]; old != nil {
		old.Close()
	}
	s.m[name] = os.NewFile(uintptr(fd), name)
	return nil
}

func (s *shelf) Drop(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.m[name]; f != nil {
		f.Close()
		delete(s.m, name)
	}
	return nil
}

func (s *shelf) copies(t *testing.T) map[string]*os.File {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]*os.File{}
	for name, f := range s.m {
		fd, err := fdpass.DupFile(f)
		if err != nil {
			t.Fatal(err)
		}
		out[name] = os.NewFile(uintptr(fd), name)
	}
	return out
}

func (s *shelf) names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for name := range s.m {
		out = append(out, name)
	}
	return out
}

func primary(t *testing.T, o Options) *Primary {
	t.Helper()
	if o.OnError == nil {
		o.OnError = func(err error) { t.Error(err) }
	}
	path, err := WritePreload(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if o.Preload == "" {
		o.Preload = path
	}
	p, err := NewPrimary(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// node is a worker process.
type node struct {
	*Worker
	t      *testing.T
	cmd    *exec.Cmd
	kept   *os.File // as the keeper keeps one
	out    bytes.Buffer
	exited chan struct{}
	msgs   chan string
	at     chan Address
}

func (n *node) handlers() Handlers {
	return Handlers{
		OnMessage:   func(m json.RawMessage) { n.msgs <- string(m) },
		OnListening: func(a Address) { n.at <- a },
	}
}

func start(t *testing.T, p *Primary, id int, script string, args ...string) *node {
	t.Helper()
	mine, theirs, err := nodeipc.Pair()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, exited: make(chan struct{}), msgs: make(chan string, 100), at: make(chan Address, 100)}
	fd, err := fdpass.DupFile(mine)
	if err != nil {
		t.Fatal(err)
	}
	n.kept = os.NewFile(uintptr(fd), "kept")
	n.cmd = exec.Command("node", append([]string{filepath.Join("testdata", script)}, args...)...)
	n.cmd.ExtraFiles = []*os.File{theirs}
	n.cmd.Env = append(p.Env(id, os.Environ()), nodeipc.Env(3)...)
	n.cmd.Stdout, n.cmd.Stderr = &n.out, &n.out
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	go func() {
		defer close(n.exited)
		_ = n.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = n.cmd.Process.Kill()
		<-n.exited
		n.kept.Close()
		if t.Failed() && n.out.Len() > 0 {
			t.Logf("worker %d: %s", id, &n.out)
		}
	})
	if n.Worker, err = p.Attach(id, mine, n.handlers(), false); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) pid() string { return fmt.Sprint(n.cmd.Process.Pid) }

// await waits for ch, which is closed or sends.
func await[T any](t *testing.T, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("no %s", what)
		panic("unreachable")
	}
}

func (n *node) listens() *node {
	n.t.Helper()
	await(n.t, "listening", n.Listening())
	return n
}

// freePort is one that was free a moment ago.
func freePort(t *testing.T) string {
	t.Helper()
	port, err := harness.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// get is one request over a connection of its own.
func get(network, addr string) (string, error) {
	c, err := net.DialTimeout(network, addr, patience)
	if err != nil {
		return "", err
	}
	return ask(c)
}

// ask is one request over a connection, which it closes.
func ask(c net.Conn) (string, error) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, "GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		return "", err
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return string(b), err
}

// serves waits until every one of the workers has answered.
func serves(t *testing.T, network, addr string, want ...*node) {
	t.Helper()
	left := map[string]bool{}
	for _, n := range want {
		left[n.pid()] = true
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	deadline := time.Now().Add(patience)
	for range 8 { // several at once: at rest the kernel may always choose the same
		wg.Add(1)
		go func() {
			defer wg.Done()
			for time.Now().Before(deadline) {
				pid, err := get(network, addr)
				mu.Lock()
				if err != nil {
					t.Errorf("request to %s: %v", addr, err)
				}
				delete(left, pid)
				done := len(left) == 0 || err != nil
				mu.Unlock()
				if done {
					return
				}
			}
		}()
	}
	wg.Wait()
	if len(left) > 0 {
		t.Fatalf("%s: no answer from %v", addr, left)
	}
}

func TestHTTPServersShareTheirPorts(t *testing.T) {
	for name, policy := range map[string]Policy{"shared": Shared, "rr": RoundRobin} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			a, b, sock := freePort(t), freePort(t), filepath.Join(dir, "s.sock")
			p := primary(t, Options{Policy: policy})
			one := start(t, p, 1, "http.js", a+","+b+","+sock)
			two := start(t, p, 2, "http.js", a+","+b+","+sock)
			one.listens()
			two.listens()
			serves(t, "tcp", "127.0.0.1:"+a, one, two)
			serves(t, "tcp", "127.0.0.1:"+b, one, two)
			serves(t, "unix", sock, one, two)
			ports := []string{}
			for range 3 {
				ad := await(t, "address", one.at)
				ports = append(ports, fmt.Sprintf("%d %s", ad.Port, ad.Address))
			}
			slices.Sort(ports)
			want := []string{a + " ", b + " ", "-1 " + sock}
			slices.Sort(want)
			if !slices.Equal(ports, want) {
				t.Errorf("listening at %q, want %q", ports, want)
			}

			// What the program asks for is answered to each alike.
			if n := len(p.Names()); n != 3 {
				t.Errorf("%d listeners, want 3", n)
			}
			p.Remove()
			if _, err := os.Lstat(sock); !os.IsNotExist(err) {
				t.Errorf("the socket's file is left: %v", err)
			}
			one.kept.Close()
			await(t, "exit", one.exited)
			if _, err := net.Dial("tcp", "127.0.0.1:"+a); err == nil {
				two.kept.Close()
				await(t, "exit", two.exited)
				if _, err := net.Dial("tcp", "127.0.0.1:"+a); err == nil {
					t.Error("the port is still open")
				}
			}
		})
	}
}

func TestUDPIsShared(t *testing.T) {
	port := freePort(t)
	p := primary(t, Options{Policy: RoundRobin}) // which UDP is exempt from
	one := start(t, p, 1, "udp.js", port).listens()
	c, err := net.Dial("udp", "127.0.0.1:"+port)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	echo := func() string {
		t.Helper()
		buf := make([]byte, 100)
		for range 100 {
			if _, err := c.Write([]byte("ping")); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			if n, err := c.Read(buf); err == nil {
				return string(buf[:n])
			}
		}
		t.Fatal("no echo")
		return ""
	}
	if got, want := echo(), one.pid()+" ping"; got != want {
		t.Errorf("echo %q, want %q", got, want)
	}
	two := start(t, p, 2, "udp.js", port).listens()
	if err := one.Disconnect(); err != nil {
		t.Fatal(err)
	}
	await(t, "end of the first", one.exited)
	if got, want := echo(), two.pid()+" ping"; got != want {
		t.Errorf("echo %q, want %q", got, want)
	}
	if a := await(t, "address", two.at); a.Type != "udp4" || fmt.Sprint(a.Port) != port {
		t.Errorf("listens at %+v", a)
	}
}

func TestMessagesPassThrough(t *testing.T) {
	port := freePort(t)
	p := primary(t, Options{})
	n := start(t, p, 5, "express.js", port).listens()
	if m := await(t, "message", n.msgs); m != `"ready"` {
		t.Errorf("message %s", m)
	}
	if err := n.Send(map[string]int{"a": 1}); err != nil {
		t.Fatal(err)
	}
	if m := await(t, "message", n.msgs); m != `{"echo":{"a":1}}` {
		t.Errorf("message %s", m)
	}
	res, err := http.Get("http://127.0.0.1:" + port + "/p")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	if id := res.Header.Get("x-worker"); id != "5" {
		t.Errorf("cluster.worker.id is %q", id)
	}
	if err := n.Send("shutdown"); err != nil {
		t.Fatal(err)
	}
	await(t, "exit", n.exited)
	if code := n.cmd.ProcessState.ExitCode(); code != 7 {
		t.Errorf("exit code %d", code)
	}
	await(t, "end of the channel", n.Done())
	if err := n.Send("late"); !errors.Is(err, nodeipc.ErrClosed) {
		t.Errorf("Send after the end: %v", err)
	}
}

// A program that something keeps alive says by the end of its channel that it
// has nothing left to do.
func TestDisconnectOfWhatNeverEnds(t *testing.T) {
	p := primary(t, Options{})
	n := start(t, p, 1, "express.js", freePort(t)).listens()
	if err := n.Disconnect(); err != nil {
		t.Fatal(err)
	}
	await(t, "end of the channel", n.Done())
	select {
	case <-n.exited:
		t.Error("it has ended by itself")
	default:
	}
}

func TestErrorsAreNodes(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for name, policy := range map[string]Policy{"shared": Shared, "rr": RoundRobin} {
		t.Run(name, func(t *testing.T) {
			p := primary(t, Options{Policy: policy})
			n := start(t, p, 1, "taken.js", port)
			if m := await(t, "message", n.msgs); m != `{"code":"EADDRINUSE","errno":-98}` {
				t.Errorf("the program was told %s", m)
			}
			if names := p.Names(); len(names) > 0 {
				t.Errorf("listeners %q", names)
			}
		})
	}
}

// knock connects all the time and reports the first refusal.
func knock(t *testing.T, addr string) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			c, err := net.DialTimeout("tcp", addr, patience)
			if err != nil {
				t.Errorf("the listener refuses: %v", err)
				return
			}
			c.Close()
			select { // spare the others the processor
			case <-ctx.Done():
			case <-time.After(2 * time.Millisecond):
			}
		}
	}()
	return func() { cancel(); <-done }
}

func TestListenerOutlivesItsWorkers(t *testing.T) {
	port := freePort(t)
	addr := "127.0.0.1:" + port
	p := primary(t, Options{})
	one := start(t, p, 1, "http.js", port).listens()
	two := start(t, p, 2, "http.js", port).listens()
	serves(t, "tcp", addr, one, two)
	stop := knock(t, addr)
	_ = one.cmd.Process.Kill()
	<-one.exited
	await(t, "end of the channel", one.Done())
	serves(t, "tcp", addr, two)
	_ = two.cmd.Process.Kill()
	<-two.exited
	await(t, "end of the channel", two.Done())

	// Nobody is left. Who comes now waits for the next worker.
	answer := make(chan string, 1)
	go func() {
		a, err := get("tcp", addr)
		if err != nil {
			a = err.Error()
		}
		answer <- a
	}()
	three := start(t, p, 3, "http.js", port).listens()
	if a := await(t, "answer", answer); a != three.pid() {
		t.Errorf("answer %q, want %s", a, three.pid())
	}
	stop()
}

// pressure is clients that ask all the time: half with a connection kept alive,
// half with a new one for each request.
type pressure struct {
	t *testing.T
	*load.Load
}

// think is what a client does between two requests: the workers must be able to
// start beside all this.
const think = 20 * time.Millisecond

func press(t *testing.T, addr string, clients int) pressure {
	return pressure{t, load.Start(load.Options{Addr: addr, Kept: clients, Fresh: clients, Think: think, Timeout: patience})}
}

// wait waits for n more requests.
func (p pressure) wait(n int) {
	p.t.Helper()
	if err := p.Wait(n, patience); err != nil {
		p.t.Fatal(err)
	}
}

// end holds every request that failed against the test.
func (p pressure) end() {
	f := p.Stop()
	if len(f.Failures) > 0 {
		p.t.Errorf("%d of %d requests failed: %v", len(f.Failures), f.Requests, &f)
	}
	p.t.Log(&f)
}

func TestReplacedUnderLoadWithoutALostRequest(t *testing.T) {
	for name, policy := range map[string]Policy{"shared": Shared, "rr": RoundRobin} {
		t.Run(name, func(t *testing.T) {
			port := freePort(t)
			p := primary(t, Options{Policy: policy})
			var now []*node
			for id := range 2 {
				now = append(now, start(t, p, id+1, "http.js", port, "20").listens())
			}
			l := press(t, "127.0.0.1:"+port, 20)
			defer l.end()
			l.wait(100)
			rounds := 3
			if policy == RoundRobin {
				rounds = 1
			}
			for round := range rounds {
				old := now[0]
				now = append(now[1:], start(t, p, round+3, "http.js", port, "20").listens())
				if err := old.Disconnect(); err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				await(t, "end of the channel", old.Done())
				await(t, "end of the worker", old.exited)
				t.Logf("worker ended %v after it was asked to: %v", time.Since(began).Round(time.Millisecond), old.cmd.ProcessState)
				if code := old.cmd.ProcessState.ExitCode(); code != 0 {
					t.Errorf("exit code %d", code)
				}
				l.wait(50)
			}
		})
	}
}

func TestPrimaryIsReplaced(t *testing.T) {
	for name, policy := range map[string]Policy{"shared": Shared, "rr": RoundRobin} {
		t.Run(name, func(t *testing.T) {
			port, store := freePort(t), newShelf(t)
			p := primary(t, Options{Store: store, Policy: policy})
			one := start(t, p, 1, "http.js", port, "20").listens()
			two := start(t, p, 2, "http.js", port, "20").listens()
			// What a dying primary has in its hand when it deals is lost: that is
			// the price of that policy. So there it dies at rest.
			clients := 10
			if policy == RoundRobin {
				clients = 0
			}
			l := press(t, "127.0.0.1:"+port, clients)
			defer l.end()
			l.wait(10 * clients)
			p.Close()

			next := primary(t, Options{Store: store, Policy: policy, Listeners: store.copies(t)})
			for id, n := range []*node{one, two} {
				fd, err := fdpass.DupFile(n.kept)
				if err != nil {
					t.Fatal(err)
				}
				if n.Worker, err = next.Attach(id+1, os.NewFile(uintptr(fd), "ipc"), n.handlers(), true); err != nil {
					t.Fatal(err)
				}
				await(t, "listening", n.Listening())
			}
			serves(t, "tcp", "127.0.0.1:"+port, one, two)
			l.wait(10 * clients)
			next.Prune() // must leave alone what the resumed have
			three := start(t, next, 3, "http.js", port, "20").listens()
			for _, n := range []*node{one, two} {
				if err := n.Disconnect(); err != nil {
					t.Fatal(err)
				}
				await(t, "end of the worker", n.exited)
			}
			serves(t, "tcp", "127.0.0.1:"+port, three)
			if got := store.names(); len(got) != 1 {
				t.Errorf("stored %q", got)
			}
		})
	}
}

func TestPruneAndLinger(t *testing.T) {
	port, store := freePort(t), newShelf(t)
	p := primary(t, Options{Store: store, Linger: time.Hour})
	n := start(t, p, 1, "closing.js", port).listens()
	if err := n.Send("handle"); err != nil { // refused, and the rest works on
		t.Fatal(err)
	}
	if err := n.Send("close"); err != nil {
		t.Fatal(err)
	}
	if m := await(t, "message", n.msgs); m != `"closed"` {
		t.Errorf("message %s", m)
	}
	if names := store.names(); len(names) != 1 {
		t.Errorf("a program that closes its server shall find it again: stored %q", names)
	}
	p.Prune()
	if names := store.names(); len(names) != 0 || len(p.Names()) != 0 {
		t.Errorf("stored %q, listeners %q after Prune", names, p.Names())
	}

	q := primary(t, Options{Store: store, Linger: time.Millisecond})
	n = start(t, q, 1, "closing.js", port).listens()
	if err := n.Send("close"); err != nil {
		t.Fatal(err)
	}
	await(t, "message", n.msgs)
	for deadline := time.Now().Add(patience); len(store.names()) > 0; {
		if time.Now().After(deadline) {
			t.Fatal("the port is never given back")
		}
		time.Sleep(time.Millisecond)
	}
}

// raw is a worker whose words the test chooses.
func raw(t *testing.T, p *Primary, h Handlers, resumed bool) (*Worker, *net.UnixConn) {
	t.Helper()
	mine, theirs, err := nodeipc.Pair()
	if err != nil {
		t.Fatal(err)
	}
	w, err := p.Attach(1, mine, h, resumed)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.FileConn(theirs)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return w, c.(*net.UnixConn)
}

func TestMalformed(t *testing.T) {
	deep := strings.Repeat("[", 20000) + strings.Repeat("]", 20000)
	for name, c := range map[string]struct {
		say  string
		want error
	}{
		"garbage":    {"hello\n", nodeipc.ErrMalformed},
		"empty":      {"\n", nodeipc.ErrMalformed},
		"two":        {"{}{}\n", nodeipc.ErrMalformed},
		"half":       {"{\"cmd\":\"NODE_CLUSTER\"\n", nodeipc.ErrMalformed},
		"deep":       {deep + "\n", nodeipc.ErrMalformed},
		"long":       {strings.Repeat("1", nodeipc.MaxLine+1), nodeipc.ErrTooLong},
		"quiet end":  {"{\"a\":1}\n", nil},
		"half a one": {"{\"a\":", nil},
	} {
		t.Run(name, func(t *testing.T) {
			p := primary(t, Options{})
			closed := make(chan error, 1)
			_, conn := raw(t, p, Handlers{OnClose: func(err error) { closed <- err }}, false)
			go func() {
				_, _ = io.WriteString(conn, c.say)
				_ = conn.CloseWrite()
			}()
			if err := await(t, "end", closed); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
				t.Errorf("ended with %v, want %v", err, c.want)
			}
		})
	}
}

// Whatever a worker claims, the answer is one of Node's, and the next request
// is served.
func TestOddRequests(t *testing.T) {
	p := primary(t, Options{})
	got := make(chan string, 100)
	_, c := raw(t, p, Handlers{OnMessage: func(m json.RawMessage) { got <- string(m) }}, true)
	lines := bufio.NewScanner(c)
	ask := func(q string) (r struct {
		Cmd, Type  string
		Ack, Errno int
		Msg        struct{ Ack, Errno int }
	}) {
		t.Helper()
		if _, err := io.WriteString(c, q+"\n"); err != nil {
			t.Fatal(err)
		}
		if !lines.Scan() {
			t.Fatal(lines.Err())
		}
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	// The rest of a line that an earlier primary had begun to read.
	_, _ = io.WriteString(c, "ss\":\"127.0.0.1\"}\n")
	for n, q := range []string{
		`"port":-5,"addressType":4`, `"port":70000,"addressType":4`, `"port":1e99,"addressType":4,"address":"127.0.0.1:1"`,
		`"address":"nonsense","port":0,"addressType":4`, `"port":0,"fd":3`, `"port":-1,"addressType":-1`,
		`"port":-1,"addressType":-1,"address":"` + strings.Repeat("x", 200) + `"`,
		`"port":-1,"addressType":-1,"address":"/nowhere/at/all"`, `"address":{},"port":[],"addressType":{},"fd":0`,
		`"address":"fe80::1%nosuch0","port":0,"addressType":6`, `"address":"203.0.113.1","port":0,"addressType":"udp4"`,
	} {
		r := ask(fmt.Sprintf(`{"cmd":"NODE_CLUSTER","act":"queryServer","seq":%d,%s}`, n+1, q))
		if r.Ack != n+1 || r.Errno >= 0 {
			t.Errorf("%s: answer %+v", q, r)
		}
	}
	for _, m := range []string{`{"CMD":"NODE_HANDLE"}`, `{"cmd":"NODE_"}`, `[{"cmd":"NODE_HANDLE"}]`, `null`, `{"cmd":["NODE_X"]}`} {
		if _, err := io.WriteString(c, m+"\n"); err != nil {
			t.Fatal(err)
		}
		if g := await(t, "message", got); g != m {
			t.Errorf("got %s, want %s", g, m)
		}
	}
	for _, m := range []string{
		`{"cmd":"NODE_CLUSTER"}`, `{"cmd":"NODE_CLUSTER","ack":7,"accepted":true}`, `{"cmd":"NODE_HANDLE_ACK"}`, `{"cmd":"NODE_HANDLE_NACK"}`,
		`{"cmd":"NODE_CLUSTER","act":"close","key":"none"}`, `{"cmd":"NODE_OTHER"}`, `{"\u0063md":"NODE_OTHER"}`,
	} {
		if _, err := io.WriteString(c, m+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	// A handle is sent again when it did not arrive, and nothing overtakes it.
	q := `{"cmd":"NODE_CLUSTER","act":"queryServer","seq":50,"address":"127.0.0.1","port":0,"addressType":4}`
	for n := range 1 + maxRetries {
		if r := ask(q); r.Cmd != "NODE_HANDLE" || r.Type != "net.Native" || r.Msg.Ack != 50 || r.Msg.Errno != 0 {
			t.Errorf("answer %d: %+v", n, r)
		}
		q = `{"cmd":"NODE_HANDLE_NACK"}`
	}
	if r := ask(q + "\n" + `{"cmd":"NODE_CLUSTER","act":"exitedAfterDisconnect","seq":51}`); r.Ack != 51 {
		t.Errorf("answer %+v", r)
	}
	if r := ask(`{"cmd":"NODE_HANDLE","type":"net.Socket"}`); r.Cmd != "NODE_HANDLE_NACK" {
		t.Errorf("answer %+v", r)
	}
	if len(got) > 0 {
		t.Errorf("the owner was shown %s", <-got)
	}
}

// A worker that reads nothing holds nobody up, and gets all of it in order.
func TestSlowReader(t *testing.T) {
	p := primary(t, Options{})
	w, c := raw(t, p, Handlers{}, false)
	sent := 0
	for {
		err := w.Send(fmt.Sprintf("%06d%s", sent, strings.Repeat("x", 10000)))
		if errors.Is(err, nodeipc.ErrFull) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		sent++
	}
	lines := bufio.NewScanner(c)
	for n := range sent {
		if !lines.Scan() {
			t.Fatal(lines.Err())
		}
		if !strings.HasPrefix(lines.Text(), fmt.Sprintf(`"%06d`, n)) {
			t.Fatalf("line %d is %.10s", n, lines.Text())
		}
	}
	if err := w.Send("again"); err != nil {
		t.Error(err)
	}
	if !lines.Scan() || lines.Text() != `"again"` {
		t.Errorf("line %.20s, %v", lines.Text(), lines.Err())
	}
}

func TestUnixSocketWhoseFileWasRemoved(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s.sock")
	p := primary(t, Options{Store: newShelf(t)})
	one := start(t, p, 1, "http.js", sock).listens()
	serves(t, "unix", sock, one)
	if err := os.Remove(sock); err != nil { // as programs do before they listen
		t.Fatal(err)
	}
	two := start(t, p, 2, "http.js", sock).listens()
	serves(t, "unix", sock, two)
}

// TestSticky: a client stays with its worker; when that goes its clients go to
// the others, and come back to the worker that replaces it.
func TestSticky(t *testing.T) {
	port := freePort(t)
	p := primary(t, Options{Policy: Sticky})
	one := start(t, p, 1, "http.js", port, "1").listens()
	two := start(t, p, 2, "http.js", port, "1").listens()
	const clients = 24
	// places tells who serves each client, in several connections of each.
	places := func() (out []string) {
		t.Helper()
		for n := range clients {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(10+n))}, Timeout: patience}
			var at string
			for k := range 3 {
				c, err := d.Dial("tcp", "127.0.0.1:"+port)
				if err != nil {
					t.Fatal(err)
				}
				pid, err := ask(c)
				if err != nil {
					t.Fatal(err)
				}
				if k > 0 && pid != at {
					t.Errorf("client %d went from %s to %s", n, at, pid)
				}
				at = pid
			}
			out = append(out, at)
		}
		return out
	}
	first := places()
	if !slices.Contains(first, one.pid()) || !slices.Contains(first, two.pid()) {
		t.Errorf("all clients are with one: %v", first)
	}
	if err := one.Disconnect(); err != nil {
		t.Fatal(err)
	}
	for n, at := range places() {
		if at != two.pid() {
			t.Errorf("client %d is with %s", n, at)
		}
	}
	next := start(t, p, 1, "http.js", port, "1").listens()
	for n, at := range places() {
		want := first[n]
		if want == one.pid() {
			want = next.pid()
		}
		if at != want {
			t.Errorf("client %d is with %s, was with %s", n, at, first[n])
		}
	}
	// One more takes some, and from everybody.
	three := start(t, p, 3, "http.js", port, "1").listens()
	moved := 0
	for n, at := range places() {
		if at == three.pid() {
			moved++
		} else if was := first[n]; was == two.pid() && at != was || was == one.pid() && at != next.pid() {
			t.Errorf("client %d is with %s, was with %s", n, at, was)
		}
	}
	if moved == 0 || moved > clients*3/4 {
		t.Errorf("%d of %d clients moved", moved, clients)
	}
	// One that takes nothing is passed over in the end.
	_ = next.cmd.Process.Signal(syscall.SIGSTOP)
	defer func() { _ = next.cmd.Process.Signal(syscall.SIGCONT) }()
	victim := -1
	for n := range clients {
		if first[n] == one.pid() {
			victim = n
		}
	}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(10+victim))}, Timeout: patience}
	answered := make(chan string, 2*stickyAhead)
	for range 2 * stickyAhead {
		c, err := d.Dial("tcp", "127.0.0.1:"+port)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		go func() {
			if pid, err := ask(c); err == nil {
				answered <- pid
			}
		}()
	}
	if pid := await(t, "answer by another", answered); pid == next.pid() {
		t.Errorf("answer of the stopped one")
	}
}

// TestPolicyChanges: workers of before go on as they are, new ones are under
// the new policy.
func TestPolicyChanges(t *testing.T) {
	port := freePort(t)
	p := primary(t, Options{})
	one := start(t, p, 1, "http.js", port).listens()
	for _, policy := range []Policy{Sticky, RoundRobin, Shared, RoundRobin, Sticky} {
		p.SetPolicy(policy)
		p.SetPolicy(policy)
		two := start(t, p, 2, "http.js", port).listens()
		one.kept.Close()
		if err := one.Disconnect(); err != nil {
			t.Fatal(err)
		}
		await(t, "end of the worker", one.exited)
		serves(t, "tcp", "127.0.0.1:"+port, two)
		one = two
	}
}

func TestScoresAreEven(t *testing.T) {
	const clients, workers = 10_000, 8
	var counts [workers]int
	for n := range clients {
		from := hashOf(&unix.SockaddrInet4{Addr: [4]byte{10, 1, byte(n >> 8), byte(n)}})
		if six := hashOf(&unix.SockaddrInet6{Addr: [16]byte{10: 0xff, 11: 0xff, 12: 10, 13: 1, 14: byte(n >> 8), 15: byte(n)}}); six != from {
			t.Fatalf("%x by IPv6, %x by IPv4", six, from)
		}
		best := 0
		for w := range workers {
			if score(from, w) > score(from, best) {
				best = w
			}
		}
		counts[best]++
	}
	for w, n := range counts {
		if n < clients/workers*8/10 || n > clients/workers*12/10 {
			t.Errorf("worker %d has %d of %d clients", w, n, clients)
		}
	}
}

func TestParsePolicy(t *testing.T) {
	for s, want := range map[string]Policy{"": Shared, "none": Shared, "rr": RoundRobin} {
		if got, err := ParsePolicy(s); got != want || err != nil {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	if _, err := ParsePolicy("RR"); err == nil {
		t.Error("RR is taken")
	}
}

func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{"cmd":"NODE_CLUSTER","act":"queryServer","seq":0,"index":0,"data":null,"address":null,"port":3000,"addressType":4,"flags":0}`,
		`{"cmd":"NODE_HANDLE_ACK"}`, `"ready"`, `{}`, `{"cmd":1}`, `{"\u0063md":"NODE_X"}`, `[`, ``, `{"cmd":"NODE_CLUSTER","port":1e400}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		cmd, fl, err := decode(b)
		var v any
		dec := json.NewDecoder(bytes.NewReader(b))
		dec.UseNumber()
		if _ = dec.Decode(&v); json.Valid(b) != (err == nil) {
			t.Fatalf("%q: %v", b, err)
		}
		if err != nil {
			return
		}
		want := ""
		if m, ok := v.(map[string]any); ok {
			if s, ok := m["cmd"].(string); ok && len(s) > 5 && strings.HasPrefix(s, "NODE_") {
				want = s
			}
		}
		if cmd != want {
			t.Fatalf("%q: %q, want %q", b, cmd, want)
		}
		q := fl.query()
		_ = q.key()
		_ = fl.number("seq", -1)
	})
}

func FuzzSplit(f *testing.F) {
	f.Add([]byte("a\nbc\n\nd"), 3)
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		step = max(1, step&0xff)
		var got [][]byte
		var pending []byte
		for rest := b; len(rest) > 0; {
			n := min(step, len(rest))
			var err error
			pending, err = split(pending, slices.Clone(rest[:n]), func(l []byte) error {
				got = append(got, bytes.Clone(l))
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if all := bytes.Join(append(got, pending), []byte("\n")); !bytes.Equal(all, b) {
			t.Fatalf("%q became %q", b, all)
		}
	})
}
