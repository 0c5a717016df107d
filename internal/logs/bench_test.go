package logs

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func cpu() time.Duration {
	var ru syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &ru)
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

// BenchmarkBlast takes 500 MB of 100-byte lines written in 64 KiB writes, with
// the default rotation. "cat" is the same by `| cat > file`.
func BenchmarkBlast(b *testing.B) {
	const total = 500_000_000
	size := fmt.Sprintf("LOGS_TEST_BYTES=%d", total)
	b.Run("remuda", func(b *testing.B) {
		for b.Loop() {
			dir := b.TempDir()
			m := newManager(b, Options{Relay: func(Source, uint64) (*os.File, error) {
				r, w := pipe(b)
				w.Close()
				return r, nil
			}})
			r, w, err := os.Pipe()
			if err != nil {
				b.Fatal(err)
			}
			before := cpu()
			c, err := m.Attach(Source{"app", 0, Out}, r, Target{Path: filepath.Join(dir, "x.log"), MaxSize: DefaultMaxSize, Keep: DefaultKeep}, false)
			if err != nil {
				b.Fatal(err)
			}
			cmd := self(b, "blast", size)
			cmd.Stdout = w
			if err := cmd.Start(); err != nil {
				b.Fatal(err)
			}
			w.Close()
			if err := cmd.Wait(); err != nil {
				b.Fatal(err)
			}
			finish(b, c)
			if got := c.Stats().Bytes; got != total {
				b.Fatalf("%d bytes", got)
			}
			b.ReportMetric((cpu() - before).Seconds(), "cpu-s/op")
		}
	})
	b.Run("cat", func(b *testing.B) {
		for b.Loop() {
			dir := b.TempDir()
			cmd := exec.Command("sh", "-c", "/proc/$PPID/exe | cat > "+filepath.Join(dir, "x.log"))
			cmd.Env = append(os.Environ(), "LOGS_TEST_ROLE=blast", size)
			if err := cmd.Run(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
