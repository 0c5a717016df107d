// Package stoptree_test proves that stop and delete leave nothing of a
// program, however its processes tried to get away: as root, where cgroups
// hold them, and as an ordinary user, where nothing but tracing does.
package stoptree_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/test/harness"
)

// Every process of a program calls note (sh: a line, Python: a function),
// which leaves its pid in the folder named by its first argument; that finds
// it again whatever it does to its name and environment.
const (
	shNote = `note() { : >"$1/$2"; }
`
	pyHead = `import ctypes, os, signal, subprocess, sys, time
pids = sys.argv[1]
def note():
    open(os.path.join(pids, str(os.getpid())), "w").close()
def daemonize(ignore=True, rename=False):
    """Double-forks; returns True in the grandchild, in a session of its own."""
    if os.fork():
        os.wait()
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.closerange(3, 64)
    if ignore:
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(s, signal.SIG_IGN)
    if rename:
        ctypes.CDLL(None).prctl(15, b"kworker/0:1", 0, 0, 0)
    note()
    return True
def forever():
    while True:
        time.sleep(1000)
note()
`
)

// program is one way of getting away. want is how many processes it has.
type program struct {
	name, file, text string
	want             int
	leaderEnds       bool // and is not started again
}

func programs() []program {
	return []program{
		{name: "plain", file: "a.sh", want: 1, text: shNote + `note "$1" $$
while :; do sleep 0.2; done
`},
		{name: "ignores-term", file: "a.py", want: 1, text: pyHead + `
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
forever()
`},
		{name: "setsid", file: "a.py", want: 2, text: pyHead + `
if os.fork() == 0:
    os.setsid()
    note()
forever()
`},
		{name: "double-fork", file: "a.py", want: 2, text: pyHead + `
daemonize()
forever()
`},
		{name: "daemonized-generations", file: "a.py", want: 4, text: pyHead + `
for _ in range(3):
    if not daemonize():
        break
forever()
`},
		{name: "renamed", file: "a.py", want: 2, text: pyHead + `
daemonize(rename=True)
forever()
`},
		{name: "environment-cleared", file: "a.py", want: 2, text: pyHead + `
if len(sys.argv) == 2 and daemonize():
    os.execve(sys.executable, ["innocent", "-c", "import time,signal\nfor s in (15,2,1): signal.signal(s, signal.SIG_IGN)\ntime.sleep(100000)"], {})
forever()
`},
		{name: "group-of-ignorers", file: "a.sh", want: 3, text: shNote + `note "$1" $$
trap '' TERM INT HUP
for i in 1 2; do
	sh -c 'trap "" TERM INT HUP; : >"$1/$$"; while :; do sleep 0.3; done' x "$1" &
done
while :; do sleep 0.3; done
`},
		{name: "leader-gone", file: "a.py", want: 2, leaderEnds: true, text: pyHead + `
if daemonize():
    forever()
time.sleep(0.5)
os._exit(0)
`},
		{name: "leader-gone-environment-cleared", file: "a.py", want: 2, leaderEnds: true, text: pyHead + `
if daemonize(rename=True):
    os.execve(sys.executable, ["innocent", "-c", "import time,signal\nfor s in (15,2,1): signal.signal(s, signal.SIG_IGN)\ntime.sleep(100000)"], {})
time.sleep(0.5)
os._exit(0)
`},
		{name: "forks-on-term", file: "a.py", want: 2, text: pyHead + `
def again(*_):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note()
        forever()
if daemonize(ignore=False):
    signal.signal(signal.SIGTERM, again)
forever()
`},
	}
}

func TestNothingIsLeft(t *testing.T) {
	dir, err := os.MkdirTemp("", "rmdbin")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	built, err := harness.Build(t.Context(), dir, false)
	if err != nil {
		t.Fatal(err)
	}
	// A copy that everybody may run, wherever the first one is.
	bin := filepath.Join(dir, "remuda.everybody")
	b, err := os.ReadFile(built)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bin, b, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Run("self", func(t *testing.T) {
		t.Parallel()
		everyProgram(t, bin, nil)
	})
	if os.Getuid() == 0 {
		t.Run("nobody", func(t *testing.T) {
			t.Parallel()
			everyProgram(t, bin, &syscall.Credential{Uid: 65534, Gid: 65534})
		})
	}
}

