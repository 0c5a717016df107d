package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// TestMain lets the test binary play the keeper that Launch starts.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "keeper" {
		os.Exit(keeper(os.Args[3]))
	}
	goleak.VerifyTestMain(m)
}

// keeper serves info until it is killed, holding the lock a real one holds. It
// notes that it began.
func keeper(home string) int {
	if os.Getenv("TEST_KEEPER") == "fail" {
		fmt.Println("no, not in this folder")
		return 9
	}
	if err := os.WriteFile(filepath.Join(home, "begun-"+strconv.Itoa(os.Getpid())), nil, 0o600); err != nil {
		return 1
	}
	f, err := os.OpenFile(filepath.Join(home, "keeper.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil || unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		fmt.Println("another daemon runs")
		return 8
	}
	time.Sleep(20 * time.Millisecond) // a daemon does not answer at once
	dir, err := os.Open(home)
	if err != nil {
		return 1
	}
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/remuda.sock", dir.Fd()))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	ended := make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/v1/info", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(Info{Version: "test", API: API, PID: os.Getpid(), KeeperPID: os.Getpid()})
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	mux.HandleFunc("/v1/kill", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "{}")
		go func() {
			defer close(ended)
			_ = srv.Shutdown(context.Background())
		}()
	})
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, func() {
		_ = srv.Close()
		os.Exit(0)
	})
	_ = srv.Serve(l)
	<-ended
	return 0
}

func tempHome(t *testing.T) string {
	t.Helper()
	home, err := os.MkdirTemp("", "rm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	return home
}

func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func newClient(t *testing.T, home string) *Client {
	c := New(home)
	t.Cleanup(c.Close)
	return c
}

// serve answers every call on home's socket with h until the test ends.
func serve(t *testing.T, home string, h http.HandlerFunc) {
	t.Helper()
	l, err := net.Listen("unix", SocketPath(home))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
}

func TestLaunchRace(t *testing.T) {
	home := filepath.Join(tempHome(t), "home")
	const callers = 8
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex
		started int
	)
	for range callers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			c := newClient(t, home)
			yes, err := c.Launch(deadline(t), self(t))
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if yes {
				started++
			}
		}()
	}
	wg.Wait()
	begun, _ := filepath.Glob(filepath.Join(home, "begun-*"))
	if started != 1 || len(begun) != 1 {
		t.Errorf("%d callers say they have started a daemon, and %d were", started, len(begun))
	}
	if st, err := os.Stat(home); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", st, err)
	}
	c := newClient(t, home)
	if err := c.Kill(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Info(deadline(t)); !errors.Is(err, ErrUnreachable) {
		t.Errorf("after kill: %v", err)
	}
	if err := c.Kill(deadline(t)); !errors.Is(err, ErrUnreachable) {
		t.Errorf("kill without a daemon: %v", err)
	}
}

func TestLaunchWithALongPathAndAStaleSocket(t *testing.T) {
	home := filepath.Join(tempHome(t), strings.Repeat("long", 30), strings.Repeat("longer", 20))
	c := newClient(t, home)
	if _, err := c.Info(deadline(t)); !errors.Is(err, ErrUnreachable) {
		t.Errorf("without the folder: %v", err)
	}
	if yes, err := c.Launch(deadline(t), self(t)); err != nil || !yes {
		t.Fatal(yes, err)
	}
	if yes, err := c.Launch(deadline(t), self(t)); err != nil || yes {
		t.Error("a second launch: ", yes, err)
	}
	if info, err := c.Info(deadline(t)); err != nil || info.Version != "test" {
		t.Errorf("%+v, %v", info, err)
	}
	if err := c.Kill(deadline(t)); err != nil {
		t.Fatal(err)
	}
}

