package proc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/test/leak"
)

const patience = 30 * time.Second

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

var tags struct {
	sync.Mutex
	n int
}

// testTag is an instance tag that no other test has.
func testTag() string {
	tags.Lock()
	defer tags.Unlock()
	tags.n++
	return fmt.Sprintf("ptest%d.%d", os.Getpid(), tags.n)
}

func newDirect(t testing.TB) *Direct {
	d := &Direct{Tag: testTag()}
	t.Cleanup(func() {
		d.Close()
		if n, err := Sweep(context.Background(), d.Tag); n != 0 || err != nil {
			t.Errorf("processes left behind: %d, %v", n, err)
		}
	})
	return d
}

func wait(t testing.TB, p Process) Exit {
	t.Helper()
	select {
	case <-p.Done():
		return p.Exit()
	case <-time.After(patience):
		t.Fatal("the process does not end")
		return Exit{}
	}
}

func spawn(t testing.TB, s Spawner, spec Spec) Process {
	t.Helper()
	p, err := s.Spawn(testContext(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.KillTree(context.Background()); err != nil {
			t.Error(err)
		}
		wait(t, p)
		if err := p.Release(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func sh(key, script string, files ...*os.File) Spec {
	return Spec{Key: key, Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: []string{"PATH=/usr/bin:/bin"}, Files: files}
}

// output runs a script and returns what it writes.
func output(t *testing.T, s Spawner, spec Spec) (string, Exit) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	spec.Files = []*os.File{nil, w, w}
	p := spawn(t, s, spec)
	w.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b), wait(t, p)
}

func TestExits(t *testing.T) {
	d := newDirect(t)
	out, exit := output(t, d, sh("code", "echo $REMUDA_RUN; exit 3"))
	if exit.Code != 3 || exit.Signal != 0 || exit.Ok() || exit.String() != "exit code 3" {
		t.Errorf("exit %+v (%v)", exit, exit)
	}
	if !strings.HasPrefix(out, d.Tag+"-") {
		t.Errorf("%s is %q", RunVar, out)
	}
	if time.Since(exit.At) > patience || exit.MaxRSS <= 0 {
		t.Errorf("exit at %v with %d bytes", exit.At, exit.MaxRSS)
	}
	_, exit = output(t, d, sh("signal", "kill -KILL $$"))
	if exit.Code != -1 || exit.Signal != unix.SIGKILL || exit.OOM || exit.String() != "killed by SIGKILL" {
		t.Errorf("exit %+v (%v)", exit, exit)
	}
	_, exit = output(t, d, sh("ok", "exit 0"))
	if !exit.Ok() {
		t.Errorf("exit %+v", exit)
	}
}

func TestSettings(t *testing.T) {
	d := newDirect(t)
	dir := t.TempDir()
	mask := 0o027
	spec := sh("settings", "pwd; umask; nice; echo $A-$B; echo $REMUDA_RUN; cut -d' ' -f 5,6 /proc/$$/stat; echo $$")
	spec.Dir, spec.Umask, spec.Nice = dir, &mask, 7
	spec.Env = append(spec.Env, "A=1", "REMUDA_RUN=forged", "B=2")
	out, exit := output(t, d, spec)
	l := strings.Split(out, "\n")
	base, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		t.Fatal(err)
	}
	if base = 20 - base; base > 7 && os.Geteuid() != 0 {
		t.Logf("nice value %d here", base)
	}
	if !exit.Ok() || len(l) != 8 || l[0] != dir || l[1] != "0027" || l[2] != "7" || l[3] != "1-2" || !strings.HasPrefix(l[4], d.Tag+"-") || l[5] != l[6]+" "+l[6] {
		t.Errorf("%v: %q", exit, out)
	}
	// Nothing of it stayed with this process.
	if now := unix.Umask(0o022); now == mask {
		t.Errorf("umask of the test is %#o", now)
	}
	if prio, _ := unix.Getpriority(unix.PRIO_PROCESS, os.Getpid()); 20-prio != base {
		t.Errorf("nice value of the test is %d", 20-prio)
	}
}

func TestSpawnErrors(t *testing.T) {
	d := newDirect(t)
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	if err := os.Symlink("/nowhere/at/all", filepath.Join(dir, "dangling")); err != nil {
		t.Fatal(err)
	}
	plain := write("plain", "hello", 0o644)
	for _, c := range []struct {
		name string
		spec Spec
		op   string
		text string
		err  error
	}{
		{"missing", Spec{Path: dir + "/missing"}, OpExec, "no such file", unix.ENOENT},
		{"dangling", Spec{Path: dir + "/dangling"}, OpExec, "symbolic link to /nowhere/at/all", unix.ENOENT},
		{"below a file", Spec{Path: plain + "/x"}, OpExec, "not a directory", unix.ENOTDIR},
		{"not executable", Spec{Path: plain}, OpExec, "not executable", unix.EACCES},
		{"directory", Spec{Path: dir}, OpExec, "is a directory", unix.EACCES},
		{"interpreter", Spec{Path: write("script", "#!/no/such/thing -x\n", 0o755)}, OpExec, "bad interpreter /no/such/thing", unix.ENOENT},
		{"carriage return", Spec{Path: write("dos", "#!/bin/sh\r\n", 0o755)}, OpExec, "carriage return", unix.ENOENT},
		{"no format", Spec{Path: write("text", "hello\n", 0o755)}, OpExec, "not a program", unix.ENOEXEC},
		{"cwd", Spec{Path: "/bin/sh", Dir: dir + "/gone"}, OpChdir, "does not exist", unix.ENOENT},
		{"cwd file", Spec{Path: "/bin/sh", Dir: plain}, OpChdir, "not a directory", unix.ENOTDIR},
		{"too large", Spec{Path: "/bin/sh", Args: []string{"sh", strings.Repeat("x", 3<<20)}}, OpExec, "too large", unix.E2BIG},
		{"relative", Spec{Path: "sh"}, OpSpec, "not absolute", nil},
		{"NUL", Spec{Path: "/bin/sh", Args: []string{"a\x00b"}}, OpSpec, "NUL", nil},
		{"environment", Spec{Path: "/bin/sh", Env: []string{"novalue"}}, OpSpec, "NAME=value", nil},
		{"nice", Spec{Path: "/bin/sh", Nice: 40}, OpSpec, "nice", nil},
		{"key", Spec{Key: "../../x", Path: "/bin/sh"}, OpSpec, "key", nil},
		{"label", Spec{Path: "/bin/sh", Label: make([]byte, MaxLabel+1)}, OpSpec, "label", nil},
		{"keep", Spec{Path: "/bin/sh", Keep: map[string]*os.File{"x": os.Stdin}}, OpSpec, "keeper", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.spec.Key == "" {
				c.spec.Key = "error"
			}
			p, err := d.Spawn(testContext(t), c.spec)
			var serr *SpawnError
			if !errors.As(err, &serr) || p != nil {
				t.Fatalf("error %v", err)
			}
			if serr.Op != c.op || !strings.Contains(err.Error(), c.text) || c.err != nil && !errors.Is(err, c.err) {
				t.Errorf("%s: %v", serr.Op, err)
			}
		})
	}
	if l, _ := d.init(); l.groups.tree != "" {
		if e, err := os.ReadDir(l.groups.tree); err != nil || len(subdirs(l.groups.tree)) != 0 {
			t.Errorf("cgroups of failed starts are left: %v %v", e, err)
		}
	}
}

