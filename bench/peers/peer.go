package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/remuda-dev/remuda/test/harness"
)

// peer is a process manager under measurement.
type peer interface {
	name() string
	version(ctx context.Context) string
	up(ctx context.Context) error // the daemon, without a program
	down() error
	parent() int    // whose children the programs are
	daemons() []int // all processes of the daemon
	command(ctx context.Context, args ...string) *exec.Cmd
	listArgs() []string
	// start starts n programs by one command from one file and returns how
	// long the command took; instances n of one program.
	start(ctx context.Context, n int) (time.Duration, error)
	instances(ctx context.Context, n int) (time.Duration, error)
	clear(ctx context.Context, n int) error
	startLogger(ctx context.Context, argv []string, out string) error
}

func timed(cmd *exec.Cmd) (time.Duration, error) {
	var errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = nil, &errs
	begin := time.Now()
	err := cmd.Run()
	wall := time.Since(begin)
	if err != nil {
		err = fmt.Errorf("%s: %w: %.2000s", strings.Join(cmd.Args, " "), err, errs.String())
	}
	return wall, err
}

func do(cmd *exec.Cmd) error { _, err := timed(cmd); return err }

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func ms(d time.Duration) float64 { return float64(d) / 1e6 }

func isProgram(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	return err == nil && bytes.Contains(b, []byte("sleep\x00"+sleepArg))
}

// programs is the children of a daemon that are ours to kill.
func programs(parent int) []int {
	var out []int
	for _, pid := range harness.Children(parent) {
		if isProgram(pid) {
			out = append(out, pid)
		}
	}
	return out
}

func waitCount(ctx context.Context, p peer, n int) error {
	return harness.Eventually(60*time.Second, func() error {
		if got := len(programs(p.parent())); got != n && ctx.Err() == nil {
			return fmt.Errorf("%d programs run in place of %d", got, n)
		}
		return ctx.Err()
	})
}

// memory is the sum of resident and proportional sizes in MB.
func memory(pids []int) (rss, pss float64) {
	for _, pid := range pids {
		r, p := harness.Memory(pid)
		rss, pss = rss+float64(r)/(1<<20), pss+float64(p)/(1<<20)
	}
	return rss, pss
}

func ticks(pids []int) (sum uint64) {
	for _, pid := range pids {
		if p, ok := harness.Stat(pid); ok {
			sum += p.Ticks
		}
	}
	return sum
}

// ecosystem is a file that PM2 and Remuda both read.
func ecosystem(dir string, n int) (string, error) {
	var apps []any
	for i := range n {
		apps = append(apps, map[string]any{
			"name": fmt.Sprintf("s%d", i), "script": "/usr/bin/sleep", "interpreter": "none",
			"args": sleepArg, "exec_mode": "fork", "cwd": dir,
		})
	}
	b, err := json.Marshal(map[string]any{"apps": apps})
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, fmt.Sprintf("apps%d.json", n))
	return path, os.WriteFile(path, b, 0o644)
}

// remuda is ours.
type remuda struct {
	home               *harness.Home
	dir                string
	keeper, controller int
}

func newRemuda(ctx context.Context, dir, bin string) (*remuda, error) {
	r := &remuda{dir: filepath.Join(dir, "remuda")}
	if err := os.Mkdir(r.dir, 0o755); err != nil {
		return nil, err
	}
	if bin == "" {
		var err error
		if bin, err = harness.Build(ctx, r.dir, false); err != nil {
			return nil, err
		}
	}
	bin, err := filepath.Abs(bin)
	r.home = &harness.Home{Dir: r.dir, Home: filepath.Join(r.dir, "h"), Bin: bin}
	return r, err
}

func (r *remuda) name() string { return "remuda" }
func (r *remuda) version(ctx context.Context) string {
	line, _, _ := strings.Cut(r.home.Run(ctx, "version").Stdout, "\n")
	return strings.TrimPrefix(line, "remuda ")
}

