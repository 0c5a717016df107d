package proc

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The leaders of a process that is killed end with it, and what they have
// started with the next sweep; a process that lives keeps its runs.
func TestSweepDead(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	start := func() (cmd *exec.Cmd, tag string, pids []int) {
		cmd = exec.Command(exe)
		cmd.Env = append(os.Environ(), modeVar+"=owner", "GORACE=atexit_sleep_ms=0")
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		in := bufio.NewScanner(out)
		for len(pids) < 3 && in.Scan() {
			if pid, err := strconv.Atoi(in.Text()); err == nil {
				pids = append(pids, pid)
			} else {
				tag = in.Text()
			}
		}
		if len(pids) != 3 || !ValidTag(tag) {
			t.Fatalf("tag %q, pids %v, %v", tag, pids, in.Err())
		}
		return cmd, tag, pids
	}
	first, dead, lost := start()
	_, live, kept := start()
	t.Cleanup(func() {
		if n, err := Sweep(testContext(t), live); n != 3 || err != nil {
			t.Errorf("the live one's runs: %d, %v", n, err)
		}
	})
	leader := 0
	for _, pid := range lost {
		if st, err := readStat(pid); err == nil && st.ppid == first.Process.Pid {
			leader = pid
		}
	}
	if n, err := SweepDead(testContext(t), "ptesto"); n != 0 || err != nil || leader == 0 {
		t.Fatalf("swept %d while all live: %v; leader %d", n, err, leader)
	}
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		st, err := readStat(leader)
		if err != nil || !st.live() {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the leader lives although its parent was killed")
		}
	}
	if n, err := SweepDead(testContext(t), "ptesto"); n != 2 || err != nil {
		t.Errorf("swept %d: %v", n, err)
	}
	checkGone(t, lost)
	for _, pid := range kept {
		if st, err := readStat(pid); err != nil || !st.live() {
			t.Errorf("pid %d of the live one: %+v, %v", pid, st, err)
		}
	}
	if v2, _ := findHierarchies(); v2.own != "" {
		if _, err := os.Stat(v2.own + "/" + treeDirName(dead)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("its folder: %v", err)
		}
	}
}

func TestOwnerDead(t *testing.T) {
	own := OwnedTag("pool")
	if !ValidTag(own) || OwnerDead(own, "pool") {
		t.Errorf("%q", own)
	}
	ns := strconv.FormatUint(pidNamespace(), 36)
	for tag, want := range map[string]bool{
		"pool" + strconv.Itoa(os.Getpid()) + ".1." + ns + ".x": true, // the pid is another's now
		"pool4194305.1." + ns + ".x":                           true,
		"pool4194305.1." + ns + "z.x":                          false, // pids of another namespace
		"pool4194305.1." + ns:                                  false,
		"pool4194305.0." + ns + ".x":                           false,
		"pool-1.1." + ns + ".x":                                false,
		"pool1.!." + ns + ".x":                                 false,
		"tool4194305.1." + ns + ".x":                           false,
		"pool":                                                 false, "": false,
	} {
		if got := OwnerDead(tag, "pool"); got != want {
			t.Errorf("%q: %v", tag, got)
		}
	}
	// A thread that ends takes its children with it; the one that forks must not.
	d := newDirect(t)
	d.DieWithParent = true
	for range 3 {
		if _, exit := output(t, d, sh("owned", "sleep 0.05; exit 0")); !exit.Ok() {
			t.Error(exit)
		}
	}
	umask := 0o27
	spec := sh("thread", "sleep 0.05; exit 0")
	spec.Umask = &umask
	p := spawn(t, d, spec)
	if exit := wait(t, p); exit.Signal == unix.SIGKILL {
		t.Error(exit)
	}
}
