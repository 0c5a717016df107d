package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/remuda-dev/remuda/internal/config"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	patience = config.Duration(30 * time.Second)
	soon     = config.Duration(10 * time.Millisecond)
	// short is for probes that never become ready.
	short = config.Duration(300 * time.Millisecond)
)

// wantNotReady checks the error of a probe whose timeout passed.
func wantNotReady(t *testing.T, err error, parts ...string) {
	t.Helper()
	var nr *NotReadyError
	if !errors.As(err, &nr) {
		t.Fatalf("error %v, want a NotReadyError", err)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q does not say %q", err, part)
		}
	}
}

// once makes one attempt, with all the time it needs, and returns its failure.
func once(t *testing.T, p config.Probe, env Env) error {
	t.Helper()
	try, done, err := attempt(p, env)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(patience))
	defer cancel()
	return try(ctx)
}

// wantFailure checks the failure of one attempt.
func wantFailure(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no failure, want %q", parts)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("failure %q does not say %q", err, part)
		}
	}
}

// freePort returns an address that nothing listens on.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	return l.Addr().String()
}

func TestTCP(t *testing.T) {
	addr := freePort(t)
	p := config.Probe{Type: "tcp", Address: addr, Interval: soon, Timeout: short}
	err := Wait(t.Context(), p, Env{})
	wantNotReady(t, err, "not ready after 300ms: tcp "+addr+": connection refused")

	p.Timeout = patience
	done := make(chan error, 1)
	go func() { done <- Wait(t.Context(), p, Env{}) }()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}

	for addr, want := range map[string]string{"127.0.0.1:99999": "invalid port", "127.0.0.1": "missing port"} {
		err := once(t, config.Probe{Type: "tcp", Address: addr}, Env{})
		wantFailure(t, err, "tcp "+addr+": ", want)
	}
}

func TestHTTP(t *testing.T) {
	var calls, elsewhere atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	defer other.Close()
	stream := make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/slowstart", func(w http.ResponseWriter, _ *http.Request) {
		if calls.Add(1) < 3 {
			http.Error(w, "warming\nup\x1b[31m", http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("/down", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, "no\ndatabase\x1b[31m "+strings.Repeat("x", 1<<20))
	})
	mux.HandleFunc("/here", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/down", http.StatusFound) })
	mux.HandleFunc("/circle", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/circle", http.StatusFound) })
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL, http.StatusFound) })
	mux.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		select {
		case <-stream:
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/header", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) })
	srv := httptest.NewServer(mux)
	defer srv.Close()
	defer close(stream)
	secure := httptest.NewTLSServer(mux)
	secure.Config.ErrorLog = nil
	defer secure.Close()

	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	probe := func(url string, timeout config.Duration) error {
		return Wait(t.Context(), config.Probe{Type: "http", URL: url, Interval: soon, Timeout: timeout}, Env{})
	}
	failure := func(url string) error { return once(t, config.Probe{Type: "http", URL: url}, Env{}) }
	for _, path := range []string{"/slowstart", "/away", "/circle", "/stream"} {
		if err := probe(srv.URL+path, patience); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	if n := calls.Load(); n != 3 {
		t.Errorf("%d calls of /slowstart, want 3", n)
	}
	if elsewhere.Load() != 0 {
		t.Error("a redirect to another host was followed")
	}
	if err := probe(secure.URL+"/away", patience); err != nil {
		t.Errorf("https: %v", err)
	}
	wantFailure(t, failure(srv.URL+"/down"), "http "+srv.URL+"/down: 500 Internal Server Error: no; database[31m xxx")
	if err := failure(srv.URL + "/down"); len(err.Error()) > 600 {
		t.Errorf("error of %d bytes", len(err.Error()))
	}
	wantFailure(t, failure(srv.URL+"/here"), "500")
	wantFailure(t, failure(srv.URL+"/header"), "header")
	gone := freePort(t)
	wantFailure(t, failure("http://u:secret@"+gone+"/"), "http http://u:xxxxx@"+gone+"/: connection refused")
	for _, bad := range []string{"", "::", "ftp://x/", "http://"} {
		if err := probe(bad, patience); !errors.Is(err, ErrUnusable) {
			t.Errorf("URL %q: %v, want ErrUnusable", bad, err)
		}
	}
}

// A server that takes the connection and says nothing.
func TestSilentServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	begun := time.Now()
	err = Wait(t.Context(), config.Probe{Type: "http", URL: "http://" + l.Addr().String(), Interval: soon, Timeout: 2 * short}, Env{})
	wantNotReady(t, err, "no answer within")
	if d := time.Since(begun); d < time.Duration(2*short) {
		t.Errorf("gave up after %s", d)
	}
}

