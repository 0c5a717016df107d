package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
	"github.com/remuda-dev/remuda/proc"
)

// The test binary is also the keeper, its controller and the programs under
// it. The controller is a relay: it hands its socket to the test, so that the
// test is the controller, and lives until it is killed.
const (
	modeVar  = "KEEPER_TEST_MODE"
	relayVar = "KEEPER_TEST_SOCKET"
	tagVar   = "KEEPER_TEST_TAG"
)

func TestMain(m *testing.M) {
	switch mode := os.Getenv(modeVar); {
	case mode == "":
		goleak.VerifyTestMain(m)
	case mode == "unprivileged":
		os.Exit(m.Run())
	case mode == "keeper":
		keeperMain()
	case mode == "relay":
		relayMain()
	case strings.HasPrefix(mode, "family"):
		family(mode)
	default:
		fmt.Fprintln(os.Stderr, "unknown mode", mode)
		os.Exit(2)
	}
}

func keeperMain() {
	env := []string{modeVar + "=relay"}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, modeVar+"=") {
			env = append(env, e)
		}
	}
	exe, err := os.Executable()
	if err == nil {
		err = Run(context.Background(), Options{
			Controller: Command{Path: exe, Env: env},
			Tag:        os.Getenv(tagVar),
			Log:        os.Stderr,
			Hello:      3 * time.Second,
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "keeper:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// relayMain passes descriptor 3 on, together with its pid and its arguments,
// and exits when the test says so, with the code it gets, or when it is
// signalled: it then reports the signal.
func relayMain() {
	if os.Getenv("NOTIFY_SOCKET") != "" || os.Getenv(EnvFD) != "3" {
		os.Exit(90)
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGHUP, unix.SIGINT)
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Connect(s, &unix.SockaddrUnix{Name: os.Getenv(relayVar)})
	}
	if err == nil {
		err = unix.Sendmsg(s, []byte(fmt.Sprintf("%d %s\n", os.Getpid(), strings.Join(os.Args[1:], " "))), unix.UnixRights(3), nil, 0)
	}
	if err != nil {
		os.Exit(91)
	}
	_ = unix.Close(3)
	go func() {
		for sig := range signals {
			_, _ = unix.Write(s, []byte(sig.String()+"\n"))
		}
	}()
	var b [1]byte
	for {
		n, err := unix.Read(s, b[:])
		if err == unix.EINTR {
			continue
		}
		if n != 1 { // the test let go of it
			os.Exit(0)
		}
		os.Exit(int(b[0]))
	}
}

// family is a program that ignores SIGTERM and leaves grandchildren that do
// the same, in sessions of their own, their parents gone. Each lasting member
// writes its pid to descriptor 3.
func family(mode string) {
	signal.Ignore(syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT)
	pipe := os.NewFile(3, "pipe")
	child := func(mode string) {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), modeVar+"="+mode)
		cmd.ExtraFiles = []*os.File{pipe}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	switch mode {
	case "family":
		child("family-middle")
		child("family-last")
	case "family-exit":
		child("family-middle")
		child("family-last")
		os.Exit(3)
	case "family-middle":
		child("family-last")
		os.Exit(0)
	}
	fmt.Fprintln(pipe, os.Getpid())
	time.Sleep(time.Hour)
}

const patience = 30 * time.Second

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

var tagCount atomic.Int64

// world is a keeper process with the means to be its controllers.
type world struct {
	t       testing.TB
	tag     string
	listen  int
	cmd     *exec.Cmd
	exit    chan error
	stopped bool
}

// relay is a controller process that handed its socket to the test.
type relay struct {
	w    *world
	pid  int
	args string
	fd   int // the keeper's socket; handed to Connect
	link *os.File
}

func newWorld(t testing.TB, env ...string) *world {
	t.Helper()
	return newWorldUnder(t, nil, env...)
}

// newWorldUnder starts the keeper by way of another program.
func newWorldUnder(t testing.TB, by []string, env ...string) *world {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	w := &world{t: t, tag: fmt.Sprintf("ktest%d.%d", os.Getpid(), tagCount.Add(1)), exit: make(chan error, 1)}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if w.listen, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(w.listen, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(w.listen, 64); err != nil {
		t.Fatal(err)
	}
	by = append(by, exe)
	w.cmd = exec.Command(by[0], by[1:]...)
	w.cmd.Env = append(os.Environ(), modeVar+"=keeper", relayVar+"="+path, "GORACE=atexit_sleep_ms=0", tagVar+"="+w.tag)
	w.cmd.Env = append(w.cmd.Env, env...)
	w.cmd.Stdout, w.cmd.Stderr = os.Stdout, os.Stderr
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { w.exit <- w.cmd.Wait() }()
	t.Cleanup(w.close)
	return w
}

func (w *world) close() {
	if !w.stopped {
		_ = w.cmd.Process.Kill()
		_ = w.waitExit()
		w.stopped = false
	}
	_ = unix.Close(w.listen)
	if n, err := proc.Sweep(context.Background(), w.tag); w.stopped && (n != 0 || err != nil) {
		w.t.Errorf("processes left: %d, %v", n, err)
	}
}

// waitExit waits for the keeper to exit by itself.
func (w *world) waitExit() error {
	w.t.Helper()
	select {
	case err := <-w.exit:
		w.stopped = true
		return err
	case <-time.After(patience):
		w.t.Fatal("the keeper does not exit")
		return nil
	}
}

// next waits for the next controller.
func (w *world) next() *relay {
	w.t.Helper()
	p := []unix.PollFd{{Fd: int32(w.listen), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, int(patience/time.Millisecond))
		if err == unix.EINTR {
			continue
		}
		if err != nil || n != 1 {
			w.t.Fatalf("no controller came: %v", err)
		}
		break
	}
	s, _, err := unix.Accept4(w.listen, unix.SOCK_CLOEXEC)
	if err != nil {
		w.t.Fatal(err)
	}
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(s, buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		w.t.Fatal(err)
	}
	fds := fdpass.Parse(oob[:oobn])
	pid, args, _ := strings.Cut(strings.TrimSuffix(string(buf[:n]), "\n"), " ")
	r := &relay{w: w, args: args, link: os.NewFile(uintptr(s), "relay")}
	if r.pid, err = strconv.Atoi(pid); err != nil || len(fds) != 1 {
		_ = unix.Close(s)
		// It was killed before it could send: the next one is meant.
		return w.next()
	}
	r.fd = fds[0]
	w.t.Cleanup(func() { r.link.Close() })
	return r
}

// connect is next and Connect.
func (w *world) connect() (*relay, *Client, *Inventory) {
	w.t.Helper()
	r := w.next()
	c, inv, err := Connect(testContext(w.t), r.fd)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return r, c, inv
}

func (r *relay) kill() {
	if err := unix.Kill(r.pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
		r.w.t.Fatal(err)
	}
}

// exitWith makes the controller exit with a code.
func (r *relay) exitWith(code byte) {
	if _, err := r.link.Write([]byte{code}); err != nil {
		r.w.t.Fatal(err)
	}
}

// shutdown ends the keeper and checks that it went well.
func (w *world) shutdown(r *relay, c *Client, force bool) {
	w.t.Helper()
	if err := c.Shutdown(testContext(w.t), force); err != nil {
		w.t.Fatal(err)
	}
	<-c.Done()
	r.exitWith(0)
	if err := w.waitExit(); err != nil {
		w.t.Fatal(err)
	}
	if _, err := c.Spawn(testContext(w.t), sh("late", "exit 0")); !errors.Is(err, ErrGone) {
		w.t.Errorf("spawn without a keeper: %v", err)
	}
}

func sh(key, script string, files ...*os.File) proc.Spec {
	return proc.Spec{Key: key, Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: []string{"PATH=/usr/bin:/bin"}, Files: files}
}

func spawn(t testing.TB, c *Client, spec proc.Spec) *Process {
	t.Helper()
	p, err := c.Spawn(testContext(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	return p.(*Process)
}

func wait(t testing.TB, p proc.Process) proc.Exit {
	t.Helper()
	select {
	case <-p.Done():
		return p.Exit()
	case <-time.After(patience):
		t.Fatal("the process does not end")
		return proc.Exit{}
	}
}

func pipe(t testing.TB) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	if err := r.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return r, w
}

func readAll(t testing.TB, r *os.File) string {
	t.Helper()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
