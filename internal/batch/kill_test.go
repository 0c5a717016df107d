package batch

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

const patience = 60 * time.Second

// A run that is killed by SIGKILL at random instants and resumed until all is
// done: each result is there once, in order where it should be; a task whose end
// is in the log is never begun again; no worker outlives the run for long; and
// the next run clears away the killed one's folders.
func TestKill(t *testing.T) {
	for _, x := range []struct {
		name  string
		child childRun
		tasks int
		kills int
	}{
		{"jsonl", childRun{Command: []string{"tee", "-a", "begun"}, Protocol: "jsonl", Size: 3, Results: "results"}, 1000, 6},
		{"jsonl unordered", childRun{Command: []string{"tee", "-a", "begun"}, Protocol: "jsonl", Size: 3, Unordered: true}, 1000, 4},
		// Times of their own, so that many results have to wait in the spool.
		{"exec", childRun{Command: []string{"sh", "-c", `echo $0 >> begun; [ $(($0 % 4)) = 1 ] && sleep 0.02; echo $0`}, Protocol: "exec", Exec: true, Size: 4, Results: "results"}, 100, 6},
		{"exec unordered", childRun{Command: []string{"sh", "-c", `echo $0 >> begun; sleep 0.00$(($0 % 7)); echo $0`}, Protocol: "exec", Exec: true, Size: 4, Unordered: true, Sync: true}, 60, 3},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			testKills(t, x.child, x.tasks, x.kills)
		})
	}
}

func testKills(t *testing.T, c childRun, tasks, kills int) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	c.Log = path("log")
	results := path("results")
	if c.Results != "" {
		c.Results = results
	}
	var in bytes.Buffer
	for i := range tasks {
		fmt.Fprintln(&in, i+1)
	}
	if err := os.WriteFile(path("tasks"), in.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	again, killed := 0, 0
	for round := 0; ; round++ {
		done := loggedTasks(t, c.Log)
		if err := os.Remove(path("begun")); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		size := fileLen(c.Log)
		ended, kill := startChild(t, dir, string(text), results)
		if round < kills {
			// So much more is logged before it is killed; sometimes nothing.
			grow := rand.Int64N(2 * int64(tasks) * 180 / int64(kills+1))
			if round%4 == 3 {
				grow = rand.Int64N(200)
			}
			for deadline := time.Now().Add(patience); fileLen(c.Log) < size+grow; time.Sleep(time.Millisecond) {
				if exited(ended) {
					break
				}
				if time.Now().After(deadline) {
					t.Fatal("the run does not get on")
				}
			}
			kill()
		}
		select {
		case err = <-ended:
		case <-time.After(patience):
			t.Fatal("the run does not end")
		}
		begun := strings.Fields(read(t, path("begun")))
		for _, task := range begun {
			n, err := strconv.ParseInt(task, 10, 64)
			if err == nil && done[n] {
				t.Errorf("round %d: task %d was begun although its end was logged", round, n)
			}
		}
		again += len(begun)
		if err == nil {
			break
		}
		killed++
		if round >= kills {
			t.Fatalf("round %d: %v", round, err)
		}
		noneLeft(t, lastTag(t, c.Log))
	}
	t.Logf("killed %d times; %d tasks were begun %d times", killed, tasks, again)
	got := read(t, results)
	if c.Unordered {
		seen := map[string]int{}
		for _, s := range strings.Fields(got) {
			seen[s]++
		}
		for i := range tasks {
			if n := seen[strconv.Itoa(i+1)]; n != 1 {
				t.Errorf("the result of task %d is there %d times", i+1, n)
			}
		}
		if len(seen) != tasks {
			t.Errorf("%d results", len(seen))
		}
	} else if got != in.String() {
		t.Errorf("results: %d bytes, want %d", len(got), in.Len())
	}
	if n := len(loggedTasks(t, c.Log)); n != tasks {
		t.Errorf("%d tasks are logged", n)
	}
	if _, err := os.Stat(c.Log + ".held"); !os.IsNotExist(err) {
		t.Errorf("the spool: %v", err)
	}
	// Whatever the killed ones left in our cgroup is gone.
	for line := range strings.Lines(read(t, c.Log)) {
		var r record
		if json.Unmarshal([]byte(line), &r) != nil || r.Run == nil {
			continue
		}
		_ = filepath.WalkDir("/sys/fs/cgroup", func(p string, d os.DirEntry, err error) error {
			if err == nil && d.Name() == "remuda."+r.Run.Tag {
				t.Errorf("%s is left", p)
			}
			return nil
		})
	}
}

// startChild starts a run whose standard output is appended to a file.
func startChild(t *testing.T, dir, text, results string) (ended <-chan error, kill func()) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(filepath.Join(dir, "tasks"))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(results, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childVar+"="+text, "GORACE=atexit_sleep_ms=0")
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = dir, in, out, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := make(chan error, 1)
	go func() { c <- cmd.Wait() }()
	return c, func() { _ = cmd.Process.Kill() }
}

// exited reports whether it has ended, and leaves the error for the next.
func exited(ended <-chan error) bool { return len(ended) > 0 }

func fileLen(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(b)
}

// loggedTasks are the tasks whose end is in a whole line of the log.
func loggedTasks(t *testing.T, path string) map[int64]bool {
	t.Helper()
	done := map[int64]bool{}
	for line := range strings.Lines(read(t, path)) {
		var r record
		if strings.HasSuffix(line, "\n") && json.Unmarshal([]byte(line), &r) == nil && r.Seq > 0 {
			done[r.Seq] = true
		}
	}
	return done
}

func lastTag(t *testing.T, path string) string {
	t.Helper()
	tag := ""
	for line := range strings.Lines(read(t, path)) {
		var r record
		if json.Unmarshal([]byte(line), &r) == nil && r.Run != nil {
			tag = r.Run.Tag
		}
	}
	return tag
}

// noneLeft waits until no process of a run is left.
func noneLeft(t *testing.T, tag string) {
	t.Helper()
	if tag == "" {
		return // killed before it had begun
	}
	mark := []byte("REMUDA_RUN=" + tag + "-")
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		left := ""
		files, _ := filepath.Glob("/proc/[0-9]*/environ")
		for _, f := range files {
			// A zombie's is empty. What sh had started may live until the next
			// run begins: sleep does, for milliseconds.
			if b, _ := os.ReadFile(f); bytes.Contains(b, mark) {
				left = f
			}
		}
		if left == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is left of a killed run", left)
		}
	}
}
