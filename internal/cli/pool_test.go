package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
)

func poolRun(t *testing.T, stdin string, args ...string) outcome {
	t.Helper()
	var out, err bytes.Buffer
	code := Main(context.Background(), Options{
		Args: append([]string{"pool", "run"}, args...), Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &err,
		Environ: []string{"PATH=" + os.Getenv("PATH")}, Cwd: t.TempDir(),
	})
	return outcome{out.String(), err.String(), code}
}

func TestPoolRun(t *testing.T) {
	var in, want strings.Builder
	for i := range 500 {
		fmt.Fprintf(&in, "{\"i\":%d}\n", i)
		fmt.Fprintf(&want, "{\"i\":%d}\n", i)
	}
	o := poolRun(t, in.String(), "-n", "2", "-c", "4", "--protocol", "jsonl", "--", "cat")
	if o.code != 0 || o.out != want.String() || o.err != "" {
		t.Errorf("in order: exit code %d, %d bytes, %q", o.code, len(o.out), o.err)
	}
	o = poolRun(t, in.String(), "-n", "2", "--protocol", "jsonl", "--unordered", "--", "cat")
	if o.code != 0 || strings.Count(o.out, "\n") != 500 || len(o.out) != want.Len() {
		t.Errorf("unordered: exit code %d, %d bytes, %q", o.code, len(o.out), o.err)
	}
	// No newline at the end, an empty line, and what is no JSON.
	o = poolRun(t, "1\n\n2\n3", "-n", "2", "--protocol", "exec", "--", "sh", "-c", `read x; [ $x = 2 ] && { echo no >&2; exit 4; }; echo "<$x>"`)
	lines := strings.Split(o.out, "\n")
	if o.code != ExitFailed || len(lines) != 4 || lines[0] != `"<1>"` || lines[2] != `"<3>"` || !strings.Contains(o.err, "1 of 3 tasks failed") {
		t.Fatalf("exec: exit code %d\n%s\n%s", o.code, o.out, o.err)
	}
	var f struct {
		Error struct{ Kind, Message, Code string }
	}
	if err := json.Unmarshal([]byte(lines[1]), &f); err != nil || f.Error.Kind != "task" || f.Error.Message != "exit code 4: no" || f.Error.Code != "exit" {
		t.Errorf("failure: %s, %v", lines[1], err)
	}
	o = poolRun(t, "1\n", "-n", "1", "--protocol", "jsonl", "--task-timeout", "50ms", "--grace", "50ms", "--", "sleep", "100")
	o.want(t, ExitFailed, `{"error":{"kind":"timeout"`, "1 of 1 task failed")
	o = poolRun(t, "", "--", "cat")
	o.want(t, 0, "", "")
}

func TestPoolRunErrors(t *testing.T) {
	poolRun(t, "").want(t, ExitUsage, "", "needs an argument")
	poolRun(t, "", "--protocol", "telepathy", "--", "cat").want(t, ExitUsage, "", `unknown protocol "telepathy"`)
	poolRun(t, "", "-n", "-1", "--", "cat").want(t, ExitUsage, "", "must not be negative")
	poolRun(t, "", "--", "no-such-program").want(t, ExitFailed, "", "no-such-program")
	poolRun(t, "1\nx\n", "-n", "1", "--protocol", "jsonl", "--", "cat").want(t, ExitFailed, "", "line 2 of standard input is not a JSON value: x")
	poolRun(t, "1\n", "-n", "1", "--", "false").want(t, ExitFailed, `{"error":{"kind":"no_workers"`, "")
}
