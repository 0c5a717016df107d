package keeper

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/proc"
)

// end ends the keeper and all it runs.
func (w *world) end(c *Client) {
	if err := c.Shutdown(context.Background(), true); err != nil {
		w.t.Error(err)
	}
	if err := w.waitExit(); err != nil {
		w.t.Error(err)
	}
}

// BenchmarkSpawn is one spawn of a small program after another, through the
// socket, with a cgroup where there is one.
func BenchmarkSpawn(b *testing.B) {
	w := newWorld(b)
	_, c, _ := w.connect()
	var procs []proc.Process
	i := 0
	for b.Loop() {
		i++
		p, err := c.Spawn(context.Background(), proc.Spec{Key: fmt.Sprint("bench", i), Path: "/bin/sleep", Args: []string{"sleep", "1000"}})
		if err != nil {
			b.Fatal(err)
		}
		procs = append(procs, p)
		if len(procs) == 100 {
			b.StopTimer()
			for _, p := range procs {
				_ = p.KillTree(context.Background())
				<-p.Done()
				_ = p.Release()
			}
			procs = procs[:0]
			b.StartTimer()
		}
	}
	b.StopTimer()
	w.end(c)
}

// BenchmarkKillToNew is the time from a SIGKILL at a program to the pid of its
// successor, with 100 others running: exit noticed, leftovers ended, spawned
// again, forgotten.
func BenchmarkKillToNew(b *testing.B) {
	w := newWorld(b)
	_, c, _ := w.connect()
	ctx := context.Background()
	spawn := func(key string) proc.Process {
		p, err := c.Spawn(ctx, proc.Spec{Key: key, Path: "/bin/sleep", Args: []string{"sleep", "1000"}})
		if err != nil {
			b.Fatal(err)
		}
		return p
	}
	for i := range 100 {
		spawn(fmt.Sprint("other", i))
	}
	p := spawn("bench")
	var notice time.Duration
	for b.Loop() {
		at := time.Now()
		if err := unix.Kill(p.ID().PID, unix.SIGKILL); err != nil {
			b.Fatal(err)
		}
		<-p.Done()
		notice += time.Since(at)
		if err := p.KillTree(ctx); err != nil {
			b.Fatal(err)
		}
		next := spawn("bench")
		_ = p.Release()
		p = next
	}
	b.ReportMetric(float64(notice.Microseconds())/float64(b.N), "µs/exit-to-notice")
	b.StopTimer()
	w.end(c)
}

// BenchmarkMemory tells the keeper's resident memory alone and per process.
func BenchmarkMemory(b *testing.B) {
	w := newWorld(b)
	r, c, _ := w.connect()
	ctx := context.Background()
	rss := func() float64 {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.cmd.Process.Pid))
		if err != nil {
			b.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			var kb float64
			if _, err := fmt.Sscanf(line, "VmRSS: %f", &kb); err == nil {
				return kb
			}
		}
		return 0
	}
	for b.Loop() {
	}
	empty := rss()
	_, in, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	defer in.Close()
	const n = 1000
	label := make([]byte, 1000)
	for i := range n {
		spec := proc.Spec{Key: fmt.Sprint("bench", i), Path: "/bin/sleep", Args: []string{"sleep", "1000"}, Label: label, Keep: map[string]*os.File{"out": in, "err": in}}
		if _, err := c.Spawn(ctx, spec); err != nil {
			b.Fatal(err)
		}
	}
	full := rss()
	r.kill()
	<-c.Done()
	_, c, inv := w.connect()
	inv.close()
	time.Sleep(trimAfter + time.Second)
	b.ReportMetric(empty, "KB-empty")
	b.ReportMetric((full-empty)/n, "KB/process")
	b.ReportMetric((rss()-empty)/n, "KB/process-settled")
	w.end(c)
}