func TestCredential(t *testing.T) {
	d := newDirect(t)
	spec := sh("id", "id -u; id -g; id -G")
	spec.Credential = &Credential{UID: 65534, GID: 65534, Groups: []uint32{65533}}
	if os.Geteuid() != 0 {
		_, err := d.Spawn(testContext(t), spec)
		var serr *SpawnError
		if !errors.As(err, &serr) || serr.Op != OpCredential {
			t.Fatalf("error %v", err)
		}
		return
	}
	out, _ := output(t, d, spec)
	if out != "65534\n65534\n65534 65533\n" {
		t.Errorf("ids %q", out)
	}
	dir := filepath.Join(t.TempDir(), "private")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	spec.Dir = dir
	_, err := d.Spawn(testContext(t), spec)
	var serr *SpawnError
	if !errors.As(err, &serr) || serr.Op != OpChdir || !strings.Contains(err.Error(), "uid 65534") {
		t.Errorf("error %v", err)
	}
}

// runFamily starts the family program and reads the pids of its n lasting
// members.
func runFamily(t *testing.T, s Spawner, mode string, n int) (Process, []int) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := spawn(t, s, Spec{Key: "family", Path: exe, Env: []string{modeVar + "=" + mode, "GORACE=atexit_sleep_ms=0"}, Files: []*os.File{nil, os.Stdout, os.Stderr, w}})
	w.Close()
	if err := r.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	var pids []int
	in := bufio.NewScanner(r)
	for len(pids) < n && in.Scan() {
		pid, err := strconv.Atoi(in.Text())
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	if len(pids) != n {
		t.Fatalf("pids %v: %v", pids, in.Err())
	}
	return p, pids
}

