// Package harness is what the tests and benchmarks that drive the real
// program share: they build it, give it a home of its own, run commands in
// it, look at processes through /proc and take everything down again.
//
// Invariant: whatever was started under a [Home] is gone after its Close, also
// where the test failed; and nothing outside that home is ever signalled.
//
// It must never import anything of the program except client: it sees what a
// user sees.
package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/remuda-dev/remuda/client"
)

// EnvBinary names the variable that holds the path of a program built
// beforehand; where it is set, [Build] builds nothing.
const EnvBinary = "REMUDA_TEST_BIN"

// Build builds the program into dir and returns its path. With race it is
// built with the race detector, and a file named in EnvBinary is not used.
func Build(ctx context.Context, dir string, race bool) (string, error) {
	if b := os.Getenv(EnvBinary); b != "" && !race {
		return filepath.Abs(b)
	}
	out := filepath.Join(dir, "remuda")
	cmd := exec.CommandContext(ctx, filepath.Join(Root(), "scripts", "build.sh"), out)
	if race {
		cmd = exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-race", "-o", out, "./cmd/remuda")
	}
	cmd.Dir = Root()
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, b)
	}
	return out, os.Chmod(out, 0o755)
}

// Root is the top folder of the project.
func Root() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}

// Home is one daemon's world: a folder that holds everything, the program and
// who runs it. The zero value of Cred is the caller.
type Home struct {
	Dir  string // short, and readable for everybody: programs' files go here
	Home string // REMUDA_HOME
	Bin  string
	Env  []string            // added to a minimal environment
	Cred *syscall.Credential // nil: as oneself

	sys func() *syscall.SysProcAttr
}

// New makes a home in a new folder under the system's folder for temporary
// files, owned by uid.
func New(bin string, cred *syscall.Credential) (*Home, error) {
	dir, err := os.MkdirTemp("", "rmd")
	if err != nil {
		return nil, err
	}
	h := &Home{Dir: dir, Home: filepath.Join(dir, "h"), Bin: bin, Cred: cred}
	h.sys = func() *syscall.SysProcAttr { return &syscall.SysProcAttr{Credential: cred} }
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	if cred != nil {
		if err := os.Chown(dir, int(cred.Uid), int(cred.Gid)); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// Environ is what commands of this home run with.
func (h *Home) Environ() []string {
	return append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + h.Dir, "REMUDA_HOME=" + h.Home,
		"LANG=C.UTF-8", "NO_COLOR=1", "TMPDIR=" + os.TempDir(),
	}, h.Env...)
}

// Result is a command that ran to its end.
type Result struct {
	Code           int // -1 where it could not be run or was killed
	Stdout, Stderr string
	Wall           time.Duration
}

func (r Result) String() string {
	return fmt.Sprintf("exit code %d after %v\nstdout: %s\nstderr: %s", r.Code, r.Wall.Round(time.Millisecond), r.Stdout, r.Stderr)
}

// Command prepares a command of the program in this home.
func (h *Home) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, h.Bin, args...)
	cmd.Dir, cmd.Env = h.Dir, h.Environ()
	if h.sys != nil {
		cmd.SysProcAttr = h.sys()
	}
	cmd.WaitDelay = time.Second
	return cmd
}

// Run runs a command of the program to its end.
func (h *Home) Run(ctx context.Context, args ...string) Result {
	cmd := h.Command(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	begin := time.Now()
	err := cmd.Run()
	r := Result{Stdout: out.String(), Stderr: errs.String(), Wall: time.Since(begin), Code: cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.Code, r.Stderr = -1, r.Stderr+err.Error()
	}
	return r
}

// Must is Run for commands that have to succeed.
func (h *Home) Must(ctx context.Context, args ...string) (Result, error) {
	r := h.Run(ctx, args...)
	if r.Code != 0 {
		return r, fmt.Errorf("remuda %s: %v", strings.Join(args, " "), r)
	}
	return r, nil
}

// Write puts a file into Dir and returns its path.
func (h *Home) Write(name, content string) (string, error) {
	p := filepath.Join(h.Dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(p, []byte(content), 0o755); err != nil {
		return "", err
	}
	return p, os.Chmod(p, 0o755)
}

// Client returns a new client of the home's daemon.
func (h *Home) Client() *client.Client { return client.New(h.Home) }

// Procs is every live process that belongs to this home: it mentions the
// home's folder in its command line or environment, has it as its working
// folder, or descends from one that does.
func (h *Home) Procs() []Proc { return Belonging(h.Dir) }

// Close ends the daemon and all it started, first politely, removes the
// folder and reports what the daemon itself had left behind.
func (h *Home) Close() error {
	var err error
	if len(h.Procs()) > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		r := h.Run(ctx, "kill")
		cancel()
		if r.Code != 0 && r.Code != 4 {
			err = fmt.Errorf("remuda kill: %v", r)
		}
	}
	if left := h.Vanish(2 * time.Second); len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("%d processes are left after kill: %s", len(left), Describe(left)))
		h.Destroy()
	}
	return errors.Join(err, os.RemoveAll(h.Dir))
}

// Vanish waits until no process of this home is left and returns those that
// are after the time.
func (h *Home) Vanish(within time.Duration) []Proc {
	for end := time.Now().Add(within); ; time.Sleep(10 * time.Millisecond) {
		left := h.Procs()
		if len(left) == 0 || time.Now().After(end) {
			return left
		}
	}
}

// Destroy kills every process of this home with SIGKILL, until none is left.
func (h *Home) Destroy() {
	for range 50 {
		left := h.Procs()
		if len(left) == 0 {
			return
		}
		// Parents first, stopped, so that nothing is started anew meanwhile.
		for _, p := range left {
			_ = syscall.Kill(p.PID, syscall.SIGSTOP)
		}
		for _, p := range h.Procs() {
			_ = syscall.Kill(p.PID, syscall.SIGKILL)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// FreePort is a port that nobody listens at, on any address, by TCP or UDP. It is
// none of those that the kernel gives to connections and to who asks for any
// port, so that nobody comes to have it between now and its use.
func FreePort() (string, error) {
	var errs []error
	for range 50 {
		port := strconv.Itoa(10000 + rand.IntN(20000))
		l, err := net.Listen("tcp", ":"+port)
		if err == nil {
			l.Close()
			var u net.PacketConn
			if u, err = net.ListenPacket("udp", ":"+port); err == nil {
				_ = u.Close()
				return port, nil
			}
		}
		errs = append(errs, err)
	}
	return "", fmt.Errorf("no port is free: %w", errors.Join(errs...))
}

// Eventually calls f until it returns nil, and returns its last error where
// the time is up.
func Eventually(within time.Duration, f func() error) error {
	for end := time.Now().Add(within); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

// Median is the middle of v, 0 where v is empty.
func Median[T ~int64 | ~float64](v []T) T { return Quantile(v, 0.5) }

// Quantile is the q-th part of v in order, 0 where v is empty.
func Quantile[T ~int64 | ~float64](v []T, q float64) T {
	if len(v) == 0 {
		return 0
	}
	s := slices.Clone(v)
	slices.Sort(s)
	return s[min(len(s)-1, int(q*float64(len(s))))]
}