// TestLaunchBesideALivingKeeper is the moment in which a controller is being
// replaced: nobody answers, but there is a daemon.
func TestLaunchBesideALivingKeeper(t *testing.T) {
	home := tempHome(t)
	if err := os.Chmod(home, 0o700); err != nil {
		t.Fatal(err)
	}
	other := exec.Command(self(t), "keeper", "--home", home)
	first := true
	c := New(home)
	c.http = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		// The other keeper comes to answer only after this launch has begun.
		if pids, _ := filepath.Glob(filepath.Join(home, "begun-*")); len(pids) == 0 && first {
			if _, err := os.Stat(filepath.Join(home, "launch.lock")); err == nil {
				first = false
				if err := other.Start(); err != nil {
					return nil, err
				}
				for {
					if begun, _ := filepath.Glob(filepath.Join(home, "begun-*")); len(begun) > 0 {
						break
					}
					time.Sleep(time.Millisecond)
				}
			}
		}
		var d net.Dialer
		return dialUnix(ctx, &d, SocketPath(home))
	}}}
	yes, err := c.Launch(deadline(t), waiting(t))
	if err != nil || yes {
		t.Errorf("launch: %v, %v", yes, err)
	}
	info, err := c.Info(deadline(t))
	if err != nil || info.PID != other.Process.Pid {
		t.Errorf("%+v, %v", info, err)
	}
	if err := c.Kill(deadline(t)); err != nil {
		t.Error(err)
	}
	if err := other.Wait(); err != nil {
		t.Error(err)
	}
}