func checkGone(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		if st, err := readStat(pid); err == nil && st.live() {
			t.Errorf("pid %d lives: %+v", pid, st)
		}
	}
}

// waitMembers waits until the members that are to end have.
func waitMembers(t *testing.T, p Process, want int) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		members, err := p.Members()
		if err == nil && len(members) == want {
			return
		}
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("members %v, want %d: %v", members, want, err)
		}
	}
}

func TestKillTree(t *testing.T) {
	for _, mode := range []string{"family", "family-exit"} {
		t.Run(mode, func(t *testing.T) {
			d := newDirect(t)
			p, pids := runFamily(t, d, mode, 3)
			if mode == "family-exit" {
				if exit := wait(t, p); exit.Code != 3 {
					t.Fatalf("exit %v", exit)
				}
			}
			want := 3
			if mode == "family-exit" {
				want = 2
			}
			waitMembers(t, p, want)
			if err := p.SignalTree(unix.SIGTERM); err != nil {
				t.Errorf("SIGTERM: %v", err)
			}
			if err := p.KillTree(testContext(t)); err != nil {
				t.Fatal(err)
			}
			wait(t, p)
			checkGone(t, pids)
			if members, err := p.Members(); err != nil || len(members) != 0 {
				t.Errorf("members %v: %v", members, err)
			}
			if err := p.SignalTree(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
				t.Errorf("signal after the end: %v", err)
			}
			if err := p.Signal(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
				t.Errorf("signal after the end: %v", err)
			}
		})
	}
}

func TestSweep(t *testing.T) {
	d := newDirect(t)
	p, pids := runFamily(t, d, "family-exit", 3)
	wait(t, p)
	waitMembers(t, p, 2)
	if n, err := Sweep(testContext(t), testTag()); n != 0 || err != nil {
		t.Errorf("sweep of another tag: %d, %v", n, err)
	}
	n, err := Sweep(testContext(t), d.Tag)
	if n != 2 || err != nil {
		t.Errorf("swept %d: %v", n, err)
	}
	checkGone(t, pids)
	if l, _ := d.init(); l.groups.tree != "" {
		if _, err := os.Stat(l.groups.tree); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", l.groups.tree, err)
		}
		// The launcher makes it anew.
		if _, exit := output(t, d, sh("again", "exit 0")); !exit.Ok() {
			t.Error(exit)
		}
	}
}

func TestMemoryMax(t *testing.T) {
	d := newDirect(t)
	l, err := d.init()
	if err != nil {
		t.Fatal(err)
	}
	spec := sh("hungry", "x=0123456789abcdef; while :; do x=$x$x; done")
	spec.MemoryMax = 32 << 20
	if !l.Memory() {
		_, err := d.Spawn(testContext(t), spec)
		var serr *SpawnError
		if !errors.As(err, &serr) || serr.Op != OpMemory {
			t.Errorf("error %v", err)
		}
		return
	}
	_, exit := output(t, d, spec)
	if exit.Signal != unix.SIGKILL || !exit.OOM || exit.String() != "killed by SIGKILL (out of memory)" {
		t.Errorf("exit %+v", exit)
	}
}

