package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/internal/keeper"
	"github.com/remuda-dev/remuda/proc"
)

// The test binary is also the daemon of the tests: keeper and controller, as
// the real program is.
func TestMain(m *testing.M) {
	if os.Getenv(workerVar) != "" {
		if err := workerMain(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	Stage(os.Args)
	if len(os.Args) == 4 && os.Args[2] == "--home" {
		if err := daemonMain(os.Args[1], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// A program with the race detector otherwise waits for a second at its end.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

func daemonMain(mode, home string) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	o := Options{Home: home, Binary: exe, Version: "test", Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	if mode == "keeper" {
		return RunKeeper(context.Background(), o)
	}
	fd, err := strconv.Atoi(os.Getenv(keeper.EnvFD))
	if err != nil {
		return err
	}
	if err := os.Unsetenv(keeper.EnvFD); err != nil {
		return err
	}
	return RunController(context.Background(), o, fd)
}

const patience = 30 * time.Second

// box is a daemon of its own, and a client of it.
type box struct {
	*testing.T
	home string
	c    *client.Client
	ctx  context.Context

	keeper int // its pid, see processes
}

func newBox(t *testing.T) *box {
	t.Helper()
	t.Parallel()
	home, err := os.MkdirTemp("", "rd") // short: a socket's path is
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	b := &box{T: t, home: home, c: client.New(home), ctx: ctx}
	t.Cleanup(func() {
		defer cancel()
		_ = b.c.Kill(ctx)
		b.c.Close()
		if n, err := proc.Sweep(ctx, Tag(home)); n > 0 || err != nil {
			t.Errorf("%d processes were left: %v", n, err)
		}
		log := b.read("logs/daemon.log")
		for _, bad := range []string{"DATA RACE", "panic"} {
			if strings.Contains(log, bad) {
				t.Errorf("daemon.log: %s", log)
			}
		}
		os.RemoveAll(home)
	})
	b.launch()
	return b
}

func (b *box) launch() {
	b.Helper()
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	if _, err := b.c.Launch(b.ctx, exe); err != nil {
		b.Fatalf("launch: %v\n%s", err, b.read("logs/daemon.log"))
	}
}

// app is a shell script as an app. Its folder is the home.
func (b *box) app(name, script string) config.App {
	return config.App{
		Name: name, Namespace: "default", Command: []string{"/bin/sh", "-c", script}, Script: "sh", Interpreter: "none",
		Cwd: b.home, InheritEnv: true, Instances: 1, ExecMode: "fork", Autostart: true,
		Restart: config.Restart{Policy: "always", MinUptime: config.Duration(time.Second), MaxRestarts: 16, Window: config.Duration(5 * time.Minute), BackoffInitial: config.Duration(100 * time.Millisecond), BackoffMax: config.Duration(time.Second)},
		Stop:    config.Stop{Signal: "SIGTERM", Grace: config.Duration(10 * time.Second)},
		Ready:   config.Probe{Type: "none"},
		Logs:    config.Logs{Compress: "none"},
	}
}

func (b *box) read(name string) string {
	content, err := os.ReadFile(filepath.Join(b.home, name))
	if err != nil {
		return ""
	}
	return string(content)
}

func (b *box) write(name, content string) {
	b.Helper()
	if err := os.WriteFile(filepath.Join(b.home, name), []byte(content), 0o600); err != nil {
		b.Fatal(err)
	}
}

// well fails the test unless the call went well, with each of its outcomes.
func (b *box) well(res client.ActResult, err error) client.ActResult {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
	for _, o := range res.Instances {
		if o.Error != "" {
			b.Fatalf("%s:%d: %s %q", o.App, o.Index, o.Error, o.LastErr)
		}
	}
	if len(res.Warnings) > 0 {
		b.Fatalf("warnings: %q", res.Warnings)
	}
	return res
}

func (b *box) start(apps ...config.App) client.ActResult {
	b.Helper()
	return b.well(b.c.Start(b.ctx, client.StartRequest{Apps: apps}))
}

func (b *box) act(verb client.Verb, targets ...string) (client.ActResult, error) {
	return b.c.Act(b.ctx, client.ActRequest{Verb: verb, Targets: targets})
}

// list is what there is, by app:index.
func (b *box) list() map[string]client.Instance {
	b.Helper()
	all, err := b.c.List(b.ctx)
	if err != nil {
		b.Fatal(err)
	}
	m := map[string]client.Instance{}
	for _, i := range all {
		m[fmt.Sprintf("%s:%d", i.App, i.Index)] = i
	}
	return m
}

// until waits for a condition.
func (b *box) until(what string, ok func() bool) {
	b.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			b.Fatalf("not within %s: %s; there is %+v", patience, what, b.list())
		}
	}
}

// become waits until an instance is in a state.
func (b *box) become(name string, state client.State) client.Instance {
	b.Helper()
	b.until(name+" is "+string(state), func() bool { return b.list()[name].State == state })
	return b.list()[name]
}

// crash kills the controller and returns when the next one serves.
func (b *box) crash() {
	b.Helper()
	info, err := b.c.Info(b.ctx)
	if err != nil {
		b.Fatal(err)
	}
	if err := syscall.Kill(info.PID, syscall.SIGKILL); err != nil {
		b.Fatal(err)
	}
	b.until("another controller", func() bool {
		now, err := b.c.Info(b.ctx)
		return err == nil && now.PID != info.PID
	})
}

// lines are those of a file in the home.
func (b *box) lines(name string) []string {
	return slices.DeleteFunc(strings.Split(b.read(name), "\n"), func(s string) bool { return s == "" })
}
