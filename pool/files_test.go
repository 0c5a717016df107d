package pool

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/test/leak"
)

const pythonFiles = `
import os, socket, sys
sys.path.insert(0, 'SDK')
import remuda_worker
def hello(t):
    t.files[0].sendall(b'hello'); return str(len(t.files)).encode()
def accept(t):
    c, _ = t.files[0].accept(); c.sendall(b'hello'); c.close()
def udp(t):
    b, who = t.files[0].recvfrom(100); t.files[0].sendto(b, who)
def count(t): return str(len(os.listdir('/proc/self/fd'))).encode()
def write(t):
    for f in t.files: f.write(t.body)
def give(t):
    r, w = os.pipe(); os.write(w, t.body); os.close(w); t.attach(r)
    a, b = socket.socketpair(); a.sendall(t.body); a.close(); t.attach(b)
def back(t): t.attach(*t.files)
def many(t): t.attach(*[os.dup(0) for _ in range(17)])
def once(t):
    try: os.close(os.open(t.body, os.O_CREAT|os.O_EXCL))
    except FileExistsError: return write2(t)
    os._exit(1)
def write2(t): t.files[0].write(b'again')
remuda_worker.serve({k: v for k, v in globals().items() if callable(v)})
`

// Files of all kinds go to a worker and come back, and none is left anywhere.
func TestFiles(t *testing.T) {
	for _, c := range []struct {
		name    string
		command []string
	}{
		{"go", nil},
		{"python", []string{"python3", write(t, "w.py", strings.ReplaceAll(pythonFiles, "SDK", sdkPath(t, "python")))}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPool(t, Options{Command: c.command, Size: 1, Grace: 30 * time.Second})
			ctx := limit(t)
			do := func(task Task) Result {
				t.Helper()
				r, err := p.Do(ctx, task)
				if err != nil {
					t.Fatalf("%s: %v", task.Name, err)
				}
				return r
			}
			theirs := string(do(Task{Name: "count"}).Body)
			ours := leak.Descriptors(t)

			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			client, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			server, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			f, err := server.(*net.TCPConn).File()
			if err != nil {
				t.Fatal(err)
			}
			server.Close()
			lf, err := l.(*net.TCPListener).File()
			if err != nil {
				t.Fatal(err)
			}
			if r := do(Task{Name: "hello", Files: []*os.File{f, lf}}); string(r.Body) != "2" {
				t.Errorf("%s files came", r.Body)
			}
			f.Close()
			hear := func(c net.Conn) {
				t.Helper()
				// To the end: nobody else has the connection any more.
				if b, err := io.ReadAll(c); string(b) != "hello" || err != nil {
					t.Errorf("heard %q, %v", b, err)
				}
				c.Close()
			}
			hear(client)

			if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
				t.Fatal(err)
			}
			do(Task{Name: "accept", Files: []*os.File{lf}})
			hear(client)
			lf.Close()
			l.Close()

			u, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				t.Fatal(err)
			}
			uf, err := u.File()
			if err != nil {
				t.Fatal(err)
			}
			if client, err = net.Dial("udp", u.LocalAddr().String()); err != nil {
				t.Fatal(err)
			}
			if _, err := client.Write([]byte("ping")); err != nil {
				t.Fatal(err)
			}
			do(Task{Name: "udp", Files: []*os.File{uf}})
			b := make([]byte, 10)
			if n, err := client.Read(b); string(b[:n]) != "ping" || err != nil {
				t.Errorf("UDP: %q, %v", b[:n], err)
			}
			client.Close()
			uf.Close()
			_ = u.Close()

			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			sixteen := make([]*os.File, ipc.MaxFiles)
			for i := range sixteen {
				sixteen[i] = w
			}
			do(Task{Name: "write", Body: []byte("x"), Files: sixteen})
			if _, err := p.Do(ctx, Task{Name: "write", Files: append(sixteen, w)}); !errors.Is(err, ipc.ErrTooLarge) {
				t.Errorf("17 files: %v", err)
			}
			if _, err := p.Do(ctx, Task{Name: "fail", Files: sixteen}); err == nil {
				t.Error("a task that must fail has not")
			}
			// Tried again after a worker took the files with it.
			do(Task{Name: "once", Body: []byte(t.TempDir() + "/x"), Files: []*os.File{w}, Idempotent: true})
			w.Close()
			if b, err := io.ReadAll(r); string(b) != strings.Repeat("x", 16)+"again" || err != nil {
				t.Errorf("the pipe says %q, %v", b, err)
			}

			got := do(Task{Name: "give", Body: []byte("gift")})
			if len(got.Files) != 2 {
				t.Fatalf("%d files came back", len(got.Files))
			}
			for _, f := range got.Files {
				if b, err := io.ReadAll(f); string(b) != "gift" || err != nil {
					t.Errorf("the file that came back says %q, %v", b, err)
				}
				f.Close()
			}
			got = do(Task{Name: "back", Files: []*os.File{r}})
			if len(got.Files) != 1 {
				t.Fatalf("%d files came back", len(got.Files))
			}
			got.Files[0].Close()
			r.Close()
			var te *TaskError
			if _, err := p.Do(ctx, Task{Name: "many"}); !errors.As(err, &te) || te.Code != "files" {
				t.Errorf("a result with 17 files: %v", err)
			}
			leak.Settled(t, ours)
			// A worker closes what a handler had when it has sent the answer.
			n := string(do(Task{Name: "count"}).Body)
			for end := time.Now().Add(20 * time.Second); n != theirs && time.Now().Before(end); n = string(do(Task{Name: "count"}).Body) {
				time.Sleep(time.Millisecond)
			}
			if n != theirs {
				t.Errorf("the worker has %s descriptors, and had %s", n, theirs)
			}
			if s := p.Stats(); s.Died != 1 { // by "once"
				t.Errorf("%d workers died", s.Died)
			}
		})
	}
}

