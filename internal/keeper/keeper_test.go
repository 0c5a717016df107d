package keeper

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
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

	"github.com/remuda-dev/remuda/proc"
)

func TestSpawnAndExit(t *testing.T) {
	w := newWorld(t)
	r, c, inv := w.connect()
	if inv.Keeper.PID != w.cmd.Process.Pid || !inv.Keeper.Alive() || inv.Tag != w.tag || inv.Restarts != 0 || inv.Cgroup == "" || inv.Memory == "" || len(inv.Processes) != 0 {
		t.Errorf("inventory %+v", inv)
	}
	out, in := pipe(t)
	p := spawn(t, c, sh("one", "echo $REMUDA_RUN; ls /proc/self/fd | wc -l; exit 3", nil, in))
	in.Close()
	if got := strings.Split(readAll(t, out), "\n"); !strings.HasPrefix(got[0], w.tag+"-") || got[1] != "4" {
		t.Errorf("output %q", got)
	}
	if exit := wait(t, p); exit.Code != 3 {
		t.Errorf("exit %v", exit)
	}
	if err := p.Signal(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal after the exit: %v", err)
	}
	if err := p.Release(); err != nil {
		t.Error(err)
	}
	if _, err := p.Members(); !errors.Is(err, errUnknownRun) {
		t.Errorf("members after release: %v", err)
	}

	// What cannot be started says why, across the socket.
	_, err := c.Spawn(testContext(t), proc.Spec{Key: "bad", Path: "/no/such/program"})
	var serr *proc.SpawnError
	if !errors.As(err, &serr) || serr.Op != proc.OpExec || !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "/no/such/program: no such file") {
		t.Errorf("error %v", err)
	}

	// One key, one process.
	p = spawn(t, c, sh("two", "exec sleep 1000"))
	if _, err := c.Spawn(testContext(t), sh("two", "exec sleep 1000")); !errors.As(err, &serr) || serr.Op != proc.OpSpec {
		t.Errorf("a second process of the same key: %v", err)
	}
	if members, err := p.Members(); err != nil || len(members) != 1 || members[0] != p.ID().PID {
		t.Errorf("members %v: %v", members, err)
	}
	if err := p.Release(); !errors.Is(err, proc.ErrRunning) {
		t.Errorf("release: %v", err)
	}
	if err := c.Shutdown(testContext(t), false); !errors.Is(err, ErrBusy) {
		t.Errorf("shutdown: %v", err)
	}
	if err := p.Signal(unix.SIGTERM); err != nil {
		t.Error(err)
	}
	if exit := wait(t, p); exit.Signal != unix.SIGTERM {
		t.Errorf("exit %v", exit)
	}

	// A large environment goes by memfd.
	out, in = pipe(t)
	big := strings.Repeat("x", 100<<10)
	spec := sh("big", "echo ${#A} ${#B} ${#C}", nil, in)
	spec.Env = append(spec.Env, "A="+big, "B="+big, "C="+big)
	p = spawn(t, c, spec)
	in.Close()
	if got := readAll(t, out); got != "102400 102400 102400\n" {
		t.Errorf("output %q", got)
	}
	wait(t, p)
	if _, err := c.Spawn(testContext(t), proc.Spec{Key: "huge", Path: "/bin/sh", Args: []string{strings.Repeat("x", maxBody)}}); !errors.As(err, &serr) || serr.Op != proc.OpSpec {
		t.Errorf("error %.200v", err)
	}
	w.shutdown(r, c, false)
}

