package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
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
	o = poolRun(t, "1\n\n2\n3", "-n", "2", "-k", "--protocol", "exec", "--", "sh", "-c", `read x; [ $x = 2 ] && { echo no >&2; exit 4; }; echo "<$x>"`)
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
	o = poolRun(t, "1\n", "-n", "1", "--protocol", "jsonl", "--timeout", "50ms", "--grace", "50ms", "--", "sleep", "100")
	o.want(t, ExitFailed, `{"error":{"kind":"timeout"`, "1 of 1 task failed")
	o = poolRun(t, "", "--", "cat")
	o.want(t, 0, "", "")
}

func TestPoolRunErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("precious\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		in, args, want string
		code           int
	}{
		{"", "", "needs an argument", ExitUsage},
		{"", "--protocol telepathy -- cat", `unknown protocol "telepathy"`, ExitUsage},
		{"", "-n -1 -- cat", "--workers -1: must be at least 1", ExitUsage},
		{"", "-n 0 -- cat", "--workers 0: must be at least 1", ExitUsage},
		{"", "-n 5000 -- cat", "1 to 4096", ExitUsage},
		{"", "-c 0 -- cat", "--concurrency 0: must be at least 1", ExitUsage},
		{"", "--retries -1 -- cat", "--retries -1: must be at least 0", ExitUsage},
		{"", "--max-failures 0 -- cat", "--max-failures 0: must be at least 1", ExitUsage},
		{"", "--max-tasks -1 -- cat", "--max-tasks -1", ExitUsage},
		{"", "--timeout -1s -- cat", "--timeout -1s: must be more than 0", ExitUsage},
		{"", "--timeout 0 -- cat", "--timeout 0s: must be more than 0", ExitUsage},
		{"", "--timeout soon -- cat", `invalid argument "soon" for "--timeout"`, ExitUsage},
		{"", "--grace -1s -- cat", "--grace -1s: must not be negative", ExitUsage},
		{"", "--task-timeout 1s -- cat", "did you mean --timeout?", ExitUsage},
		{"", "--exec --protocol jsonl -- cat", "--protocol jsonl does not go with it", ExitUsage},
		{"", "--exec -- {}", "the program itself must be the same for all tasks", ExitUsage},
		{"", "--exec --task x -- cat", "--task names a handler", ExitUsage},
		{"", "-0 -- cat", "--null needs --exec", ExitUsage},
		{"", "--dry-run -- cat", "--dry-run needs --exec", ExitUsage},
		{"", "-k --max-failures 2 -- cat", "contradict each other", ExitUsage},
		{"", "--progress --no-progress -- cat", "contradict each other", ExitUsage},
		{"", "--resume -- cat", "--resume needs --joblog FILE", ExitUsage},
		{"", "--resume-failed -- cat", "--resume needs --joblog FILE", ExitUsage},
		{"", "--fsync -- cat", "--fsync needs --joblog FILE", ExitUsage},
		{"", "-- no-such-program", "no-such-program", ExitFailed},
		{"", "--results /no/such/folder/f -- cat", "cannot open the results: ", ExitFailed},
		{"", "--results /dev/null -- cat", "is not a regular file", ExitFailed},
		{"", "--joblog /no/such/folder/f -- cat", "cannot open the job log: ", ExitFailed},
		{"", "--joblog " + file + " -- cat", "is not a job log of `remuda pool run`: nothing is done to it", ExitFailed},
		{"", "--joblog " + file + " --resume -- cat", "is not a job log of `remuda pool run`: nothing is done to it", ExitFailed},
		{"", "--joblog same --results same -- cat", "the job log and the results are the same file", ExitFailed},
		{"1\n", "-n 1 -- false", "no worker can be started", ExitFailed},
		{"1\n", "-n 1 --exec -- /etc/passwd", "permission denied", ExitFailed},
	} {
		o := poolRun(t, x.in, strings.Fields(x.args)...)
		if o.code != x.code || o.out != "" || !strings.Contains(o.err, x.want) {
			t.Errorf("%q: exit code %d (want %d), %q\n%s(want %q)", x.args, o.code, x.code, o.out, o.err, x.want)
		}
	}
	if b, err := os.ReadFile(file); string(b) != "precious\n" {
		t.Errorf("a file that is no job log: %q, %v", b, err)
	}
	poolRun(t, "1\nx\n2\n", "-n", "1", "--protocol", "jsonl", "--", "cat").want(t, ExitFailed, "1\n"+`{"error":{"kind":"input","message":"line 2 of the input is not a JSON value: x"}}`+"\n", "stopped after the first failure: task 2: line 2 of the input is not a JSON value: x")
	poolRun(t, "1\nx\n2\n", "-n", "1", "-k", "--protocol", "jsonl", "--", "cat").want(t, ExitFailed, "2\n", "1 of 3 tasks failed")
}