func TestConcurrent(t *testing.T) {
	d := newDirect(t)
	before := leak.Descriptors(t)
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			p, err := d.Spawn(testContext(t), sh("c"+strconv.Itoa(i), "exit "+strconv.Itoa(i%7)))
			if err != nil {
				t.Error(err)
				return
			}
			if exit := wait(t, p); exit.Code != i%7 {
				t.Errorf("exit %v", exit)
			}
			if err := p.KillTree(testContext(t)); err != nil {
				t.Error(err)
			}
			if err := p.Release(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if after := leak.Descriptors(t); after > before+2 { // the launcher's /dev/null, the poller
		t.Errorf("%d descriptors, before %d", after, before)
	}
}

func TestIdentity(t *testing.T) {
	self, err := Identify(os.Getpid())
	if err != nil || !self.Alive() {
		t.Fatalf("%+v: %v", self, err)
	}
	other := ID{PID: self.PID, Start: self.Start + 1}
	if other.Alive() || !errors.Is(other.Signal(0), os.ErrProcessDone) {
		t.Error("another start time is another process")
	}
	if err := self.Signal(0); err != nil {
		t.Error(err)
	}
	if _, err := Identify(1 << 30); !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	if (ID{}).Alive() || (ID{PID: -1}).Alive() {
		t.Error("no process is alive")
	}
	d := newDirect(t)
	p := spawn(t, d, sh("sleep", "exec sleep 1000"))
	if !p.ID().Alive() {
		t.Error("not alive")
	}
	if err := p.Release(); !errors.Is(err, ErrRunning) {
		t.Error(err)
	}
	if err := p.Signal(unix.SIGTERM); err != nil {
		t.Error(err)
	}
	if exit := wait(t, p); exit.Signal != unix.SIGTERM {
		t.Error(exit)
	}
	if p.ID().Alive() {
		t.Error("alive")
	}
}

func TestParseStat(t *testing.T) {
	line := "42 (a) b) (c) S 7 8 9 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 3 0 123456 1 2"
	st, ok := parseStat([]byte(line))
	if !ok || st.state != 'S' || st.ppid != 7 || st.pgrp != 8 || st.session != 9 || st.threads != 3 || st.start != 123456 {
		t.Errorf("%+v %v", st, ok)
	}
	for i := range len(line) {
		parseStat([]byte(line[:i])) // must not panic
	}
}

func TestMounts(t *testing.T) {
	root, point, fs, super, ok := parseMount(`36 35 98:0 /a\040b /mnt/x\134y rw,noatime master:1 - cgroup cgroup rw,memory`)
	if !ok || root != "/a b" || point != `/mnt/x\y` || fs != "cgroup" || !hasWord(super, "memory", ",") {
		t.Error(root, point, fs, super, ok)
	}
	for _, bad := range []string{"", "-", "a - b", "1 2 3 4 5", "1 2 3 4 5 6 - x"} {
		if _, _, _, _, ok := parseMount(bad); ok {
			t.Errorf("%q is a mount", bad)
		}
	}
	tree, mem := Support()
	if tree == "" || mem == "" {
		t.Error(tree, mem)
	}
	t.Log(tree)
	t.Log(mem)
}

// TestUnprivileged runs the tests as an ordinary user, who has no cgroup.
func TestUnprivileged(t *testing.T) {
	if os.Geteuid() != 0 {
		return // they run so anyway
	}
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	bin := filepath.Join(dir, "proc.test")
	if err := os.WriteFile(bin, exe, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "-test.run", "TestKillTree|TestSweep|TestMemoryMax|TestExits|TestCredential|TestConcurrent|TestSettings|TestMounts", "-test.v")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), modeVar+"=unprivileged", "TMPDIR="+dir, "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

func BenchmarkSpawn(b *testing.B) {
	d := newDirect(b)
	spec := Spec{Key: "bench", Path: "/bin/true"}
	for b.Loop() {
		p, err := d.Spawn(context.Background(), spec)
		if err != nil {
			b.Fatal(err)
		}
		<-p.Done()
		if err := p.KillTree(context.Background()); err != nil {
			b.Fatal(err)
		}
		if err := p.Release(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkKillNothing is the call before each restart.
func BenchmarkKillNothing(b *testing.B) {
	d := newDirect(b)
	p := spawn(b, d, Spec{Key: "bench", Path: "/bin/true"})
	<-p.Done()
	for b.Loop() {
		if err := p.KillTree(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
}
