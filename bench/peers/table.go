package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/remuda-dev/remuda/test/harness"
)

// row is one thing that is measured. bound is the most that ours may be, 0 for
// none.
type row struct {
	id, title, unit string
	bound           float64
}

func rows() []row {
	return []row{
		{"kill", "kill -9 → new process, 100 programs", "ms", 5},
		{"start100", "start 100 programs, one command, one file", "ms", 350},
		{"start-i", "start 100 instances of one program", "ms", 0},
		{"list100", "list of 100, whole command", "ms", 20},
		{"rss0", "RSS of the daemon, no program", "MB", 22},
		{"pss0", "PSS of the daemon, no program", "MB", 0},
		{"rss100", "RSS of the daemon, 100 programs", "MB", 28},
		{"pss100", "PSS of the daemon, 100 programs", "MB", 0},
		{"idle", "CPU in 60 s idle, 100 programs", "s", 0.1},
		{"logwall", "500 MB of log lines, wall", "ms", 0},
		{"cat", "the same through cat > file", "ms", 0},
		{"logratio", "wall ÷ cat", "×", 1.15},
		{"logcpu", "500 MB of log lines, CPU of the daemon", "s", 0.6},
		{"start1000", "start 1,000 programs", "ms", 0},
		{"list1000", "list of 1,000", "ms", 0},
		{"restart1000", "restart all 1,000", "ms", 0},
		{"stop1000", "stop all 1,000", "ms", 0},
		{"rss1000", "RSS of the daemon, 1,000 programs", "MB", 60},
		{"pss1000", "PSS of the daemon, 1,000 programs", "MB", 0},
		{"idle1000", "CPU in 60 s idle, 1,000 programs", "s", 0},
	}
}

// table collects samples by row and peer.
type table struct {
	peers   []string
	samples map[string][]float64
}

func (t *table) add(id, peer string, v ...float64) {
	if t.samples == nil {
		t.samples = map[string][]float64{}
	}
	t.samples[id+"/"+peer] = append(t.samples[id+"/"+peer], v...)
}

func number(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

// print writes the table as Markdown: medians, smallest and largest in
// brackets, how many times ours a peer's is, and the bound.
func (t *table) print() error {
	fmt.Print("| measurement |")
	for _, p := range t.peers {
		fmt.Printf(" %s |", p)
	}
	for _, p := range t.peers[1:] {
		fmt.Printf(" %s ÷ ours |", p)
	}
	fmt.Print(" bound | |\n|---|" + strings.Repeat("---:|", len(t.peers)*2-1) + "---:|---|\n")
	missed := 0
	for _, r := range rows() {
		ours := t.samples[r.id+"/"+t.peers[0]]
		if len(ours) == 0 {
			continue
		}
		fmt.Printf("| %s, %s |", r.title, r.unit)
		for _, p := range t.peers {
			v := t.samples[r.id+"/"+p]
			switch {
			case len(v) == 0:
				fmt.Print(" – |")
			case len(v) == 1:
				fmt.Printf(" %s |", number(v[0]))
			default:
				fmt.Printf(" **%s** (%s–%s, n=%d) |", number(harness.Median(v)), number(harness.Quantile(v, 0)), number(harness.Quantile(v, 1)), len(v))
			}
		}
		for _, p := range t.peers[1:] {
			v := t.samples[r.id+"/"+p]
			if o := harness.Median(ours); len(v) == 0 || o == 0 {
				fmt.Print(" – |")
			} else {
				fmt.Printf(" %s |", number(harness.Median(v)/o))
			}
		}
		verdict, bound := "", ""
		if r.bound > 0 {
			bound, verdict = "≤ "+strconv.FormatFloat(r.bound, 'g', -1, 64), "PASS"
			if harness.Median(ours) > r.bound {
				verdict = "MISS"
				missed++
			}
		}
		fmt.Printf(" %s | %s |\n", bound, verdict)
	}
	fmt.Printf("\n%d bounds missed\n", missed)
	return nil
}

const lastLine = "THE LAST LINE\n"

// write is the program whose output is logged: MB of 100-byte lines in writes
// of 64 KiB, once the file gate is there ("-": at once), and a last line.
func write(args []string) int {
	if len(args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: write MB GATE")
		return 2
	}
	mb, err := strconv.Atoi(args[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	for args[1] != "-" {
		if _, err := os.Stat(args[1]); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	line := strings.Repeat("0123456789", 9) + "abcdefghi\n"
	// Whole writes of 64 KiB out of a text of 100-byte lines.
	text := []byte(strings.Repeat(line, 64<<10/4)) // 16384 lines: 25 writes
	for left := mb * 1000 * 1000; left > 0; {
		at := (mb*1000*1000 - left) % len(text)
		n := min(64<<10, left, len(text)-at)
		if _, err := os.Stdout.Write(text[at : at+n]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		left -= n
	}
	if _, err := os.Stdout.WriteString(lastLine); err != nil {
		return 1
	}
	return 0
}