func TestInventory(t *testing.T) {
	w := newWorld(t)
	r, c, _ := w.connect()
	out, in := pipe(t)
	keep, keepIn := pipe(t)
	spec := sh("alive", "read x; echo got $x; exec sleep 1000", out, nil)
	spec.Label = []byte("label of alive")
	spec.Keep = map[string]*os.File{"stdin": in, "other": keep}
	alive := spawn(t, c, spec)
	// Dies while there is no controller.
	gate, gateIn := pipe(t)
	spec = sh("gap", "read x; exit 7", gate)
	gap := spawn(t, c, spec)
	// Has exited and is not forgotten; has exited and is forgotten.
	kept := spawn(t, c, sh("kept", "exit 4"))
	wait(t, kept)
	forgotten := spawn(t, c, sh("forgotten", "exit 5"))
	wait(t, forgotten)
	if err := forgotten.Release(); err != nil {
		t.Fatal(err)
	}
	if err := alive.SetLabel(testContext(t), []byte("new label")); err != nil || string(alive.Label()) != "new label" {
		t.Fatal(err)
	}
	for i := range 5 {
		if err := c.Put(testContext(t), "store"+strconv.Itoa(i), []byte{byte(i)}, keepIn); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Drop(testContext(t), "store3"); err != nil {
		t.Fatal(err)
	}
	if err := c.Put(testContext(t), "store4", []byte("again"), keepIn); err != nil {
		t.Fatal(err)
	}
	if err := c.Drop(testContext(t), "nothing"); err != nil {
		t.Fatal(err)
	}
	in.Close()
	r.kill()
	if _, err := gateIn.WriteString("go\n"); err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	if err := alive.Signal(unix.SIGTERM); !errors.Is(err, ErrGone) {
		t.Errorf("signal through the old connection: %v", err)
	}

	r, c, inv := w.connect()
	if inv.Restarts != 1 || len(inv.Processes) != 3 {
		t.Fatalf("inventory %+v", inv)
	}
	a, g, k := inv.Processes[0], inv.Processes[1], inv.Processes[2]
	if a.Key() != "alive" || a.ID() != alive.ID() || string(a.Label()) != "new label" || len(a.Files) != 2 || a.Files["other"] == nil {
		t.Errorf("adopted %+v", a)
	}
	if g.Key() != "gap" || g.ID() != gap.ID() || len(g.Files) != 0 {
		t.Errorf("adopted %+v", g)
	}
	if exit := wait(t, g); exit.Code != 7 {
		t.Errorf("exit in the gap: %v", exit)
	}
	if exit := wait(t, k); exit.Code != 4 || k.Exit() != exit || exit.At.Sub(kept.Exit().At) != 0 {
		t.Errorf("exit before the gap: %v", exit)
	}
	var names []string
	for _, s := range inv.Stored {
		names = append(names, s.Name+"="+string(s.Label))
		s.File.Close()
	}
	if len(names) != 4 || !strings.Contains(strings.Join(names, " "), "store4=again") {
		t.Errorf("store %q", names)
	}
	// The kept pipe still works.
	if _, err := a.Files["stdin"].WriteString("mail\n"); err != nil {
		t.Error(err)
	}
	for _, f := range a.Files {
		f.Close()
	}
	if err := a.KillTree(testContext(t)); err != nil {
		t.Error(err)
	}
	if exit := wait(t, a); exit.Signal != unix.SIGKILL {
		t.Errorf("exit %v", exit)
	}
	for _, p := range inv.Processes {
		if err := p.Release(); err != nil {
			t.Error(err)
		}
	}
	w.shutdown(r, c, false)
}

// TestControllerKilled kills the controller again and again, at random
// moments, while programs run, exit and are started.
func TestControllerKilled(t *testing.T) {
	rounds := 25
	if testing.Short() {
		rounds = 10
	}
	w := newWorld(t)
	want := make(map[string]proc.ID) // key → the process that must be there
	started := 0
	var worst time.Duration
	var killedAt time.Time
	for round := range rounds {
		r, c, inv := w.connect()
		if !killedAt.IsZero() {
			worst = max(worst, time.Since(killedAt))
		}
		have := make(map[string]proc.ID)
		for _, p := range inv.Processes {
			have[p.Key()] = p.ID()
			if strings.HasPrefix(p.Key(), "exits") {
				if exit := wait(t, p); exit.Code != 3 {
					t.Errorf("%s: %v", p.Key(), exit)
				}
				if err := p.Release(); err != nil {
					t.Error(err)
				}
				delete(want, p.Key())
			} else {
				select {
				case <-p.Done():
					t.Fatalf("round %d: %s ended: %v", round, p.Key(), p.Exit())
				default:
				}
			}
			for _, f := range p.Files {
				f.Close()
			}
		}
		for key, id := range want {
			if !strings.HasPrefix(key, "exits") && have[key] != id {
				t.Fatalf("round %d: %s is %v, want %v", round, key, have[key], id)
			}
		}
		// Spawns race with the kill: each either is reported, or is found in
		// the next inventory, or did not happen.
		if started < 20 {
			p := spawn(t, c, sh(fmt.Sprintf("sleep%d", started), "exec sleep 1000"))
			want[p.Key()] = p.ID()
			started++
		}
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				p, err := c.Spawn(context.Background(), sh(fmt.Sprintf("exits%d.%d", round, i), "exit 3"))
				if err != nil && !errors.Is(err, ErrGone) {
					t.Error(err)
				}
				if err == nil {
					select {
					case <-p.Done():
					case <-c.Done():
					}
				}
			})
		}
		time.Sleep(time.Duration(rand.IntN(5000)) * time.Microsecond) // a random moment, not a wait
		killedAt = time.Now()
		r.kill()
		wg.Wait()
		<-c.Done()
	}
	t.Logf("longest gap %v", worst)
	r, c, inv := w.connect()
	if inv.Restarts != rounds {
		t.Errorf("%d restarts", inv.Restarts)
	}
	if err := c.Shutdown(testContext(t), true); err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	r.exitWith(0)
	if err := w.waitExit(); err != nil {
		t.Fatal(err)
	}
	for key, id := range want {
		if id.Alive() {
			t.Errorf("%s survived the end", key)
		}
	}
}