// A worker that knows nothing of files gets none.
func TestNoFiles(t *testing.T) {
	for _, o := range []Options{
		{Command: []string{"python3", write(t, "w.py", smallest(t))}, Size: 1},
		{Command: []string{"cat"}, Protocol: JSONLines, Size: 1},
		{Command: []string{"cat"}, Protocol: Exec, Size: 1},
	} {
		p := newPool(t, o)
		if _, err := p.Do(limit(t), Task{Body: []byte("1"), Files: []*os.File{os.Stdin}}); !errors.Is(err, ipc.ErrNoFiles) {
			t.Errorf("%s: %v", o.Protocol, err)
		}
		if r, err := p.Do(limit(t), Task{Body: []byte("1")}); err != nil || string(bytes.TrimSpace(r.Body)) != "1" {
			t.Errorf("%s: %q, %v", o.Protocol, r.Body, err)
		}
	}
}

// hostile is a worker in Python that answers each task by what the task says.
const hostile = `
import array, json, os, socket, struct, time
s = socket.socket(fileno=int(os.environ["REMUDA_FRAMES_FD"]))
f = s.makefile("rb")
def frame(type, id, b=b""): return struct.pack("<IBxxxI", len(b), type, id) + b
def pack(*fds): return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
def send(b, *fds): s.sendmsg([b], pack(*fds) if fds else [])
EXTRA
s.sendall(frame(1, 0, json.dumps({"remuda": 1, "files": True, "shm": 65536}).encode()))
while len(head := f.read(12)) == 12:
    size, type, id = struct.unpack("<IBxxxI", head)
    body = f.read(size)
    if type == 2:
        exec(body[6 + struct.unpack_from("<H", body, 4)[0]:])
    elif type == 9: s.sendall(frame(10, id, body))
    elif type == 10: break
`

// What a hostile worker sends costs it its life and the pool nothing.
func testHostile(t *testing.T, extra string, cases map[string]string) {
	t.Helper()
	// Two, so that one is seen to live on.
	p := newPool(t, Options{Command: []string{"python3", write(t, "w.py", strings.ReplaceAll(hostile, "EXTRA", extra))}, Size: 2, Grace: 10 * time.Second})
	ctx := limit(t)
	for range 2 {
		if _, err := p.Do(ctx, Task{Body: []byte(`time.sleep(0.1); send(frame(3, id))`)}); err != nil {
			t.Fatal(err)
		}
	}
	before := leak.Descriptors(t)
	for name, code := range cases {
		died := p.Stats().Died
		_, err := p.Do(ctx, Task{Body: []byte(code)})
		var we *WorkerError
		if !errors.As(err, &we) || !strings.Contains(we.Cause, "protocol violation") && !strings.Contains(we.Cause, "too large") {
			t.Errorf("%s: %v", name, err)
		}
		if r, err := p.Do(ctx, Task{Body: []byte(`send(frame(3, id, b"fine"))`)}); err != nil || string(r.Body) != "fine" {
			t.Errorf("after %s: %q, %v", name, r.Body, err)
		}
		if n := p.Stats().Died; n != died+1 {
			t.Errorf("%s: %d workers died", name, n-died)
		}
	}
	for p.Stats().Up < 2 {
		time.Sleep(time.Millisecond)
	}
	leak.Settled(t, before)
}

func TestHostileFiles(t *testing.T) {
	testHostile(t, "", map[string]string{
		"no announcement": `send(frame(3, id), 0)`,
		"wrong kind":      `send(frame(11, id, b"\x02") + frame(3, id), 0)`,
		"far too many":    `send(frame(11, id, b"\x01"), *[0] * 253)`,
	})
}
