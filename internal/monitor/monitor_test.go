package monitor

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

func newSampler(t testing.TB) *Sampler {
	t.Helper()
	s, err := NewSampler()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// start runs a command in a process group of its own, which ends with the
// test, and returns its pid and its output.
func start(t testing.TB, name string, args ...string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe() // open until the end: cat waits
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	})
	return cmd, bufio.NewReader(out)
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("did not come: " + what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestSampleBusyAndIdle(t *testing.T) {
	s := newSampler(t)
	busy, _ := start(t, "sh", "-c", "while :; do :; done")
	idle, out := start(t, "sh", "-c", "echo up; exec cat")
	if _, err := out.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	groups := map[int][]int{1: {busy.Process.Pid}, 2: {idle.Process.Pid}, 3: {busy.Process.Pid, idle.Process.Pid}, 4: {1 << 29}, 5: nil, 6: {0, -1}}
	first := s.Sample(groups)
	if len(first) != len(groups) {
		t.Errorf("%d groups, want %d", len(first), len(groups))
	}
	begun := time.Now()
	before := cpuOf(t, busy.Process.Pid)
	time.Sleep(400 * time.Millisecond)
	u := s.Sample(groups)
	// What the machine gave it, which on a loaded one is less than a core.
	share := 100 * (cpuOf(t, busy.Process.Pid) - before).Seconds() / time.Since(begun).Seconds()
	if math.Abs(u[1].CPU-share) > 15 {
		t.Errorf("busy loop: CPU %.1f %%, want about %.1f", u[1].CPU, share)
	}
	if u[2].CPU > 5 {
		t.Errorf("cat that waits: CPU %.1f %%", u[2].CPU)
	}
	if u[3].Procs != 2 || u[3].RSS != u[1].RSS+u[2].RSS || math.Abs(u[3].CPU-u[1].CPU-u[2].CPU) > 0.1 {
		t.Errorf("both: %+v, want the sum of %+v and %+v", u[3], u[1], u[2])
	}
	if u[4] != (Usage{}) || u[5] != (Usage{}) || u[6] != (Usage{}) {
		t.Errorf("groups without a process: %+v %+v %+v", u[4], u[5], u[6])
	}
	if u[2].RSS < 100<<10 || u[2].RSS > 100<<20 {
		t.Errorf("cat: RSS %d", u[2].RSS)
	}
	// A look that follows at once repeats the figure, and does not spoil the next.
	if again := s.Sample(groups); again[1].CPU != u[1].CPU {
		t.Errorf("at once: CPU %.1f, want %.1f again", again[1].CPU, u[1].CPU)
	}
	_ = busy.Process.Kill()
	_, _ = busy.Process.Wait()
	if u := s.Sample(groups); u[1] != (Usage{}) || u[3].Procs != 1 {
		t.Errorf("after its end: %+v, %+v", u[1], u[3])
	}
	s.Sample(nil)
	if len(s.seen) != 0 {
		t.Errorf("%d processes remembered that are in no group", len(s.seen))
	}
}

func cpuOf(t *testing.T, pid int) time.Duration {
	t.Helper()
	d, ok := cpuTime(pid)
	if !ok {
		t.Fatal("no CPU clock of another process")
	}
	return d
}

func TestFirstLookIsAverageSinceStart(t *testing.T) {
	var p seen
	for _, c := range []struct {
		name        string
		start       uint64
		used, after time.Duration
		want        float64
	}{
		{"first look: 2 s in 10 s", 99_000, 2 * time.Second, 0, 20},
		{"0.5 s in the next 1 s", 99_000, 2500 * time.Millisecond, time.Second, 50},
		{"a look that follows at once", 99_000, 2600 * time.Millisecond, time.Second + 50*time.Millisecond, 50},
		{"0.5 s more, the look between not lost", 99_000, 3000 * time.Millisecond, 2 * time.Second, 50},
		{"a step back", 99_000, 2990 * time.Millisecond, 3 * time.Second, 0},
		{"the pid of another, 0.2 s in 2 s", 100_200, 200 * time.Millisecond, 4 * time.Second, 10},
		{"another again, younger than a tick", 100_500, 5 * time.Millisecond, 5 * time.Second, 50},
	} {
		p = charge(p, c.start, c.used, 1000*time.Second+c.after)
		if math.Abs(float64(p.cpu)-c.want) > 0.01 {
			t.Errorf("%s: %.2f, want %.2f", c.name, p.cpu, c.want)
		}
	}
}

func TestZombieCountsForNothing(t *testing.T) {
	s := newSampler(t)
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	r, err := NewRest(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	until(t, "a zombie", func() bool { st, ok := s.stat(cmd.Process.Pid); return ok && st.state == 'Z' })
	if u := s.Sample(map[int][]int{1: {cmd.Process.Pid}}); u[1] != (Usage{}) {
		t.Errorf("a zombie: %+v", u[1])
	}
	if l := r.Look(); l != Gone {
		t.Errorf("look at a zombie: %v, want Gone", l)
	}
}

func TestDescendants(t *testing.T) {
	s := newSampler(t)
	cmd, out := start(t, "sh", "-c", `(sleep 1000 & echo $!; wait) & sleep 1000 & echo $!; wait`)
	want := []int{cmd.Process.Pid}
	for range 2 {
		line, err := out.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, pid)
	}
	tree, err := s.Descendants(cmd.Process.Pid, 1<<29)
	if err != nil {
		t.Fatal(err)
	}
	got := tree[cmd.Process.Pid]
	if len(tree) != 1 || len(got) != 4 || got[0] != cmd.Process.Pid { // the subshell is one more
		t.Fatalf("descendants %v, want 4 with %v", tree, want)
	}
	for _, pid := range want {
		if !slices.Contains(got, pid) {
			t.Errorf("%d is missing in %v", pid, got)
		}
	}
	// The nearest of two leaders has it.
	tree, err = s.Descendants(os.Getpid(), cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(tree[os.Getpid()], os.Getpid()) || slices.Contains(tree[os.Getpid()], want[1]) || len(tree[cmd.Process.Pid]) != 4 {
		t.Errorf("two leaders: %v", tree)
	}
	if u := s.Sample(tree); u[cmd.Process.Pid].Procs != 4 {
		t.Errorf("usage of the tree: %+v", u[cmd.Process.Pid])
	}
}

// A program whose first thread waits for another that does not get its turn, as
// on a machine that is busy, has not come to rest.
func TestRestOfStarvedThread(t *testing.T) {
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		t.Fatal(err)
	}
	cpu := 0
	for !cpus.IsSet(cpu) {
		cpu++
	}
	// It has the processor to itself.
	start(t, "python3", "-c", fmt.Sprintf("import os\nos.sched_setaffinity(0, {%d})\nwhile True: pass", cpu))
	cmd, out := start(t, "python3", "-c", `
import os, threading
def work():
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    print(flush=True)
    while True: pass
t = threading.Thread(target=work)
t.start()
t.join()`)
	if _, err := out.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	var tids []os.DirEntry
	until(t, "both threads", func() bool {
		tids, _ = os.ReadDir(fmt.Sprintf("/proc/%d/task", cmd.Process.Pid))
		return len(tids) == 2
	})
	tid, err := strconv.Atoi(tids[1].Name())
	if err != nil {
		t.Fatal(err)
	}
	cpus.Zero()
	cpus.Set(cpu)
	if err := unix.SchedSetaffinity(tid, &cpus); err != nil {
		t.Fatal(err)
	}
	r, err := NewRest(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for range 30 {
		if r.Look() == AtRest {
			t.Fatal("at rest, with a thread that waits for the processor")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestRest(t *testing.T) {
	look := func(pid int) *Rest {
		r, err := NewRest(pid)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		return r
	}
	// a program that works, then waits; and one whose child works
	cmd, _ := start(t, "sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exec cat")
	r := look(cmd.Process.Pid)
	if l := r.Look(); l != Busy {
		t.Errorf("first look: %v, want Busy", l)
	}
	until(t, "rest", func() bool { return r.Look() == AtRest })
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid))
	if err != nil || !strings.Contains(exe, "cat") {
		t.Errorf("came to rest as %s (%v), want as cat", exe, err)
	}
	if !Settled(cmd.Process.Pid) {
		t.Error("Settled: false for a program that waits")
	}

	parent, _ := start(t, "sh", "-c", "(while :; do :; done); exit")
	r = look(parent.Process.Pid)
	rest := 0
	for range 20 {
		if r.Look() == AtRest {
			rest++
		}
		time.Sleep(10 * time.Millisecond)
	}
	// On a kernel that does not show children the parent alone is judged.
	_, err = os.Stat("/proc/self/task/" + strconv.Itoa(os.Getpid()) + "/children")
	if err == nil && rest > 0 {
		t.Errorf("at rest %d times while its child works", rest)
	}

	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = cmd.Process.Wait()
	if Settled(cmd.Process.Pid) {
		t.Error("Settled: true for a program that is gone")
	}
}

func TestRestOfNode(t *testing.T) {
	cmd, out := start(t, "node", "-e", "require('http').createServer().listen(0, '127.0.0.1', () => console.log('up'))")
	r, err := NewRest(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := out.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	until(t, "rest", func() bool { return r.Look() == AtRest })
}

func TestPSS(t *testing.T) {
	pss, err := PSS(os.Getpid())
	if err != nil || pss < 1<<20 {
		t.Errorf("own PSS: %d, %v", pss, err)
	}
	if _, err := PSS(1 << 29); err == nil {
		t.Error("PSS of no process: no error")
	}
}

func TestClosed(t *testing.T) {
	s := newSampler(t)
	s.Close()
	s.Close()
	if u := s.Sample(map[int][]int{1: {os.Getpid()}}); u[1] != (Usage{}) {
		t.Errorf("%+v from a closed sampler", u[1])
	}
	if _, err := s.Descendants(1); err == nil {
		t.Error("no error from a closed sampler")
	}
}

func TestParseStat(t *testing.T) {
	tail := " S 10 3 3 0 -1 4194560 1 2 3 4 11 22 5 6 20 0 7 0 12345 1000000 99 18446744073709551615 1"
	for _, name := range []string{"sh", "a b", ")", ") R 1 (", "\n", ""} {
		st, ok := parseStat([]byte("3 (" + name + ")" + tail + "\n"))
		if want := (stat{state: 'S', ppid: 10, ticks: 33, start: 12345, rss: 99}); !ok || st != want {
			t.Errorf("name %q: %+v %v, want %+v", name, st, ok, want)
		}
	}
	for _, bad := range []string{"", ")", "1 (x)", "1 (x) ", "1 (x) S", "1 (x) S 1 2", "1 (x) S -1" + tail[5:]} {
		if st, ok := parseStat([]byte(bad)); ok {
			t.Errorf("%q: %+v", bad, st)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("3 (a) S 10 3 3 0 -1 4194560 1 2 3 4 11 22 5 6 20 0 7 0 12345 1000000 99 1 1"))
	f.Add([]byte(") S 1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		st, ok := parseStat(b)
		if ok && (st.rss < 0 || st.ppid < 0) {
			t.Fatalf("%q: %+v", b, st)
		}
	})
}

func TestSampleDoesNotAllocatePerProcess(t *testing.T) {
	s := newSampler(t)
	groups := map[int][]int{1: nil}
	for range 100 {
		groups[1] = append(groups[1], os.Getpid())
	}
	s.Sample(groups)
	if n := testing.AllocsPerRun(20, func() { s.Sample(groups) }); n > 5 {
		t.Errorf("%.0f allocations for 100 processes", n)
	}
}

func BenchmarkSample(b *testing.B) {
	for _, n := range []int{100, 1000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			// One shell that is the parent of all: cheap to start and to end.
			cmd, out := start(b, "sh", "-c", "i=0; while [ $i -lt "+strconv.Itoa(n)+" ]; do sleep 10000 & echo $!; i=$((i+1)); done; wait")
			groups := make(map[int][]int, n)
			for i := range n {
				line, err := out.ReadString('\n')
				if err != nil && !errors.Is(err, io.EOF) {
					b.Fatal(err)
				}
				pid, err := strconv.Atoi(strings.TrimSpace(line))
				if err != nil {
					b.Fatal(err)
				}
				groups[i] = []int{pid}
			}
			s := newSampler(b)
			s.Sample(groups)
			b.ReportAllocs()
			for b.Loop() {
				s.Sample(groups)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/process")
			runtime.KeepAlive(cmd)
		})
	}
}

func BenchmarkDescendants(b *testing.B) {
	s := newSampler(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Descendants(os.Getpid()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLook(b *testing.B) {
	r, err := NewRest(os.Getpid())
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	for b.Loop() {
		r.Look()
	}
}