// everyProgram starts all programs twice, then stops the one and deletes the
// other of each.
func everyProgram(t *testing.T, bin string, cred *syscall.Credential) {
	h, err := harness.New(bin, cred)
	if err != nil {
		t.Fatal(err)
	}
	h.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin"}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	type run struct {
		program
		verb, app, pids string
	}
	var runs []run
	var apps []map[string]any
	for _, p := range programs() {
		for _, verb := range []string{"stop", "delete"} {
			r := run{program: p, verb: verb, app: p.name + "-" + verb}
			file, err := h.Write(filepath.Join(r.app, p.file), p.text)
			if err != nil {
				t.Fatal(err)
			}
			r.pids = filepath.Join(h.Dir, r.app, "pids")
			if err := os.Mkdir(r.pids, 0o777); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(r.pids, 0o777); err != nil {
				t.Fatal(err)
			}
			interpreter := map[string]string{".sh": "/bin/sh", ".py": "/usr/bin/python3"}[filepath.Ext(file)]
			apps = append(apps, map[string]any{
				"name": r.app, "script": file, "args": []string{r.pids}, "interpreter": interpreter,
				"cwd": h.Dir, "kill_timeout": 500, "autorestart": !p.leaderEnds,
			})
			runs = append(runs, r)
		}
	}
	j, err := json.Marshal(map[string]any{"apps": apps})
	if err != nil {
		t.Fatal(err)
	}
	file, err := h.Write("stoptree.json", string(j))
	if err != nil {
		t.Fatal(err)
	}
	if r := h.Run(t.Context(), "start", file); r.Code != 0 {
		t.Fatalf("start: %v", r)
	}
	info, err := h.Client().Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("cgroups: %s", info.Cgroup)
	for _, r := range runs {
		t.Run(r.app, func(t *testing.T) {
			var procs []harness.Proc
			if err := harness.Eventually(20*time.Second, func() error {
				procs = noted(r.pids)
				if len(procs) < r.want {
					return fmt.Errorf("%d processes of it came up in place of %d: %s", len(procs), r.want, harness.Describe(procs))
				}
				return nil
			}); err != nil {
				t.Fatalf("%v\nlog: %s", err, h.Run(t.Context(), "logs", r.app, "--nostream").Stdout)
			}
			if r.leaderEnds {
				if err := harness.Eventually(20*time.Second, func() error {
					list, err := h.Client().List(t.Context(), r.app)
					if err != nil {
						return err
					}
					if list[0].PID != 0 {
						return fmt.Errorf("the leader is still there: %s", list[0].State)
					}
					return nil
				}); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			if res := h.Run(ctx, r.verb, r.app); res.Code != 0 {
				t.Errorf("%s: %v", r.verb, res)
			}
			// The command has returned: nothing may be left.
			left := alive(append(procs, noted(r.pids)...))
			if len(left) > 0 {
				t.Errorf("left after %s: %s", r.verb, harness.Describe(left))
			}
			list, err := h.Client().List(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			there := false
			for _, i := range list {
				there = there || i.App == r.app
			}
			if there != (r.verb == "stop") {
				t.Errorf("in the list after %s: %v", r.verb, there)
			}
		})
	}
	if zombies := zombiesOf(info.KeeperPID); len(zombies) > 0 {
		t.Errorf("zombies: %s", harness.Describe(zombies))
	}
}

// noted is the processes that left their pid in a folder and are alive or
// were when they were looked for.
func noted(dir string) []harness.Proc {
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var out []harness.Proc
	for _, n := range names {
		pid, err := strconv.Atoi(n.Name())
		if err != nil {
			continue
		}
		p, ok := harness.Stat(pid)
		if !ok {
			p = harness.Proc{PID: pid} // it ended: it counts as having been there
		} else if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil {
			p.Cmdline = strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
		}
		out = append(out, p)
	}
	return out
}

// alive is those of procs that still run: the same pid and the same start.
func alive(procs []harness.Proc) []harness.Proc {
	seen := map[int]bool{}
	var out []harness.Proc
	for _, p := range procs {
		now, ok := harness.Stat(p.PID)
		if ok && p.Start != 0 && now.Start == p.Start && now.State != 'X' && !seen[p.PID] {
			seen[p.PID] = true
			out = append(out, p)
		}
	}
	return out
}

func zombiesOf(keeper int) []harness.Proc {
	var out []harness.Proc
	_ = harness.Eventually(2*time.Second, func() error {
		out = nil
		for _, p := range harness.Procs() {
			if p.PPID == keeper && p.State == 'Z' {
				out = append(out, p)
			}
		}
		if len(out) > 0 {
			return fmt.Errorf("%d zombies", len(out))
		}
		return nil
	})
	return out
}
