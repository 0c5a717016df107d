package logs

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// torrent is the log of a program that writes as fast as it can.
const torrent = "torrent"

// TestKill kills the process that captures, over and over, at random moments,
// while numbered lines are written; not one may be missing, twice, or torn.
func TestKill(t *testing.T) {
	const rounds = 60
	dir := t.TempDir()
	var targets []Target
	for _, tc := range []struct {
		t       Target
		sources int // of the one file
	}{
		{Target{Path: "plain", MaxSize: 40 << 10}, 1},
		{Target{Path: "plain-gzip", MaxSize: 100 << 10, Compress: CompressGzip}, 1},
		{Target{Path: torrent, MaxSize: 4 << 20}, 1},
		{Target{Path: "merged", MaxSize: 40 << 10, Shared: true}, 3},
		{Target{Path: "merged-unannounced", MaxSize: 40 << 10}, 2},
		{Target{Path: "time", MaxSize: 40 << 10, TimeFormat: time.RFC3339}, 1},
		{Target{Path: "json-zstd", MaxSize: 100 << 10, JSON: true, Compress: CompressZstd}, 2},
	} {
		tc.t.Path, tc.t.Keep = filepath.Join(dir, tc.t.Path+".log"), 1<<20
		for range tc.sources {
			targets = append(targets, tc.t)
		}
	}
	var reads, relays, stops []*os.File
	var writers []*exec.Cmd
	for i := range targets {
		r, w := pipe(t)
		reads = append(reads, r)
		y, _ := pipe(t)
		relays = append(relays, y)
		cmd := self(t, "numbers", fmt.Sprintf("LOGS_TEST_ID=w%d", i))
		if strings.HasPrefix(filepath.Base(targets[i].Path), torrent) {
			cmd.Env = append(cmd.Env, "LOGS_TEST_HASTE=300000")
		}
		cmd.Stdout = w
		in, stop := pipe(t)
		cmd.Stdin = in
		stops = append(stops, stop)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		w.Close()
		in.Close()
		writers = append(writers, cmd)
	}
	js, err := json.Marshal(targets)
	if err != nil {
		t.Fatal(err)
	}
	for i := range rounds {
		adopted := "1"
		if i == 0 {
			adopted = "0"
		}
		c := self(t, "controller", "LOGS_TEST_TARGETS="+string(js), "LOGS_TEST_ADOPTED="+adopted)
		c.ExtraFiles = slices.Concat(reads, relays)
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Fatalf("controller: %q %v", line, err)
		}
		time.Sleep(time.Duration(rand.IntN(12_000)) * time.Microsecond)
		_ = c.Process.Kill()
		_ = c.Wait()
		in.Close()
	}
	// The last manager is ours.
	m := newManager(t, Options{})
	var cs []*Capture
	for i, r := range reads {
		c, err := m.Adopt(Source{"app", i, Out}, r, relays[i], targets[i])
		if err != nil {
			t.Fatal(err)
		}
		cs = append(cs, c)
	}
	m.Settle()
	for _, f := range stops {
		f.Close()
	}
	for _, w := range writers {
		if err := w.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	finish(t, cs...)

	q := Query{Lines: -1}
	for i, tg := range targets {
		q.Files = append(q.Files, QueryFile{Source{"app", i, Out}, tg.Path, tg.JSON, tg.TimeFormat})
	}
	next := make([]int, len(targets))
	ended := make([]bool, len(targets))
	for _, r := range all(t, q) {
		id, rest, _ := strings.Cut(r.Text, " ")
		n, err := strconv.Atoi(strings.TrimPrefix(id, "w"))
		if err != nil || n >= len(targets) || r.Cut || targets[r.Source.ID].Path != targets[n].Path {
			t.Fatalf("torn line %q of %v", r.Text, r.Source)
		}
		name := filepath.Base(targets[n].Path)
		if targets[n].JSON && r.Source.ID != n {
			t.Fatalf("%s: line %q ascribed to %v", name, r.Text, r.Source)
		}
		if rest == fmt.Sprintf("end %d", next[n]) && !ended[n] {
			ended[n] = true
			continue
		}
		if want := fmt.Sprintf("%d %s", next[n], strings.Repeat("x", next[n]%97)); rest != want || ended[n] {
			t.Fatalf("%s: got %q, want %q", name, rest, want)
		}
		next[n]++
	}
	t.Logf("lines of each source: %v", next)
	for n, ok := range ended {
		name := filepath.Base(targets[n].Path)
		if !ok {
			t.Errorf("%s: no end of source %d after %d lines", name, n, next[n])
		}
		if next[n] < 500 {
			t.Errorf("%s: source %d wrote only %d lines", name, n, next[n])
		}
		if rot, err := namesOf(targets[n].Path).list(); err != nil || len(rot) < 1 {
			t.Errorf("%s: %d rotations, %v", name, len(rot), err)
		}
	}
	for _, p := range stateLeft(t, dir) {
		if !strings.HasSuffix(p, ".pack") {
			t.Errorf("left behind: %s", p)
		}
	}
}