func execProbe(t *testing.T, timeout config.Duration, env Env, command ...string) error {
	t.Helper()
	return Wait(t.Context(), config.Probe{Type: "exec", Command: command, Interval: soon, Timeout: timeout}, env)
}

func TestExec(t *testing.T) {
	dir := t.TempDir()
	env := Env{Dir: dir, Environ: []string{"PATH=bin:/usr/bin:/bin", "WHO=me"}}
	// in the program's folder, with its environment and nothing else
	t.Setenv("REMUDA_TEST_OURS", "1")
	script := `[ "$WHO" = me ] && [ -z "$REMUDA_TEST_OURS" ] && [ "$(pwd -P)" = "$1" ] || { env; pwd; exit 5; }`
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := execProbe(t, patience, env, "sh", "-c", script, "sh", real); err != nil {
		t.Error(err)
	}
	// ready at the third attempt; found by the program's PATH
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	check := "#!/bin/sh\necho x >> n\n[ $(wc -l < n) -ge 3 ]\n"
	if err := os.WriteFile(filepath.Join(dir, "bin/check"), []byte(check), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := execProbe(t, patience, env, "check"); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "n")); string(b) != "x\nx\nx\n" {
		t.Errorf("attempts: %q, want 3", b)
	}

	failure := func(env Env, command ...string) error {
		return once(t, config.Probe{Type: "exec", Command: command}, env)
	}
	wantFailure(t, failure(env, "sh", "-c", "echo database is down; echo $0 >&2; exit 3"), "exec sh: exit status 3: database is down; sh")
	wantFailure(t, failure(env, "sh", "-c", "kill -9 $$"), "exec sh: signal: killed")
	wantFailure(t, failure(env, "no-such-command"), "exec no-such-command: not found in PATH (bin:/usr/bin:/bin)")
	wantFailure(t, failure(env, "./no-such-file"), "cannot be started: no such file or directory")
	wantFailure(t, failure(Env{Dir: dir + "/none", Environ: env.Environ}, "true"), "cannot be started: no such file or directory")
	err = failure(env, "sh", "-c", "head -c 10000000 /dev/zero | tr '\\0' y; echo; echo end; exit 1")
	wantFailure(t, err, "exit status 1: …y", "y; end")
	if len(err.Error()) > 2*maxOutput {
		t.Errorf("error of %d bytes", len(err.Error()))
	}
}

func TestExecCredential(t *testing.T) {
	if os.Geteuid() != 0 {
		// An ordinary user may not take another's identity: said, not hidden.
		err := once(t, config.Probe{Type: "exec", Command: []string{"true"}}, Env{Credential: &syscall.Credential{Uid: 0}})
		wantFailure(t, err, "operation not permitted")
		return
	}
	env := Env{Dir: "/", Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if err := execProbe(t, patience, env, "sh", "-c", `[ "$(id -u):$(id -g):$(id -G)" = 65534:65534:65534 ]`); err != nil {
		t.Error(err)
	}
}

// Whatever a command leaves in its process group ends with it, at its end and
// at its timeout.
func TestExecLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		script string
		ready  bool
	}{
		{"sleep 1000 & echo $! > pid; exit 0", true},
		{"trap '' TERM; sleep 1000 & echo $! > pid.new; mv pid.new pid; wait", false},
	} {
		file := filepath.Join(dir, "pid")
		os.Remove(file)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- tryExec(ctx, []string{"sh", "-c", c.script}, Env{Dir: dir, Environ: os.Environ()})
		}()
		wait(t, "the pid", func() bool { b, _ := os.ReadFile(file); return strings.HasSuffix(string(b), "\n") })
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		if !c.ready {
			if !alive(pid) {
				t.Error("ended before the timeout")
			}
			cancel()
			wantFailure(t, <-done, "exec sh: did not end within ")
		} else if err := <-done; err != nil {
			t.Error(err)
		}
		cancel()
		wait(t, "its end", func() bool { return !alive(pid) })
	}
}