func (r *remuda) up(ctx context.Context) error {
	c := r.home.Client()
	defer c.Close()
	if _, err := c.Launch(ctx, r.home.Bin); err != nil {
		return err
	}
	info, err := c.Info(ctx)
	r.keeper, r.controller = info.KeeperPID, info.PID
	return err
}

func (r *remuda) down() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if res := r.home.Run(ctx, "kill"); res.Code != 0 && res.Code != 4 {
		return errors.New(res.String())
	}
	return os.RemoveAll(r.home.Home)
}

func (r *remuda) parent() int        { return r.keeper }
func (r *remuda) daemons() []int     { return []int{r.keeper, r.controller} }
func (r *remuda) listArgs() []string { return []string{"list"} }
func (r *remuda) command(ctx context.Context, args ...string) *exec.Cmd {
	return r.home.Command(ctx, args...)
}

func (r *remuda) start(ctx context.Context, n int) (time.Duration, error) {
	file, err := ecosystem(r.dir, n)
	if err != nil {
		return 0, err
	}
	return timed(r.command(ctx, "start", file))
}

func (r *remuda) instances(ctx context.Context, n int) (time.Duration, error) {
	return timed(r.command(ctx, "start", "sleep", "-i", strconv.Itoa(n), "--", sleepArg))
}

func (r *remuda) clear(ctx context.Context, _ int) error {
	return do(r.command(ctx, "delete", "all", "-s"))
}

func (r *remuda) startLogger(ctx context.Context, argv []string, out string) error {
	return do(r.command(ctx, append([]string{"start", argv[0], "--name", "logger", "--interpreter", "none", "--no-autorestart",
		"-o", out, "-e", "/dev/null", "--"}, argv[1:]...)...))
}

// pm2 is PM2 of npm.
type pm2 struct {
	dir, bin string
	god      int
}

func newPM2(ctx context.Context, dir string) (*pm2, error) {
	out := filepath.Join(harness.Root(), "bench", "out", "pm2")
	p := &pm2{dir: filepath.Join(dir, "pm2"), bin: filepath.Join(out, "node_modules", "pm2", "bin", "pm2")}
	if err := errors.Join(os.MkdirAll(out, 0o755), os.Mkdir(p.dir, 0o755)); err != nil {
		return nil, err
	}
	if _, err := os.Stat(p.bin); err != nil {
		say("installing PM2 7")
		cmd := exec.CommandContext(ctx, "npm", "install", "--no-audit", "--no-fund", "--prefix", out, "pm2@7")
		cmd.Dir = out
		if err := do(cmd); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *pm2) name() string { return "pm2" }
func (p *pm2) version(context.Context) string {
	b, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(p.bin)), "package.json"))
	var v struct{ Version string }
	if err != nil || json.Unmarshal(b, &v) != nil {
		return "?"
	}
	return v.Version
}

func (p *pm2) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "node", append([]string{p.bin}, args...)...)
	cmd.Dir = p.dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + p.dir, "PM2_HOME=" + p.dir, "LANG=C.UTF-8"}
	return cmd
}

func (p *pm2) up(ctx context.Context) error {
	if err := do(p.command(ctx, "ping")); err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(p.dir, "pm2.pid"))
	if err != nil {
		return err
	}
	p.god, err = strconv.Atoi(strings.TrimSpace(string(b)))
	return err
}

func (p *pm2) down() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return do(p.command(ctx, "kill"))
}

func (p *pm2) parent() int        { return p.god }
func (p *pm2) daemons() []int     { return []int{p.god} }
func (p *pm2) listArgs() []string { return []string{"list"} }

func (p *pm2) start(ctx context.Context, n int) (time.Duration, error) {
	file, err := ecosystem(p.dir, n)
	if err != nil {
		return 0, err
	}
	return timed(p.command(ctx, "start", file))
}

