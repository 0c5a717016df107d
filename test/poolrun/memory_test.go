package poolrun

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/remuda-dev/remuda/test/harness"
)

// An input without end is taken in constant memory.
func TestMemory(t *testing.T) {
	bin, err := harness.Build(t.Context(), t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), bin, "pool", "run", "-n", "2", "-c", "16", "--protocol", "jsonl", "--", "cat")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
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
	task := `"` + strings.Repeat("x", 4000) + `"` + "\n"
	fed := make(chan struct{})
	go func() {
		defer close(fed)
		for {
			if _, err := io.WriteString(in, task); err != nil {
				return
			}
		}
	}()
	results := bufio.NewReaderSize(out, 1<<20)
	resident := func(after int) int { // in MiB
		for range after {
			if line, err := results.ReadString('\n'); line != task {
				t.Fatalf("%.20q, %v", line, err)
			}
		}
		b, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/status")
		if err != nil {
			t.Fatal(err)
		}
		_, s, _ := strings.Cut(string(b), "VmRSS:")
		n, err := strconv.Atoi(strings.Fields(s)[0])
		if err != nil {
			t.Fatal(err)
		}
		return n >> 10
	}
	first, last := resident(2000), resident(10000)
	if last > first+16 {
		t.Errorf("%d MiB after 2,000 tasks of 4 KB, %d MiB after 12,000 (48 MB)", first, last)
	}
	t.Logf("%d MiB, %d MiB", first, last)
	out.Close() // nobody reads on
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 141 {
		t.Errorf("%v", err)
	}
	<-fed
}