// waiting is a keeper that waits for the lock of another for long.
func waiting(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "waiting")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLaunchThatFails(t *testing.T) {
	t.Setenv("TEST_KEEPER", "fail")
	home := filepath.Join(tempHome(t), "home")
	c := newClient(t, home)
	if _, err := c.Launch(deadline(t), self(t)); err == nil || !strings.Contains(err.Error(), "exit status 9") || !strings.Contains(err.Error(), "no, not in this folder") {
		t.Error(err)
	}
	if _, err := c.Launch(deadline(t), "/nonexistent/remuda"); err == nil || !strings.Contains(err.Error(), "cannot start the daemon") {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	unlock, err := lock(deadline(t), filepath.Join(home, "launch.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if _, err := c.Launch(ctx, self(t)); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "launch.lock") {
		t.Error(err)
	}
}

func TestMakeHome(t *testing.T) {
	base := tempHome(t)
	shared := filepath.Join(base, "shared")
	empty := filepath.Join(base, "empty")
	file := filepath.Join(base, "file")
	for _, dir := range []string{shared, empty} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{filepath.Join(shared, "theirs"), file} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := MakeHome(shared); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a folder that others use: %v", err)
	}
	if st, _ := os.Stat(shared); st.Mode().Perm() != 0o755 {
		t.Error("it was closed to others")
	}
	if err := MakeHome(empty); err != nil {
		t.Error(err)
	}
	if st, _ := os.Stat(empty); st.Mode().Perm() != 0o700 {
		t.Errorf("mode %v", st.Mode())
	}
	if err := MakeHome(file); err == nil {
		t.Error("a file is taken for a folder")
	}
	if os.Geteuid() == 0 {
		theirs := filepath.Join(base, "theirs")
		if err := errors.Join(os.Mkdir(theirs, 0o700), os.Chown(theirs, 12345, 12345)); err != nil {
			t.Fatal(err)
		}
		if err := MakeHome(theirs); err == nil || !strings.Contains(err.Error(), "belongs to user 12345") {
			t.Error(err)
		}
	}
}

func TestErrors(t *testing.T) {
	home := tempHome(t)
	c := newClient(t, home)
	var mu sync.Mutex
	var headers []string
	serve(t, home, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		headers = append(headers, r.URL.Path+" "+r.Header.Get(HeaderAPI))
		mu.Unlock()
		target := r.URL.Query().Get("target")
		switch target {
		case "nosuch":
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"title":"Not Found","detail":"no app is called nosuch"}`)
		case "invalid":
			w.WriteHeader(http.StatusUnprocessableEntity)
			fmt.Fprint(w, `{"title":"Unprocessable","detail":"validation failed","errors":[{"message":"expected number","location":"body.instances"},{"message":"too long"}]}`)
		case "title":
			w.WriteHeader(http.StatusConflict)
			fmt.Fprint(w, `{"title":"Conflict"}`)
		case "html":
			w.WriteHeader(http.StatusBadGateway)
			fmt.Fprint(w, "<html>"+strings.Repeat("x", 100_000))
		case "broken":
			fmt.Fprint(w, `{"instances":[{"id":"x"}]}`)
		case "cut":
			w.Header().Set("Content-Length", "1000")
			fmt.Fprint(w, `{"instances":[`)
		case "hang":
			<-r.Context().Done()
		default:
			if r.URL.Path == "/v1/info" {
				fmt.Fprint(w, `{"version":"1"}`)
				return
			}
			_ = json.NewEncoder(w).Encode(map[string]any{"instances": []Instance{{ID: 1, App: target}}})
		}
	})
	list := func(target string) error { _, err := c.List(deadline(t), target); return err }
	var refused *Error
	if err := list("nosuch"); !errors.Is(err, ErrNoTarget) || !errors.As(err, &refused) || refused.Status != 404 || err.Error() != "no app is called nosuch" {
		t.Error(err)
	}
	if err := list("invalid"); err == nil || err.Error() != "validation failed: body.instances: expected number; too long" || errors.Is(err, ErrNoTarget) {
		t.Error(err)
	}
	if err := list("title"); err == nil || err.Error() != "Conflict" {
		t.Error(err)
	}
	if err := list("html"); err == nil || len(err.Error()) > 300 || !strings.Contains(err.Error(), "502") {
		t.Error(err)
	}
	for _, target := range []string{"broken", "cut"} {
		if err := list(target); err == nil || errors.Is(err, ErrUnreachable) {
			t.Errorf("%s: %v", target, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := c.List(ctx, "hang"); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	for _, odd := range []string{"a b&c=d", "ü", "/^x+$/", strings.Repeat("n", 10_000)} {
		got, err := c.List(deadline(t), odd)
		if err != nil || len(got) != 1 || got[0].App != odd {
			t.Errorf("%.30q: %v, %v", odd, got, err)
		}
	}
	if _, err := c.Info(deadline(t)); err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if !slices.Contains(headers, "/v1/instances 1") || !slices.Contains(headers, "/v1/info ") {
		t.Errorf("%q", headers)
	}
}

func TestUnreachable(t *testing.T) {
	home := tempHome(t)
	c := newClient(t, home)
	want := func(what string) {
		t.Helper()
		if _, err := c.Info(deadline(t)); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), home) {
			t.Errorf("%s: %v", what, err)
		}
	}
	want("no socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: SocketPath(home), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	want("stale socket")
	if err := os.Remove(SocketPath(home)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(SocketPath(home), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want("a file in its place")
	if os.Geteuid() != 0 { // root may everything
		if err := os.Chmod(home, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Info(deadline(t)); !errors.Is(err, os.ErrPermission) || !errors.Is(err, ErrUnreachable) {
			t.Error(err)
		}
		if err := os.Chmod(home, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	denied := c.explain(t.Context(), &net.OpError{Op: "dial", Net: "unix", Err: syscall.EACCES})
	if !errors.Is(denied, os.ErrPermission) || !errors.Is(denied, ErrUnreachable) {
		t.Error(denied)
	}
	full := c.explain(t.Context(), &net.OpError{Op: "dial", Net: "unix", Err: syscall.EMFILE})
	if errors.Is(full, ErrUnreachable) || !errors.Is(full, syscall.EMFILE) {
		t.Error(full)
	}
}

// TestFullQueue has more callers than the socket's queue holds, and nobody who
// accepts yet.
func TestFullQueue(t *testing.T) {
	home := tempHome(t)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: SocketPath(home)}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "listener")
	l, err := net.FileListener(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	const callers = 5
	errs := make(chan error, callers)
	for range callers {
		go func() {
			c := New(home)
			defer c.Close()
			_, err := c.Info(deadline(t))
			errs <- err
		}()
	}
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") })}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	for range callers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	_ = srv.Close()
	<-done
}

func TestStreams(t *testing.T) {
	home := tempHome(t)
	c := newClient(t, home)
	gone := make(chan struct{}, 10)
	serve(t, home, func(w http.ResponseWriter, r *http.Request) {
		send := func(s string) {
			fmt.Fprint(w, s)
			w.(http.Flusher).Flush()
		}
		send(`{"value":{"seq":1,"text":"one"}}` + "\n")
		switch r.URL.Query().Get("target") {
		case "whole":
			send(`{"value":{"seq":2,"text":"two"}}`)
		case "word":
			send(`{"error":"the disk broke"}` + "\n")
		case "cut":
			send(`{"value":{"seq":2,`)
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			conn.Close()
		case "nonsense":
			send("oh no\n")
		case "follow":
			<-r.Context().Done()
			gone <- struct{}{}
		}
	})
	read := func(ctx context.Context, target string) (got []uint64, err error) {
		for e, err := range c.Events(ctx, 0, true, target) {
			if err != nil {
				return got, err
			}
			got = append(got, e.Seq)
		}
		return got, nil
	}
	if got, err := read(deadline(t), "whole"); err != nil || len(got) != 2 {
		t.Error(got, err)
	}
	var refused *Error
	if got, err := read(deadline(t), "word"); !errors.As(err, &refused) || err.Error() != "the disk broke" || len(got) != 1 {
		t.Error(got, err)
	}
	if got, err := read(deadline(t), "cut"); err == nil || !strings.Contains(err.Error(), "hung up") || len(got) != 1 {
		t.Error(got, err)
	}
	if got, err := read(deadline(t), "nonsense"); err == nil || !strings.Contains(err.Error(), "broken line") || len(got) != 1 {
		t.Error(got, err)
	}
	// The caller who leaves, and the one whose time is over.
	for _, err := range c.Events(deadline(t), 0, true, "follow") {
		if err != nil {
			t.Error(err)
		}
		break
	}
	<-gone
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, err := range c.Events(ctx, 0, true, "follow") {
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		cancel()
	}
	<-gone
}

func TestUpgradeWaitsForTheNewController(t *testing.T) {
	home := tempHome(t)
	c := newClient(t, home)
	var mu sync.Mutex
	pid, asked := 10, 0
	serve(t, home, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if r.URL.Path == "/v1/upgrade" {
			pid = 11
			w.WriteHeader(http.StatusNoContent)
			return
		}
		asked++
		now := 10
		if asked > 3 {
			now = pid
		}
		fmt.Fprintf(w, `{"pid":%d}`, now)
	})
	info, err := c.Upgrade(deadline(t), "/bin/true")
	if err != nil || info.PID != 11 {
		t.Errorf("%+v, %v", info, err)
	}
}

// TestKillWithoutAnAnswer has the daemon end before its answer is out.
func TestKillWithoutAnAnswer(t *testing.T) {
	home := tempHome(t)
	c := newClient(t, home)
	keeper := exec.Command("sleep", "1000")
	if err := keeper.Start(); err != nil {
		t.Fatal(err)
	}
	serve(t, home, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/info" {
			fmt.Fprintf(w, `{"keeper_pid":%d}`, keeper.Process.Pid)
			return
		}
		_ = keeper.Process.Kill()
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		conn.Close()
	})
	if err := c.Kill(deadline(t)); err != nil {
		t.Error(err)
	}
	_ = keeper.Wait()
}

func TestHome(t *testing.T) {
	t.Setenv("REMUDA_HOME", "relative")
	h, err := Home()
	if err != nil || !filepath.IsAbs(h) {
		t.Error(h, err)
	}
	t.Setenv("REMUDA_HOME", "")
	t.Setenv("HOME", "/home/someone")
	if h, err := Home(); err != nil || h != "/home/someone/.remuda" {
		t.Error(h, err)
	}
	t.Setenv("HOME", "")
	if _, err := Home(); err == nil || !strings.Contains(err.Error(), "REMUDA_HOME") {
		t.Error(err)
	}
}

// A question that the controller was killed over is asked again of the next
// one; an order is not, as nobody knows how far it came.
func TestControllerDiesOverACall(t *testing.T) {
	home := tempHome(t)
	f, err := os.OpenFile(filepath.Join(home, "keeper.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	var calls atomic.Int32
	serve(t, home, func(w http.ResponseWriter, _ *http.Request) {
		if calls.Add(1)%2 == 1 {
			panic(http.ErrAbortHandler)
		}
		fmt.Fprint(w, "{}")
	})
	c := newClient(t, home)
	if _, err := c.List(deadline(t)); err != nil || calls.Load() != 2 {
		t.Errorf("list: %v after %d calls", err, calls.Load())
	}
	if _, err := c.Act(deadline(t), ActRequest{Verb: VerbRestart, Targets: []string{"web"}}); err == nil || calls.Load() != 3 {
		t.Errorf("restart: %v after %d calls", err, calls.Load())
	}
	// Without a keeper there is nobody to wait for.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	calls.Store(0)
	if _, err := c.List(deadline(t)); err == nil || calls.Load() != 1 {
		t.Errorf("list without a keeper: %v after %d calls", err, calls.Load())
	}
}