// children lists the keeper's children, zombies in brackets.
func children(t testing.TB, pid int) (live, zombies int) {
	t.Helper()
	out, err := exec.Command("ps", "-o", "stat=", "--ppid", strconv.Itoa(pid)).Output()
	if err != nil && len(out) > 0 {
		t.Fatal(err)
	}
	for _, l := range strings.Fields(string(out)) {
		if l[0] == 'Z' {
			zombies++
		} else {
			live++
		}
	}
	return live, zombies
}

func TestManyAtOnce(t *testing.T) {
	w := newWorld(t)
	r, c, _ := w.connect()
	warm := spawn(t, c, sh("warm", "exit 0"))
	wait(t, warm)
	if err := warm.Release(); err != nil {
		t.Fatal(err)
	}
	_, in := pipe(t)
	fds := countFDs(t, w.cmd.Process.Pid)
	own := countFDs(t, os.Getpid())
	var wg sync.WaitGroup
	procs := make([]proc.Process, 200)
	for i := range procs {
		wg.Go(func() {
			spec := sh("many"+strconv.Itoa(i), "exec sleep 1000", nil, in, in)
			spec.Keep = map[string]*os.File{"pipe": in}
			p, err := c.Spawn(context.Background(), spec)
			if err != nil {
				t.Error(err)
				return
			}
			procs[i] = p
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	if n := countFDs(t, w.cmd.Process.Pid); n > fds+200+2 {
		t.Errorf("keeper: %d descriptors, %d before", n, fds)
	}
	for i, p := range procs {
		wg.Go(func() {
			if i%2 == 0 {
				if err := p.Signal(unix.SIGTERM); err != nil {
					t.Error(err)
				}
			} else if err := p.KillTree(context.Background()); err != nil {
				t.Error(err)
			}
			<-p.Done()
			if err := p.KillTree(context.Background()); err != nil {
				t.Error(err)
			}
			if err := p.Release(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if live, zombies := children(t, w.cmd.Process.Pid); live != 1 || zombies != 0 {
		t.Errorf("the keeper has %d children and %d zombies", live, zombies)
	}
	if n := countFDs(t, w.cmd.Process.Pid); n != fds {
		t.Errorf("keeper: %d descriptors, %d before", n, fds)
	}
	if n := countFDs(t, os.Getpid()); n != own {
		t.Errorf("controller: %d descriptors, %d before", n, own)
	}
	w.shutdown(r, c, false)
}

func countFDs(t testing.TB, pid int) int {
	t.Helper()
	e, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(e)
}

// TestSpawnGivenUp ends the context of Spawn at any moment: nothing may stay.
func TestSpawnGivenUp(t *testing.T) {
	w := newWorld(t)
	r, c, _ := w.connect()
	given := 0
	for i := range 30 {
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(time.Duration(i)*50*time.Microsecond, cancel)
		p, err := c.Spawn(ctx, sh("given"+strconv.Itoa(i), "exec sleep 1000"))
		switch {
		case err == nil:
			if err := p.KillTree(testContext(t)); err != nil {
				t.Error(err)
			}
			wait(t, p)
			if err := p.Release(); err != nil {
				t.Error(err)
			}
		case errors.Is(err, context.Canceled):
			given++
		default:
			t.Error(err)
		}
		cancel()
	}
	t.Logf("%d of 30 given up", given)
	deadline := time.Now().Add(patience)
	for {
		c.mu.Lock()
		n := len(c.procs) + len(c.pending)
		c.mu.Unlock()
		if live, zombies := children(t, w.cmd.Process.Pid); live == 1 && zombies == 0 && n == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a process that nobody waited for lives on")
		}
		time.Sleep(5 * time.Millisecond)
	}
	w.shutdown(r, c, false)
}

func runFamily(t *testing.T, c *Client, mode string) (*Process, []int) {
	t.Helper()
	r, in := pipe(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := spawn(t, c, proc.Spec{Key: mode, Path: exe, Env: []string{modeVar + "=" + mode, "GORACE=atexit_sleep_ms=0"}, Files: []*os.File{nil, os.Stdout, os.Stderr, in}})
	in.Close()
	n := 3
	if mode == "family-exit" {
		n = 2
	}
	var pids []int
	for s := bufio.NewScanner(r); len(pids) < n && s.Scan(); {
		pid, err := strconv.Atoi(s.Text())
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	if len(pids) != n {
		t.Fatalf("pids %v", pids)
	}
	return p, pids
}

// waitMembers waits until the members that are to end have.
func waitMembers(t *testing.T, p proc.Process, want int) {
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
	w := newWorld(t)
	r, c, inv := w.connect()
	t.Log(inv.Cgroup)
	for _, mode := range []string{"family", "family-exit"} {
		other := spawn(t, c, sh("bystander-"+mode, "sleep 1000 & wait"))
		p, pids := runFamily(t, c, mode)
		if mode == "family-exit" {
			if exit := wait(t, p); exit.Code != 3 {
				t.Errorf("exit %v", exit)
			}
		}
		if err := p.SignalTree(unix.SIGTERM); err != nil {
			t.Error(err)
		}
		waitMembers(t, p, len(pids))
		// Several at once wait for one kill.
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if err := p.KillTree(testContext(t)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		wait(t, p)
		for _, pid := range pids {
			if err := unix.Kill(pid, 0); err == nil {
				if id, err := proc.Identify(pid); err == nil && id.Alive() {
					t.Errorf("pid %d lives", pid)
				}
			}
		}
		if !other.ID().Alive() {
			t.Error("the bystander is dead")
		}
		if members, err := other.Members(); err != nil || len(members) < 1 {
			t.Errorf("members %v: %v", members, err)
		}
		if err := p.Release(); err != nil {
			t.Error(err)
		}
	}
	w.shutdown(r, c, true)
}

// TestKeeperKilled kills the keeper; the next one of the tag sweeps.
func TestKeeperKilled(t *testing.T) {
	w := newWorld(t)
	_, c, _ := w.connect()
	p := spawn(t, c, sh("left", "sleep 1000 & exec sleep 1000"))
	if err := w.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := w.waitExit(); err == nil {
		t.Error("the killed keeper ended well")
	}
	w.stopped = false // what it left is swept below
	w.exit <- nil
	<-c.Done()
	if err := p.KillTree(testContext(t)); !errors.Is(err, ErrGone) {
		t.Errorf("error %v", err)
	}
	if !p.ID().Alive() {
		t.Error("the process went with the keeper")
	}
	n, err := proc.Sweep(testContext(t), w.tag)
	if n < 1 || err != nil || p.ID().Alive() {
		t.Errorf("swept %d: %v", n, err)
	}
}

func TestSignals(t *testing.T) {
	w := newWorld(t)
	r, c, _ := w.connect()
	lines := bufio.NewReader(r.link)
	if err := r.link.SetReadDeadline(time.Now().Add(patience)); err != nil && !errors.Is(err, os.ErrNoDeadline) {
		t.Fatal(err)
	}
	for _, sig := range []syscall.Signal{unix.SIGHUP, unix.SIGTERM, unix.SIGINT} {
		if err := w.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if l, err := lines.ReadString('\n'); err != nil || l != sig.String()+"\n" {
			t.Errorf("%v came as %q: %v", sig, l, err)
		}
	}
	w.shutdown(r, c, false)
}

func TestServiceManager(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if err := l.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, "NOTIFY_SOCKET="+path, "WATCHDOG_USEC=100000")
	r, c, _ := w.connect()
	if err := c.Ready(testContext(t), "3 apps"); err != nil {
		t.Fatal(err)
	}
	if err := c.Ready(testContext(t), "two\nlines"); err == nil {
		t.Error("a status of two lines was taken")
	}
	if err := c.Stopping(testContext(t)); err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{
		fmt.Sprintf("READY=1\nMAINPID=%d\nSTATUS=3 apps", w.cmd.Process.Pid): true,
		"WATCHDOG=1": true, "STOPPING=1": true,
	}
	buf := make([]byte, 4096)
	for len(want) > 0 {
		n, err := l.Read(buf)
		if err != nil {
			t.Fatalf("still wanted: %v: %v", want, err)
		}
		if s := string(buf[:n]); s != "WATCHDOG=1" && !want[s] {
			t.Errorf("message %q", s)
		}
		delete(want, string(buf[:n]))
	}
	w.shutdown(r, c, false)
}

func TestReplace(t *testing.T) {
	w := newWorld(t)
	r, c, _ := w.connect()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"relative", "/no/such/file"} {
		if err := c.Replace(testContext(t), bad, nil); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
	if err := c.Replace(testContext(t), exe, []string{"controller", "new", "arguments"}); err != nil {
		t.Fatal(err)
	}
	r.exitWith(0)
	<-c.Done()
	r, c, inv := w.connect()
	if r.args != "new arguments" || inv.Notice != "" {
		t.Errorf("arguments %q, notice %q", r.args, inv.Notice)
	}
	// One that never connects.
	if err := c.Replace(testContext(t), "/bin/false", nil); err != nil {
		t.Fatal(err)
	}
	r.exitWith(0)
	<-c.Done()
	r, c, inv = w.connect()
	if r.args != "new arguments" || !strings.Contains(inv.Notice, "/bin/false") || !strings.Contains(inv.Notice, "exit code 1") {
		t.Errorf("arguments %q, notice %q", r.args, inv.Notice)
	}
	// One that runs and does something else.
	if err := c.Replace(testContext(t), "/bin/sleep", []string{"sleep", "1000"}); err != nil {
		t.Fatal(err)
	}
	r.exitWith(0)
	<-c.Done()
	r, c, inv = w.connect()
	if r.args != "new arguments" || !strings.Contains(inv.Notice, "/bin/sleep did not come up (it runs, but does not connect)") {
		t.Errorf("arguments %q, notice %q", r.args, inv.Notice)
	}
	// It stays with what worked, and says so once.
	r.kill()
	<-c.Done()
	r, c, inv = w.connect()
	if r.args != "new arguments" || inv.Notice != "" {
		t.Errorf("arguments %q, notice %q", r.args, inv.Notice)
	}
	w.shutdown(r, c, false)
}

// TestMalformed sends what is no message: the connection ends, the keeper and
// the processes do not.
func TestMalformed(t *testing.T) {
	w := newWorld(t)
	r, c, _ := w.connect()
	p := spawn(t, c, sh("lives", "exec sleep 1000"))
	hello := []byte{'R', 'K', framing, byte(kindHello), 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0}
	head := func(k kind, body ...byte) []byte {
		return append([]byte{'R', 'K', framing, byte(k), 0, 0, 0, 0, 2, 0, 0, 0}, body...)
	}
	cases := [][]byte{
		[]byte("hello"),
		bytes.Repeat([]byte{0xff}, 60000),
		head(kindSpawn),
		head(99),
		head(kindSignal, 1, 2, 3),
		head(kindPut, 0xff, 0xff, 0xff, 0xff),
		head(kindSpawn, bytes.Repeat([]byte{0xff}, 1000)...),
		append(head(kindForget), make([]byte, 9)...),
		{'R', 'K', framing, byte(kindHello), 1, 0, 0, 0, 1, 0, 0, 0},
		make([]byte, maxPacket+100),
	}
	for i, bad := range cases {
		r.kill()
		r = w.next()
		if i > 0 && i < 8 {
			if err := unix.Send(r.fd, hello, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Send(r.fd, bad, 0); err != nil {
			t.Fatalf("case %d: %v", i, err)
		}
		drainToEOF(t, r.fd)
	}
	// A version that the keeper does not speak is told so.
	r.kill()
	r = w.next()
	if err := unix.Send(r.fd, head(kindHello, 9, 0, 0, 0, 12, 0, 0, 0), 0); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, maxPacket)
	readable(t, r.fd)
	n, err := unix.Read(r.fd, buf)
	if err != nil || n < headerLen || kind(buf[3]) != kindError {
		t.Fatalf("answer %q: %v", buf[:max(n, 0)], err)
	}
	if cause, err := decodeError(buf[headerLen:n]); err != nil || !errors.Is(cause, errVersion) {
		t.Errorf("answer %v: %v", cause, err)
	}
	_ = unix.Close(r.fd)

	r.kill()
	r, c, inv := w.connect()
	if len(inv.Processes) != 1 || inv.Processes[0].ID() != p.ID() || !p.ID().Alive() {
		t.Errorf("inventory %+v", inv)
	}
	w.shutdown(r, c, true)
}

func drainToEOF(t *testing.T, fd int) {
	t.Helper()
	defer func() { _ = unix.Close(fd) }()
	buf := make([]byte, maxPacket)
	for {
		readable(t, fd)
		if n, err := unix.Read(fd, buf); n == 0 || err == unix.ECONNRESET {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

func readable(t *testing.T, fd int) {
	t.Helper()
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(patience/time.Millisecond))
		if err == unix.EINTR {
			continue
		}
		if err != nil || n != 1 {
			t.Fatalf("nothing comes from the keeper: %v", err)
		}
		return
	}
}

// TestManyKept has an inventory of many descriptors.
func TestManyKept(t *testing.T) {
	w := newWorld(t)
	r, c, _ := w.connect()
	_, in := pipe(t)
	for i := range 4 {
		spec := sh("kept"+strconv.Itoa(i), "exec sleep 1000")
		spec.Keep = make(map[string]*os.File)
		for j := range proc.MaxKeep {
			spec.Keep["f"+strconv.Itoa(j)] = in
		}
		spec.Label = bytes.Repeat([]byte{'x'}, proc.MaxLabel)
		spawn(t, c, spec)
	}
	r.kill()
	<-c.Done()
	r, c, inv := w.connect()
	if len(inv.Processes) != 4 {
		t.Fatalf("%d processes", len(inv.Processes))
	}
	for _, p := range inv.Processes {
		if len(p.Files) != proc.MaxKeep || len(p.Label()) != proc.MaxLabel {
			t.Errorf("%d files, label of %d", len(p.Files), len(p.Label()))
		}
	}
	inv.close()
	w.shutdown(r, c, true)
}

// TestPID1 runs the keeper as pid 1 of a container, which inherits orphans
// that are nobody's.
func TestPID1(t *testing.T) {
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"--pid", "--fork", "--kill-child", "--mount-proc"}
	if os.Geteuid() != 0 {
		args = append(args, "--user", "--map-root-user")
	}
	if out, err := exec.Command(unshare, append(args, "true")...).CombinedOutput(); err != nil {
		t.Logf("no containers can be made here: %v: %s", err, out)
		return
	}
	w := newWorldUnder(t, append([]string{unshare}, args...))
	r, c, inv := w.connect()
	if inv.Keeper.PID != 1 || r.pid == 0 {
		t.Errorf("the keeper is pid %d", inv.Keeper.PID)
	}
	p, _ := runFamily(t, c, "family-exit")
	wait(t, p)
	waitMembers(t, p, 2)
	if err := p.KillTree(testContext(t)); err != nil {
		t.Error(err)
	}
	waitMembers(t, p, 0)
	// An orphan that ends on its own, and was nobody's for lack of any trace.
	out, in := pipe(t)
	p = spawn(t, c, sh("orphans", "env -i setsid sh -c 'env -i setsid true & exit' & wait", nil, in, in))
	wait(t, p)
	in.Close()
	if got := readAll(t, out); got != "" {
		t.Errorf("output %q", got)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		out, in := pipe(t)
		spec := sh("ps", "ps -eo pid=,stat=,comm=", nil, in, in)
		p := spawn(t, c, spec)
		in.Close()
		list := readAll(t, out)
		wait(t, p)
		if err := p.Release(); err != nil {
			t.Error(err)
		}
		if strings.Count(list, "\n") <= 4 && !strings.Contains(list, "Z") { // keeper, controller, sh, ps
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("processes:\n%s", list)
		}
	}
	// A controller that ends is started again here, too.
	r.exitWith(0)
	<-c.Done()
	r, c, _ = w.connect()
	w.shutdown(r, c, true)
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
	bin := filepath.Join(dir, "keeper.test")
	if err := os.WriteFile(bin, exe, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "-test.run", "TestSpawnAndExit|TestKillTree|TestKeeperKilled|TestManyAtOnce|TestInventory", "-test.v")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), modeVar+"=unprivileged", "TMPDIR="+dir, "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}
