package logs

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The test binary is also the programs under test.
func TestMain(m *testing.M) {
	switch os.Getenv("LOGS_TEST_ROLE") {
	case "controller":
		controllerMain()
		return
	case "numbers":
		numbersMain()
		return
	case "blast":
		blastMain()
		return
	}
	goleak.VerifyTestMain(m)
}

// controllerMain attaches the pipes it inherits (3, 4, …, then their relays) as
// adopted ones and captures until it is killed.
func controllerMain() {
	var t []Target
	if err := json.Unmarshal([]byte(os.Getenv("LOGS_TEST_TARGETS")), &t); err != nil {
		panic(err)
	}
	relay := func(src Source, _ uint64) (*os.File, error) {
		fd, err := unix.FcntlInt(uintptr(3+len(t)+src.ID), unix.F_DUPFD_CLOEXEC, 0)
		return os.NewFile(uintptr(fd), "relay"), err
	}
	m, err := New(Options{Relay: relay})
	if err != nil {
		panic(err)
	}
	m.relayAfter = 1
	for i := range t {
		src, pipe := Source{"app", i, Out}, os.NewFile(uintptr(3+i), "pipe")
		if os.Getenv("LOGS_TEST_ADOPTED") == "1" {
			y, rerr := relay(src, 0)
			if rerr != nil {
				panic(rerr)
			}
			_, err = m.Adopt(src, pipe, y, t[i])
		} else {
			_, err = m.Attach(src, pipe, t[i], false)
		}
		if err != nil {
			panic(err)
		}
	}
	m.Settle()
	fmt.Println("up")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// numbersMain writes numbered lines in ragged pieces until its input ends.
func numbersMain() {
	done := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); close(done) }()
	id := os.Getenv("LOGS_TEST_ID")
	haste, _ := strconv.Atoi(os.Getenv("LOGS_TEST_HASTE")) // so many lines without a pause
	w := bufio.NewWriterSize(os.Stdout, 4096)
	for n := 0; ; n++ {
		select {
		case <-done:
			fmt.Fprintf(w, "%s end %d", id, n)
			_ = w.Flush()
			return
		default:
		}
		fmt.Fprintf(w, "%s %d %s\n", id, n, strings.Repeat("x", n%97))
		if n%50 == 49 && n >= haste {
			_ = w.Flush()
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// blastMain writes LOGS_TEST_BYTES of 100-byte lines in writes of 64 KiB.
func blastMain() {
	total, _ := strconv.Atoi(os.Getenv("LOGS_TEST_BYTES"))
	b := []byte(strings.Repeat(strings.Repeat("y", 99)+"\n", 656))[:65536]
	for total > 0 {
		n, err := os.Stdout.Write(b[:min(total, len(b))])
		if err != nil {
			os.Exit(1)
		}
		total -= n
	}
}

func self(t testing.TB, role string, env ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), append(env, "LOGS_TEST_ROLE="+role)...)
	cmd.Stderr = os.Stderr
	return cmd
}

func newManager(t testing.TB, o Options) *Manager {
	t.Helper()
	t.TempDir() // so that it is removed after the manager is closed
	m, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := m.Close(ctx); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return m
}

func pipe(t testing.TB) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func attach(t testing.TB, m *Manager, src Source, tg Target) (*Capture, *os.File) {
	t.Helper()
	r, w := pipe(t)
	c, err := m.Attach(src, r, tg, false)
	if err != nil {
		t.Fatal(err)
	}
	return c, w
}

func finish(t testing.TB, cs ...*Capture) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, c := range cs {
		if err := c.Finish(ctx); err != nil {
			t.Fatalf("finish: %v", err)
		}
	}
}

func say(t testing.TB, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

func content(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// all reads a log with its rotated files.
func all(t testing.TB, q Query) []Record {
	t.Helper()
	var out []Record
	for r, err := range Read(context.Background(), q) {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, r)
	}
	return out
}

func texts(rs []Record) []string {
	var out []string
	for _, r := range rs {
		out = append(out, r.Text)
	}
	return out
}

func fileQuery(path string) Query {
	return Query{Files: []QueryFile{{Source: Source{"app", 0, Out}, Path: path}}, Lines: -1}
}

// stateLeft lists what the writer left beside the logs.
func stateLeft(t testing.TB, dir string) []string {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(dir, stateDir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, p := range left {
		if !strings.HasSuffix(p, ".idx") {
			out = append(out, p)
		}
	}
	return out
}