func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Duration(patience))
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("did not come: " + what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// alive: a zombie that nobody reaps (the test is no init) is not.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

func TestExecCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	dir := t.TempDir()
	done := make(chan error, 1)
	go func() {
		done <- Wait(ctx, config.Probe{Type: "exec", Command: []string{"sh", "-c", "touch up; sleep 1000"},
			Interval: config.Duration(time.Hour)}, Env{Dir: dir, Environ: os.Environ()})
	}()
	wait(t, "the start", func() bool { _, err := os.Stat(filepath.Join(dir, "up")); return err == nil })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want Canceled", err)
	}
}

func TestLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tap func(string)
		cancelled := 0
		env := Env{Lines: func(f func(string)) func() { tap = f; return func() { cancelled++ } }}
		p := config.Probe{Type: "log", Pattern: `^listening on \d+$`, Timeout: config.Duration(time.Minute)}
		done := make(chan error, 1)
		go func() { done <- Wait(t.Context(), p, env) }()
		synctest.Wait()
		tap("starting")
		tap("not listening on 3000")
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatal("ready too early", err)
		default:
		}
		tap("listening on 3000\n")
		tap("listening on 3001")
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		tap("listening on 3002")
		if cancelled != 1 {
			t.Errorf("cancel called %d times", cancelled)
		}

		wantNotReady(t, Wait(t.Context(), p, env), "not ready after 1m0s: log: no line matched")
		p.Pattern = "("
		if err := Wait(t.Context(), p, env); !errors.Is(err, ErrUnusable) {
			t.Errorf("bad pattern: %v", err)
		}
	})
}

func TestIPCAndNotify(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, typ := range []string{"ipc", "notify"} {
			ready := make(chan struct{})
			env := Env{IPCReady: ready, NotifyReady: ready}
			p := config.Probe{Type: typ, Timeout: config.Duration(3 * time.Second)}
			wantNotReady(t, Wait(t.Context(), p, env), "not ready after 3s: "+typ+": no ")
			time.AfterFunc(2*time.Second, func() { close(ready) })
			if err := Wait(t.Context(), p, env); err != nil {
				t.Error(err)
			}
			if err := Wait(t.Context(), p, Env{}); !errors.Is(err, ErrUnusable) {
				t.Errorf("%s without a source: %v", typ, err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			p.Timeout = 0
			if err := Wait(ctx, p, Env{IPCReady: make(chan struct{}), NotifyReady: make(chan struct{})}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("context's end: %v", err)
			}
			cancel()
		}
	})
}

