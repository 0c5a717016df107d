package nodeipc

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is for things that happen at once on an idle machine.
const patience = 30 * time.Second

func newHub(t testing.TB) *Hub {
	t.Helper()
	h, err := NewHub()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

type peer struct {
	*Channel
	child    *os.File
	messages chan string
	closed   chan error
}

// open makes a channel whose child's end is in the test's hands.
func open(t testing.TB, h *Hub, resumed bool) *peer {
	t.Helper()
	parent, child, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { child.Close() })
	p := &peer{child: child, messages: make(chan string, 1000), closed: make(chan error, 2)}
	p.Channel, err = h.Open(parent, Handlers{
		OnMessage: func(m json.RawMessage) { p.messages <- string(m) },
		OnClose:   func(err error) { p.closed <- err },
		Resumed:   resumed,
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *peer) write(t testing.TB, s string) {
	t.Helper()
	if _, err := p.child.WriteString(s); err != nil {
		t.Fatal(err)
	}
}

func (p *peer) want(t testing.TB, want string) {
	t.Helper()
	var got string
	select {
	case got = <-p.messages:
	case err := <-p.closed:
		p.closed <- err
		select {
		case got = <-p.messages: // was there before the end
		default:
			t.Fatalf("closed with %v, want message %.200q", err, want)
		}
	case <-time.After(patience):
		t.Fatalf("no message, want %.200q", want)
	}
	if got != want {
		t.Fatalf("message %.200q, want %.200q", got, want)
	}
}

func (p *peer) wantClosed(t testing.TB) error {
	t.Helper()
	select {
	case err := <-p.closed:
		return err
	case m := <-p.messages:
		t.Fatalf("message %.200q, want the end", m)
	case <-time.After(patience):
		t.Fatal("not closed")
	}
	return nil
}

// node starts a real Node program on a channel.
func node(t *testing.T, h *Hub, script string) (*peer, *exec.Cmd) {
	t.Helper()
	parent, child, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{messages: make(chan string, 1000), closed: make(chan error, 2)}
	cmd := exec.Command("node", "-e", script)
	cmd.ExtraFiles = []*os.File{child} // becomes descriptor 3
	cmd.Env = append(os.Environ(), Env(3)...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	child.Close()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	p.Channel, err = h.Open(parent, Handlers{
		OnMessage: func(m json.RawMessage) { p.messages <- string(m) },
		OnClose:   func(err error) { p.closed <- err },
	})
	if err != nil {
		t.Fatal(err)
	}
	return p, cmd
}

func TestNodeReadyAndShutdown(t *testing.T) {
	p, cmd := node(t, newHub(t), `
		process.on('message', m => { if (m === 'shutdown') { process.send({bye: 'ü\n'}, () => process.exit(7)) } });
		process.send('ready');`)
	p.want(t, `"ready"`)
	if err := p.Send("shutdown"); err != nil {
		t.Fatal(err)
	}
	p.want(t, `{"bye":"ü\n"}`)
	if err := p.wantClosed(t); err != nil {
		t.Errorf("closed with %v, want nil", err)
	}
	var ee *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &ee) || ee.ExitCode() != 7 {
		t.Errorf("node ended with %v, want status 7", err)
	}
	if err := p.Send("more"); !errors.Is(err, ErrClosed) {
		t.Errorf("Send after the end: %v, want ErrClosed", err)
	}
}

func TestNodeDisconnect(t *testing.T) {
	h := newHub(t)
	p, cmd := node(t, h, `process.on('message', () => {}); process.send('up'); process.disconnect()`)
	p.want(t, `"up"`)
	if err := p.wantClosed(t); err != nil {
		t.Errorf("closed with %v, want nil", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}

	p, cmd = node(t, h, `process.on('message', () => {}); process.on('disconnect', () => process.exit(9)); process.send('up')`)
	p.want(t, `"up"`)
	_ = p.Close()
	var ee *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &ee) || ee.ExitCode() != 9 {
		t.Errorf("node ended with %v, want status 9 from its disconnect handler", err)
	}
	select {
	case err := <-p.closed:
		t.Errorf("OnClose(%v) after Close", err)
	default:
	}
}

// A program that passes a handle is told that it did not arrive, and goes on.
func TestNodeHandle(t *testing.T) {
	before := descriptors(t)
	p, _ := node(t, newHub(t), `
		const s = require('net').createServer().listen(0, '127.0.0.1', () => {
			process.send({with: 'handle'}, s);
			process.send('after');
		});
		process.on('message', () => {});`)
	// Node keeps back what follows a handle until that is answered.
	p.want(t, `"after"`)
	_ = p.Close()
	if after := descriptors(t); after > before+3 { // epoll and its poller
		t.Errorf("%d descriptors before, %d after: passed ones were kept", before, after)
	}
}

func TestNodeLargeMessages(t *testing.T) {
	p, _ := node(t, newHub(t), `process.on('message', m => process.send(m))`)
	for i, size := range []int{1, 70_000, 1_000_000, MaxLine - 2} {
		s := strings.Repeat(string(rune('a'+i)), size)
		if err := p.Send(s); err != nil {
			t.Fatal(err)
		}
		p.want(t, `"`+s+`"`)
	}
}

func TestOwnMessagesOfNode(t *testing.T) {
	p := open(t, newHub(t), false)
	p.write(t, `{"cmd":"NODE_CLUSTER","act":"online"}`+"\n"+
		`{"a":1,"cmd":"\u004eODE_HANDLE_ACK"}`+"\n"+
		`{"CMD":"NODE_x"}`+"\n"+
		`{"cmd":"NODE_"}`+"\n"+ // Node too wants something after it
		`{"cmd":"NODE_x","cmd":5}`+"\n"+
		`{"x":{"cmd":"NODE_x"}}`+"\n"+
		` "NODE_x" `+"\n")
	for _, want := range []string{`{"CMD":"NODE_x"}`, `{"cmd":"NODE_"}`, `{"cmd":"NODE_x","cmd":5}`, `{"x":{"cmd":"NODE_x"}}`, ` "NODE_x" `} {
		p.want(t, want)
	}
	p.write(t, `{"cmd":"NODE_HANDLE","type":"net.Server"}`+"\n")
	buf := make([]byte, 100)
	n, err := p.child.Read(buf)
	if err != nil || string(buf[:n]) != `{"cmd":"NODE_HANDLE_NACK"}`+"\n" {
		t.Errorf("answer %q, %v", buf[:n], err)
	}
}

func TestPassedDescriptorsAreClosed(t *testing.T) {
	p := open(t, newHub(t), false)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	oob := unix.UnixRights(int(w.Fd()), int(w.Fd()), int(w.Fd()))
	if err := unix.Sendmsg(int(p.child.Fd()), []byte("1\n"), oob, nil, 0); err != nil {
		t.Fatal(err)
	}
	w.Close()
	p.want(t, "1")
	// The pipe ends only when the last copy is closed.
	if err := r.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read: %v, want EOF", err)
	}
}

func TestMalformed(t *testing.T) {
	deep := strings.Repeat("[", MaxDepth) + strings.Repeat("]", MaxDepth)
	for name, c := range map[string]struct {
		line string
		want error
	}{
		"not JSON":    {"{oops}\n", ErrMalformed},
		"empty":       {"\n", ErrMalformed},
		"two values":  {"1 2\n", ErrMalformed},
		"too deep":    {"[" + deep + "]\n", ErrMalformed},
		"deep enough": {deep + "\n", nil},
		"brackets in a string": {`"` + strings.Repeat(`[\"`, 2*MaxDepth) + "\"\n",
			nil},
		"too long": {strings.Repeat("x", MaxLine+1), ErrTooLong},
	} {
		t.Run(name, func(t *testing.T) {
			p := open(t, newHub(t), false)
			go func() { _, _ = p.child.WriteString(c.line) }() // the long one fails at the close
			if c.want == nil {
				p.want(t, strings.TrimSuffix(c.line, "\n"))
				return
			}
			if err := p.wantClosed(t); !errors.Is(err, c.want) {
				t.Errorf("closed with %v, want %v", err, c.want)
			}
			if err := p.Send(1); !errors.Is(err, ErrClosed) {
				t.Errorf("Send: %v, want ErrClosed", err)
			}
		})
	}
}

func TestResumed(t *testing.T) {
	h := newHub(t)
	p := open(t, h, true)
	p.write(t, `f of a message"`+"\n\"whole\"\n")
	p.want(t, `"whole"`)
	p.write(t, "again}\n")
	if err := p.wantClosed(t); !errors.Is(err, ErrMalformed) {
		t.Errorf("closed with %v, want ErrMalformed: only the first line may be broken", err)
	}
}

// The last words of a program count, even though it does not read any more.
func TestEndAfterMessages(t *testing.T) {
	p := open(t, newHub(t), false)
	for range 10 {
		if err := p.Send("unread"); err != nil {
			t.Fatal(err)
		}
	}
	p.write(t, "1\n2\n3")
	p.child.Close() // with messages unread
	p.want(t, "1")
	p.want(t, "2")
	if err := p.wantClosed(t); err != nil {
		t.Errorf("closed with %v, want nil", err)
	}
}

func TestSendNeverBlocks(t *testing.T) {
	p := open(t, newHub(t), false)
	line := strings.Repeat("x", 10_000)
	sent := 0
	for ; sent < 10_000; sent++ {
		if err := p.Send(fmt.Sprintf("%d %s", sent, line)); err != nil {
			if !errors.Is(err, ErrFull) {
				t.Fatal(err)
			}
			break
		}
	}
	if sent == 10_000 {
		t.Fatal("100 MB were taken for a program that does not read")
	}
	// All that was taken arrives, in order and whole.
	dec := json.NewDecoder(p.child)
	for i := range sent {
		var got string
		if err := dec.Decode(&got); err != nil {
			t.Fatal(err)
		}
		if got != fmt.Sprintf("%d %s", i, line) {
			t.Fatalf("message %d is %.20q…", i, got)
		}
	}
	if err := p.Send("room again"); err != nil {
		t.Error(err)
	}
	if err := p.Send(strings.Repeat("x", MaxLine)); !errors.Is(err, ErrTooLong) {
		t.Errorf("Send: %v, want ErrTooLong", err)
	}
	if err := p.Send(func() {}); err == nil {
		t.Error("Send of a function: no error")
	}
}

func TestCloseFromHandlers(t *testing.T) {
	h := newHub(t)
	parent, child, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer child.Close()
	got := make(chan string, 10)
	ready := make(chan *Channel, 1)
	c, err := h.Open(parent, Handlers{
		OnMessage: func(m json.RawMessage) { c := <-ready; got <- string(m); _ = c.Close() },
		OnClose:   func(err error) { got <- fmt.Sprint("closed: ", err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	ready <- c
	if _, err := child.WriteString("1\n2\n3\n"); err != nil {
		t.Fatal(err)
	}
	if m := <-got; m != "1" {
		t.Errorf("message %q, want 1", m)
	}
	if _, err := child.Read(make([]byte, 1)); err == nil {
		t.Error("child's end is open after Close")
	}
	h.Close()
	if len(got) > 0 {
		t.Errorf("%q after Close", <-got)
	}
	if _, err := h.Open(os.NewFile(uintptr(dup(t, child)), "x"), Handlers{}); !errors.Is(err, ErrClosed) {
		t.Errorf("Open on a closed hub: %v, want ErrClosed", err)
	}
}

// A duplicate that lives on elsewhere (in the keeper) must not keep the hub
// busy after Close.
func TestCloseWithDuplicate(t *testing.T) {
	h := newHub(t)
	parent, child, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer child.Close()
	kept := os.NewFile(uintptr(dup(t, parent)), "kept")
	c, err := h.Open(parent, Handlers{OnMessage: func(json.RawMessage) { t.Error("message after Close") }})
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if _, err := child.WriteString("1\n"); err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 1)
	if _, err := h.Open(kept, Handlers{OnMessage: func(m json.RawMessage) { got <- string(m) }}); err != nil {
		t.Fatal(err)
	}
	select {
	case m := <-got:
		if m != "1" {
			t.Errorf("message %q, want 1", m)
		}
	case <-time.After(patience):
		t.Error("what came meanwhile is lost")
	}
}

func TestIdleMemory(t *testing.T) {
	const n = 1000
	raiseFiles(t)
	h := newHub(t)
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	children := make([]int, n)
	got := make(chan struct{}, n)
	before := heap()
	goroutines := runtime.NumGoroutine()
	for i := range n {
		parent, child, err := Pair()
		if err != nil {
			t.Fatal(err)
		}
		children[i] = dup(t, child)
		child.Close()
		if _, err := h.Open(parent, Handlers{OnMessage: func(json.RawMessage) { got <- struct{}{} }}); err != nil {
			t.Fatal(err)
		}
	}
	for _, fd := range children {
		if _, err := unix.Write(fd, []byte("\"ready\"\n")); err != nil {
			t.Fatal(err)
		}
	}
	for range n {
		<-got
	}
	each := (int64(heap()) - int64(before)) / n
	t.Logf("%d bytes a channel", each)
	if each > 3<<10 {
		t.Errorf("%d bytes a channel, want at most 3 KiB", each)
	}
	if g := runtime.NumGoroutine(); g > goroutines {
		t.Errorf("%d goroutines more for %d channels", g-goroutines, n)
	}
	for _, fd := range children {
		_ = unix.Close(fd)
	}
}

func TestEnv(t *testing.T) {
	if got := Env(5); !slices.Equal(got, []string{"NODE_CHANNEL_FD=5", "NODE_CHANNEL_SERIALIZATION_MODE=json"}) {
		t.Error(got)
	}
}

func raiseFiles(t *testing.T) {
	t.Helper()
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		t.Fatal(err)
	}
	l.Cur = l.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		t.Fatal(err)
	}
}

func dup(t testing.TB, f *os.File) int {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func descriptors(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// The decoder gives the same lines however the bytes are cut, and passes on
// only what is JSON and not Node's own.
func FuzzLines(f *testing.F) {
	f.Add([]byte("\"ready\"\n{\"cmd\":\"NODE_HANDLE\"}\n[1,2"), 3)
	f.Add([]byte("\n\n"), 1)
	f.Add([]byte(`{"cmd":"\u004eODE_X","cmd":1}`+"\n"), 7)
	f.Fuzz(func(t *testing.T, data []byte, cut int) {
		cut = max(1, cut%17)
		var pending []byte
		var got [][]byte
		rest := data
		for len(rest) > 0 {
			n := min(cut, len(rest))
			var err error
			pending, err = splitLines(pending, rest[:n], func(b []byte) error {
				got = append(got, bytes.Clone(b))
				return nil
			})
			if err != nil {
				if len(data) <= MaxLine {
					t.Fatal(err)
				}
				return
			}
			rest = rest[n:]
		}
		want := bytes.Split(data, []byte("\n"))
		if !bytes.Equal(pending, want[len(want)-1]) || len(got) != len(want)-1 {
			t.Fatalf("lines %q, rest %q of %q", got, pending, data)
		}
		for i, line := range got {
			if !bytes.Equal(line, want[i]) {
				t.Fatalf("line %d is %q, want %q", i, line, want[i])
			}
			cmd, err := decode(line)
			if err != nil {
				if !errors.Is(err, ErrMalformed) {
					t.Fatal(err)
				}
				continue
			}
			if !json.Valid(line) {
				t.Fatalf("%q was taken for JSON", line)
			}
			var m map[string]any
			if json.Unmarshal(line, &m) == nil {
				s, _ := m["cmd"].(string)
				if own := strings.HasPrefix(s, "NODE_") && len(s) > 5; own != (cmd != "") {
					t.Fatalf("%q: cmd %q", line, cmd)
				}
			}
		}
	})
}

func BenchmarkMessage(b *testing.B) {
	h := newHub(b)
	parent, child, err := Pair()
	if err != nil {
		b.Fatal(err)
	}
	defer child.Close()
	got := make(chan struct{}, 1)
	if _, err := h.Open(parent, Handlers{OnMessage: func(json.RawMessage) { got <- struct{}{} }}); err != nil {
		b.Fatal(err)
	}
	line := []byte("{\"type\":\"metric\",\"value\":1}\n")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := child.Write(line); err != nil {
			b.Fatal(err)
		}
		<-got
	}
}

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		msg  string
		want error
	}{
		{`{"cmd":"x"}`, nil}, {`"NODE_X"`, nil}, {`{"a":{"cmd":"NODE_X"}}`, nil},
		{`{"cmd":"NODE_X"}`, ErrMalformed}, {`{"\u0063md":"\u004eODE_X"}`, ErrMalformed}, {`{"cmd":1,"cmd":"NODE_X"}`, ErrMalformed},
		{`{`, ErrMalformed}, {``, ErrMalformed}, {`1 2`, ErrMalformed}, {strings.Repeat("[", 600) + strings.Repeat("]", 600), ErrMalformed},
		{`"` + strings.Repeat("x", MaxLine) + `"`, ErrTooLong},
	} {
		if err := Check([]byte(c.msg)); !errors.Is(err, c.want) {
			t.Errorf("Check(%.40q) = %v, want %v", c.msg, err, c.want)
		}
	}
}