// The command line for each line, in the order of the lines, and its output as
// it is.
func TestPoolRunExec(t *testing.T) {
	in := "dir.d/a.b.png\nplain\n\n  blanks; $(here) \n.hidden\n-n\n"
	o := poolRun(t, in, "-n", "3", "--exec", "--", "printf", "%s|", "{}", "{.}", "{/}", "{//}", "{/.}", "x{#}y{}", "{x}", "${}")
	want := "dir.d/a.b.png|dir.d/a.b|a.b.png|dir.d|a.b|x1ydir.d/a.b.png|{x}|$dir.d/a.b.png|" +
		"plain|plain|plain|.|plain|x2yplain|{x}|$plain|" +
		"  blanks; $(here) |  blanks; $(here) |  blanks; $(here) |.|  blanks; $(here) |x3y  blanks; $(here) |{x}|$  blanks; $(here) |" +
		".hidden|.hidden|.hidden|.|.hidden|x4y.hidden|{x}|$.hidden|" +
		"-n|-n|-n|.|-n|x5y-n|{x}|$-n|"
	if o.out != want || o.code != 0 || o.err != "" {
		t.Errorf("exit code %d, %s\n%s\n%s", o.code, o.err, o.out, want)
	}
	// Nothing to fill in: the line is the last argument; standard input is empty.
	o = poolRun(t, "a b\x00c\nd\x00\x00e", "-n", "1", "-0", "--exec", "--", "sh", "-c", `cat; printf '<%s>' "$0"`)
	o.want(t, 0, "<a b><c\nd><e>", "")
	o = poolRun(t, "a b.x\nit's\n", "--exec", "--dry-run", "--", "no-such-program", "{.}", "--to={}", "")
	if o.out != "no-such-program 'a b' '--to=a b.x' ''\nno-such-program 'it'\\''s' '--to=it'\\''s' ''\n" || o.code != 0 {
		t.Errorf("dry run: exit code %d, %s%s", o.code, o.out, o.err)
	}
	// What a program printed that failed comes out too.
	o = poolRun(t, "1\n2\n3\n", "-n", "1", "-k", "--exec", "--", "sh", "-c", `echo $0; [ $0 = 2 ] && { echo why >&2; exit 3; }; true`)
	if o.out != "1\n2\n3\n" || o.code != ExitFailed || !strings.Contains(o.err, "task 2 failed: exit code 3: why: sh -c '") || !strings.Contains(o.err, "1 of 3 tasks failed") {
		t.Errorf("failure: exit code %d, %q, %q", o.code, o.out, o.err)
	}
	o = poolRun(t, "1\n2\n", "--json", "-n", "1", "-k", "--exec", "--", "sh", "-c", `printf '%s\n\377' $0; exit $(($0 - 1))`)
	type record struct {
		Seq      int
		Task     string
		OK       bool
		Stdout   string
		Error    *struct{ Kind, Code, Message string }
		Seconds  float64
		Attempts int
	}
	var r [2]record
	lines := strings.Split(o.out, "\n")
	if len(lines) != 3 || json.Unmarshal([]byte(lines[0]), &r[0]) != nil || json.Unmarshal([]byte(lines[1]), &r[1]) != nil ||
		!r[0].OK || r[0].Stdout != "1\n\ufffd" || r[0].Attempts != 1 || r[0].Seconds <= 0 || r[1].OK || r[1].Seq != 2 || r[1].Error.Code != "exit" {
		t.Errorf("JSON: %s%s", o.out, o.err)
	}
	// An argument that no program can be given.
	o = poolRun(t, strings.Repeat("x", 1<<20)+"\n", "--exec", "--", "true")
	o.want(t, ExitFailed, "", "task 1 failed: ")
}

// Tasks begin in order, whatever ends first, and end in order of the input.
func TestPoolRunOrder(t *testing.T) {
	var in strings.Builder
	for i := range 200 {
		fmt.Fprintln(&in, i)
	}
	began := filepath.Join(t.TempDir(), "began")
	o := poolRun(t, in.String(), "-n", "1", "--unordered", "--exec", "--", "sh", "-c", `echo $0 >> `+began)
	if b, err := os.ReadFile(began); err != nil || string(b) != in.String() || o.code != 0 {
		t.Errorf("begun in this order: %q, %v, exit code %d, %s", b, err, o.code, o.err)
	}
	o = poolRun(t, in.String(), "-n", "4", "--exec", "--", "sh", "-c", `[ $(($0 % 7)) = 0 ] && sleep 0.05; echo $0`)
	if o.out != in.String() || o.code != 0 {
		t.Errorf("exit code %d, %q", o.code, o.out)
	}
}

func TestPoolRunFailures(t *testing.T) {
	var in strings.Builder
	for i := range 1000 {
		fmt.Fprintln(&in, i+1)
	}
	dir := t.TempDir()
	script := `echo $0 >> ` + dir + `/begun; [ $(($0 % 5)) = 0 ] && exit 9; echo $0`
	o := poolRun(t, in.String(), "-n", "1", "--exec", "--", "sh", "-c", script)
	o.want(t, ExitFailed, "1\n2\n3\n4\n", "stopped after the first failure: task 5: exit code 9")
	// A task may have been on its way to the worker.
	if b, err := os.ReadFile(dir + "/begun"); err != nil || strings.Count(string(b), "\n") > 6 {
		t.Errorf("begun: %q, %v", b, err)
	}
	o = poolRun(t, in.String(), "-n", "1", "--max-failures", "3", "--exec", "--", "sh", "-c", script)
	o.want(t, ExitFailed, "14\n", "stopped after 3 failures; the first was: task 5: exit code 9")
	// Whatever a task has failed of, it is tried again.
	o = poolRun(t, "1\n", "-n", "1", "--retries", "2", "--exec", "--", "sh", "-c", `echo x >> `+dir+`/tries; [ $(wc -l < `+dir+`/tries) = 3 ] && echo third`)
	o.want(t, 0, "third\n", "")
	o = poolRun(t, "1\n", "-n", "1", "--timeout", "30s", "--retries", "1", "--exec", "--", "sh", "-c", `echo x >> `+dir+`/more; exit 1`)
	o.want(t, ExitFailed, "", "1 of 1 task failed")
	if b, _ := os.ReadFile(dir + "/more"); string(b) != "x\nx\n" {
		t.Errorf("tried %q", b)
	}
}