func TestNoneAndUnusable(t *testing.T) {
	for _, typ := range []string{"", "none"} {
		if err := Wait(t.Context(), config.Probe{Type: typ}, Env{}); err != nil {
			t.Error(err)
		}
	}
	for _, typ := range []string{"tcp", "http", "exec", "log", "smoke signals"} {
		if err := Wait(t.Context(), config.Probe{Type: typ, Timeout: patience}, Env{}); !errors.Is(err, ErrUnusable) {
			t.Errorf("%s: %v, want ErrUnusable", typ, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Wait(ctx, config.Probe{}, Env{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before: %v", err)
	}
}

func TestIntervalAndLastFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		begun := time.Now()
		try := func(ctx context.Context) error {
			n++
			if n == 5 { // hangs, as a server that stopped answering
				<-ctx.Done()
			}
			return fmt.Errorf("failure %d", n)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 9*time.Second)
		defer cancel()
		late := func(n int, last string) error {
			return &NotReadyError{After: time.Since(begun), Attempts: n, Last: last}
		}
		err := poll(ctx, 2*time.Second, try, late)
		var nr *NotReadyError
		// attempts at 0 and about 2, 4, 6, 8; the fifth is cut short by the end
		if !errors.As(err, &nr) || nr.Attempts != 5 || nr.After != 9*time.Second || nr.Last != "failure 4" {
			t.Errorf("%+v", err)
		}
	})
}

func sendNotify(t *testing.T, path, text string, oob []byte) error {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	return unix.Sendmsg(fd, []byte(text), oob, &unix.SockaddrUnix{Name: path}, 0)
}

func TestNotifySocket(t *testing.T) {
	for name, path := range map[string]string{
		"file":     filepath.Join(t.TempDir(), "notify"),
		"abstract": "@remuda-test-" + strconv.Itoa(os.Getpid()),
	} {
		t.Run(name, func(t *testing.T) {
			got := make(chan Message, 100)
			n, err := Listen(NotifyOptions{Path: path, OnMessage: func(m Message) { got <- m }})
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			for _, text := range []string{"junk", "", "\n", strings.Repeat("A=1\n", maxFields+1), "A=" + strings.Repeat("x", maxNotify)} {
				if err := sendNotify(t, path, text, nil); err != nil {
					t.Fatal(err)
				}
			}
			// a descriptor that rides along is closed
			if err := sendNotify(t, path, "READY=1\nSTATUS=a=b\xff\nMAINPID=7\n", unix.UnixRights(int(w.Fd()))); err != nil {
				t.Fatal(err)
			}
			w.Close()
			m := <-got
			if m.PID != os.Getpid() || int(m.UID) != os.Getuid() || int(m.GID) != os.Getgid() {
				t.Errorf("sender %+v, want this process", m)
			}
			if f := m.Fields; len(f) != 3 || f["READY"] != "1" || f["STATUS"] != "a=b�" || f["MAINPID"] != "7" {
				t.Errorf("fields %q", f)
			}
			if _, err := r.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("descriptor that came along: %v, want it closed", err)
			}
			if len(got) > 0 {
				t.Errorf("message %+v of junk", <-got)
			}
			// a real program of another process
			if err := execProbe(t, patience, Env{Environ: append(os.Environ(), "NOTIFY_SOCKET="+path)}, "python3", "-c", `
import os, socket
p = os.environ["NOTIFY_SOCKET"]
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.sendto(("READY=1\nSTATUS=%d" % os.getpid()).encode(), "\0" + p[1:] if p[0] == "@" else p)`); err != nil {
				t.Fatal(err)
			}
			m = <-got
			if m.Fields["STATUS"] != strconv.Itoa(m.PID) || m.PID == os.Getpid() {
				t.Errorf("message %+v: the sender's pid is not its own", m)
			}
			n.Close()
			n.Close()
			if err := sendNotify(t, path, "READY=1", nil); err == nil {
				t.Error("the socket is there after Close")
			}
		})
	}
}

func TestNotifySocketMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	for _, c := range []struct{ mode, want os.FileMode }{{0, 0o600}, {0o666, 0o666}} {
		n, err := Listen(NotifyOptions{Path: path, Mode: c.mode})
		if err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != c.want {
			t.Errorf("mode %v, %v, want %v", st.Mode(), err, c.want)
		}
		if c.mode != 0 {
			n.Close()
		} else {
			// left behind by one that was killed: replaced
			defer n.Close()
		}
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := Listen(NotifyOptions{Path: path}); err == nil {
		n.Close()
		t.Error("a file that is no socket was replaced")
	}
	for _, bad := range []string{"", strings.Repeat("x", 108), "a\x00b"} {
		if n, err := Listen(NotifyOptions{Path: bad}); err == nil {
			n.Close()
			t.Errorf("path %q: no error", bad)
		}
	}
}

func FuzzParseNotify(f *testing.F) {
	f.Add([]byte("READY=1\nSTATUS=up\nWATCHDOG=1"))
	f.Add([]byte("=\n"))
	f.Add([]byte("A=\xff\n\nB"))
	f.Fuzz(func(t *testing.T, b []byte) {
		fields, err := ParseNotify(b)
		if err != nil {
			return
		}
		if len(fields) > maxFields {
			t.Fatalf("%d fields", len(fields))
		}
		for k, v := range fields {
			if !isKey(k) || strings.ContainsRune(v, '\n') || strings.ToValidUTF8(v, "") != v {
				t.Fatalf("field %q=%q of %q", k, v, b)
			}
		}
	})
}