func (p *pm2) instances(ctx context.Context, n int) (time.Duration, error) {
	return timed(p.command(ctx, "start", "/usr/bin/sleep", "--name", "s", "--interpreter", "none", "-i", strconv.Itoa(n), "--", sleepArg))
}

func (p *pm2) clear(ctx context.Context, _ int) error { return do(p.command(ctx, "delete", "all")) }

func (p *pm2) startLogger(ctx context.Context, argv []string, out string) error {
	return do(p.command(ctx, append([]string{"start", argv[0], "--name", "logger", "--interpreter", "none", "--no-autorestart",
		"-o", out, "-e", "/dev/null", "--"}, argv[1:]...)...))
}

// supervisord is Debian's.
type supervisord struct {
	dir  string
	proc *exec.Cmd
}

func newSupervisord(_ context.Context, dir string) (*supervisord, error) {
	s := &supervisord{dir: filepath.Join(dir, "sup")}
	if _, err := exec.LookPath("supervisord"); err != nil {
		return nil, fmt.Errorf("supervisord is not installed (apt-get install supervisor): %w", err)
	}
	return s, os.Mkdir(s.dir, 0o755)
}

func (s *supervisord) name() string { return "supervisord" }
func (s *supervisord) version(ctx context.Context) string {
	b, _ := exec.CommandContext(ctx, "supervisord", "--version").Output()
	return strings.TrimSpace(string(b))
}

func (s *supervisord) conf() string { return filepath.Join(s.dir, "supervisord.conf") }

func (s *supervisord) configure(programs string) error {
	return os.WriteFile(s.conf(), fmt.Appendf(nil, `[unix_http_server]
file=%[1]s/sock
[supervisord]
nodaemon=true
logfile=%[1]s/supervisord.log
pidfile=%[1]s/supervisord.pid
childlogdir=%[1]s
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://%[1]s/sock
%[2]s`, s.dir, programs), 0o644)
}

func (s *supervisord) command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "supervisorctl", append([]string{"-c", s.conf()}, args...)...)
}

func (s *supervisord) up(ctx context.Context) error {
	if err := s.configure(""); err != nil {
		return err
	}
	s.proc = exec.Command("supervisord", "-c", s.conf()) //nolint:noctx // down ends it
	s.proc.Dir = s.dir
	s.proc.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.proc.Start(); err != nil {
		return err
	}
	return harness.Eventually(20*time.Second, func() error { return do(s.command(ctx, "pid")) })
}

func (s *supervisord) down() error {
	if s.proc == nil {
		return nil
	}
	if err := s.proc.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	err := s.proc.Wait()
	s.proc = nil
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}

func (s *supervisord) parent() int        { return s.proc.Process.Pid }
func (s *supervisord) daemons() []int     { return []int{s.proc.Process.Pid} }
func (s *supervisord) listArgs() []string { return []string{"status"} }

// load makes supervisord read its file anew; it starts nothing.
func (s *supervisord) load(ctx context.Context, programs string) error {
	if err := s.configure(programs); err != nil {
		return err
	}
	return do(s.command(ctx, "update"))
}

func (s *supervisord) start(ctx context.Context, n int) (time.Duration, error) {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "[program:s%d]\ncommand=/usr/bin/sleep %s\nautostart=false\n", i, sleepArg)
	}
	if err := s.load(ctx, b.String()); err != nil {
		return 0, err
	}
	return timed(s.command(ctx, "start", "all"))
}

func (s *supervisord) instances(context.Context, int) (time.Duration, error) {
	return 0, errors.New("not measured")
}

func (s *supervisord) clear(ctx context.Context, _ int) error {
	return errors.Join(do(s.command(ctx, "stop", "all")), s.load(ctx, ""))
}

func (s *supervisord) startLogger(ctx context.Context, argv []string, out string) error {
	return s.load(ctx, fmt.Sprintf("[program:logger]\ncommand=%s\nautostart=true\nautorestart=false\nstdout_logfile=%s\nstderr_logfile=NONE\n",
		strings.Join(argv, " "), out))
}
