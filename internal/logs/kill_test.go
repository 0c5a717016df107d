package logs

import (
	"bufio"
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

// TestKill kills the process that captures, over and over, at random moments,
// while numbered lines are written; not one may be missing, twice, or torn.
func TestKill(t *testing.T) {
	const rounds = 50
	for _, tc := range []struct {
		name    string
		t       Target
		sources int
		paths   int // sources are spread over so many files
	}{
		{"plain", Target{MaxSize: 40 << 10, Keep: 1 << 20}, 1, 1},
		{"plain-gzip", Target{MaxSize: 100 << 10, Keep: 1 << 20, Compress: CompressGzip}, 2, 2},
		{"merged", Target{MaxSize: 40 << 10, Keep: 1 << 20, Shared: true}, 3, 1},
		{"merged-unannounced", Target{MaxSize: 40 << 10, Keep: 1 << 20}, 2, 1},
		{"time", Target{MaxSize: 40 << 10, Keep: 1 << 20, TimeFormat: time.RFC3339}, 1, 1},
		{"json-zstd", Target{MaxSize: 100 << 10, Keep: 1 << 20, JSON: true, Compress: CompressZstd}, 2, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			var targets []Target
			var reads, stops []*os.File
			var writers []*exec.Cmd
			for i := range tc.sources {
				tg := tc.t
				tg.Path = filepath.Join(dir, fmt.Sprintf("app-%d.log", i%tc.paths))
				targets = append(targets, tg)
				r, w := pipe(t)
				reads = append(reads, r)
				cmd := self(t, "numbers", fmt.Sprintf("LOGS_TEST_ID=w%d", i))
				cmd.Stdout = w
				in, err := cmd.StdinPipe()
				if err != nil {
					t.Fatal(err)
				}
				if f, ok := in.(*os.File); ok {
					stops = append(stops, f)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = cmd.Process.Kill() })
				w.Close()
				writers = append(writers, cmd)
			}
			began := time.Now()
			phase := func(what string) { t.Logf("%s after %v", what, time.Since(began)) }
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
				c.ExtraFiles = reads
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
			phase("killed")
			// The last manager is ours.
			m := newManager(t, Options{})
			var cs []*Capture
			for i, r := range reads {
				c, err := m.Attach(Source{"app", i, Out}, r, targets[i], true)
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
			phase("written")
			finish(t, cs...)
			phase("finished")

			q := Query{Lines: -1}
			for i, tg := range targets {
				q.Files = append(q.Files, QueryFile{Source{"app", i, Out}, tg.Path, tg.JSON, tg.TimeFormat})
			}
			next := make([]int, tc.sources)
			ended := make([]bool, tc.sources)
			for _, r := range all(t, q) {
				id, rest, _ := strings.Cut(r.Text, " ")
				n, err := strconv.Atoi(strings.TrimPrefix(id, "w"))
				if err != nil || n >= tc.sources || r.Cut {
					t.Fatalf("torn line %q", r.Text)
				}
				if tg := targets[n]; tg.JSON && r.Source.ID != n {
					t.Fatalf("line %q ascribed to %v", r.Text, r.Source)
				}
				want := fmt.Sprintf("%d %s", next[n], strings.Repeat("x", next[n]%97))
				if rest == fmt.Sprintf("end %d", next[n]) {
					ended[n] = true
					continue
				}
				if rest != want || ended[n] {
					t.Fatalf("source %d: got %q, want %q", n, rest, want)
				}
				next[n]++
			}
			for n, ok := range ended {
				if !ok {
					t.Errorf("source %d: no end after %d lines", n, next[n])
				}
				if next[n] < 500 {
					t.Errorf("source %d wrote only %d lines", n, next[n])
				}
			}
			phase("read")
			rot, _ := namesOf(targets[0].Path).list()
			t.Logf("%v lines, %d rotated files", next, len(rot))
			if len(rot) < 2 {
				t.Errorf("only %d rotations", len(rot))
			}
			for _, p := range stateLeft(t, dir) {
				if !strings.HasSuffix(p, ".pack") {
					t.Errorf("left behind: %s", p)
				}
			}
		})
	}
}
