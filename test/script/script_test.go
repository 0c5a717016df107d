// Package script drives the program as a user does: each testscript file is a
// person at a shell with a home of their own, against real processes.
package script

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/test/harness"
)

func TestScripts(t *testing.T) {
	// Short, as a socket's path may have 107 bytes, and open to everybody, as
	// some commands run as another user.
	root, err := os.MkdirTemp("", "rs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	binDir := filepath.Join(root, "bin")
	if err := os.Mkdir(binDir, 0o755); err != nil {
		t.Fatal(err)
	}
	built, err := harness.Build(t.Context(), binDir, raceEnabled)
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(binDir, "remuda")
	if built != bin {
		if err := os.Symlink(built, bin); err != nil {
			t.Fatal(err)
		}
	}
	var wrong trouble
	t.Cleanup(func() {
		for _, w := range wrong.list {
			t.Error(w)
		}
	})
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		WorkdirRoot:         root,
		RequireUniqueNames:  true,
		RequireExplicitExec: true,
		ContinueOnError:     true,
		Setup: func(env *testscript.Env) error {
			if err := os.Chmod(env.WorkDir, 0o755); err != nil {
				return err
			}
			h := &harness.Home{Dir: env.WorkDir, Home: filepath.Join(env.WorkDir, "h"), Bin: bin, Env: []string{"GORACE=" + noPause}}
			env.Setenv("PATH", binDir+":"+os.Getenv("PATH"))
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("REMUDA_HOME", h.Home)
			env.Setenv("NO_COLOR", "1")
			env.Setenv("LANG", "C.UTF-8")
			env.Setenv("ROOT", harness.Root())
			env.Setenv("GORACE", noPause)
			env.Values["home"] = h
			env.Defer(func() {
				name := filepath.Base(env.WorkDir)
				log, _ := os.ReadFile(filepath.Join(h.Home, "logs", "daemon.log"))
				if err := h.Close(); err != nil {
					wrong.add(fmt.Sprintf("%s: %v\ndaemon.log: %s", name, err, last(log, 2000)))
				}
				for _, bad := range []string{"DATA RACE", "panic:", "goroutine 1 ["} {
					if strings.Contains(string(log), bad) {
						wrong.add(fmt.Sprintf("%s: daemon.log: %s", name, last(log, 8000)))
						break
					}
				}
			})
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond == "superuser" {
				return os.Getuid() == 0, nil
			}
			return false, fmt.Errorf("no condition is called %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code":      code,
			"waitfor":   waitFor,
			"waitstate": waitState,
			"jq":        jq,
			"nobody":    nobody,
			"api":       api,
			"hangup":    hangUp,
			"alive":     alive,
			"bigname":   bigName,
			"listen":    listen,
			"freeport":  freePort,
			"sigkill":   sigKill,
		},
	})
}

// noPause keeps a program with the race detector from waiting for a second
// before it ends.
const noPause = "atexit_sleep_ms=0"

func last(b []byte, n int) string { return string(b[max(0, len(b)-n):]) }

// trouble collects what went wrong when scripts were taken down.
type trouble struct {
	mu   sync.Mutex
	list []string
}

func (t *trouble) add(s string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.list = append(t.list, s)
}

func home(ts *testscript.TestScript) *harness.Home { return ts.Value("home").(*harness.Home) }

func execute(ts *testscript.TestScript, args []string) int {
	err := ts.Exec(args[0], args[1:]...)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	ts.Fatalf("%s: %v", args[0], err)
	return -1
}

// code N COMMAND…: the command exits with N.
func code(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	if got := execute(ts, args[1:]); got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// waitfor DURATION PATTERN COMMAND…: what the command prints matches in time;
// with "!": no longer matches.
func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 3 {
		ts.Fatalf("usage: waitfor DURATION PATTERN COMMAND...")
	}
	d, err := time.ParseDuration(args[0])
	ts.Check(err)
	re, err := regexp.Compile("(?m)" + args[1])
	ts.Check(err)
	var out string
	err = harness.Eventually(d, func() error {
		execute(ts, args[2:])
		out = ts.ReadFile("stdout") + ts.ReadFile("stderr")
		if re.MatchString(out) == neg {
			return errors.New("no match")
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("within %v: %q (wanted: %v) in %s", d, args[1], !neg, out)
	}
}

// waitstate DURATION TARGET STATE COUNT: so many instances of the target are
// in the state, and no others exist.
func waitState(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 4 {
		ts.Fatalf("usage: waitstate DURATION TARGET STATE COUNT")
	}
	d, err := time.ParseDuration(args[0])
	ts.Check(err)
	want, err := strconv.Atoi(args[3])
	ts.Check(err)
	h := home(ts)
	c := client.New(h.Home)
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), d+20*time.Second)
	defer cancel()
	if err := harness.Eventually(d, func() error {
		list, err := c.List(ctx, args[1])
		if err != nil {
			return err
		}
		n := 0
		for _, i := range list {
			if string(i.State) == args[2] {
				n++
			}
		}
		if n != want || len(list) != want {
			return fmt.Errorf("%d of %d instances of %s are %s, want %d: %+v", n, len(list), args[1], args[2], want, list)
		}
		return nil
	}); err != nil {
		ts.Fatalf("%v", err)
	}
}

// jq FILE PATH VALUE: a value of a JSON document. PATH has steps divided by
// "/": a key, an index, key=value for the element of a list that has it, "#"
// for the length. VALUE is a regular expression that matches all of it.
func jq(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 3 {
		ts.Fatalf("usage: jq FILE PATH VALUE")
	}
	var doc any
	if err := json.Unmarshal([]byte(ts.ReadFile(args[0])), &doc); err != nil {
		ts.Fatalf("%s is not JSON: %v", args[0], err)
	}
	for _, step := range strings.Split(args[1], "/") {
		doc = descend(doc, step)
	}
	got, ok := doc.(string)
	if !ok {
		b, err := json.Marshal(doc)
		ts.Check(err)
		got = string(b)
	}
	re, err := regexp.Compile("^(?:" + args[2] + ")$")
	ts.Check(err)
	if re.MatchString(got) == neg {
		ts.Fatalf("%s: %s, want %s", args[1], got, args[2])
	}
}

func descend(doc any, step string) any {
	switch v := doc.(type) {
	case map[string]any:
		if step == "#" {
			return len(v)
		}
		return v[step]
	case []any:
		if step == "#" {
			return len(v)
		}
		if n, err := strconv.Atoi(step); err == nil && n < len(v) {
			return v[n]
		}
		if key, val, ok := strings.Cut(step, "="); ok {
			for _, e := range v {
				if m, ok := e.(map[string]any); ok && fmt.Sprint(m[key]) == val {
					return e
				}
			}
		}
	}
	return nil
}

// nobody N COMMAND…: as code, as an ordinary user.
func nobody(ts *testscript.TestScript, neg bool, args []string) {
	if os.Getuid() == 0 {
		args = append([]string{args[0], "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}, args[1:]...)
	}
	code(ts, neg, args)
}

// api VERSION METHOD PATH [BODY]: a bare HTTP request over the socket by a
// client of that version; status and body go to the file "answer".
func api(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: api VERSION METHOD PATH [BODY]")
	}
	body := ""
	if len(args) > 3 {
		body = args[3]
	}
	conn, err := net.Dial("unix", client.SocketPath(home(ts).Home))
	ts.Check(err)
	defer conn.Close()
	ts.Check(conn.SetDeadline(time.Now().Add(20 * time.Second)))
	_, err = fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: remuda\r\nConnection: close\r\n%s: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		args[1], args[2], client.HeaderAPI, args[0], len(body), body)
	ts.Check(err)
	b, err := io.ReadAll(conn)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs("answer"), b, 0o644))
}

// hangup TIMES PATH: asks for a stream, reads a little and hangs up.
func hangUp(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: hangup TIMES PATH")
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	for i := range n {
		conn, err := net.Dial("unix", client.SocketPath(home(ts).Home))
		ts.Check(err)
		ts.Check(conn.SetDeadline(time.Now().Add(20 * time.Second)))
		_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: remuda\r\n%s: %d\r\n\r\n", args[1], client.HeaderAPI, client.API)
		ts.Check(err)
		if i%3 > 0 { // every third does not even wait for an answer
			_, err = bufio.NewReader(conn).ReadString('\n')
			ts.Check(err)
		}
		conn.Close()
	}
}

// alive FILE: all pids in the file are live processes; with "!" none is.
func alive(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: alive FILE")
	}
	pids := strings.Fields(ts.ReadFile(args[0]))
	if len(pids) == 0 {
		ts.Fatalf("no pid in %s", args[0])
	}
	for _, s := range pids {
		pid, err := strconv.Atoi(s)
		ts.Check(err)
		p, ok := harness.Stat(pid)
		if (ok && p.State != 'Z') == neg {
			ts.Fatalf("pid %d alive: %v", pid, neg)
		}
	}
}

// bigname VARIABLE N: N characters.
func bigName(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	ts.Setenv(args[0], strings.Repeat("n", n))
}

// listen VARIABLE: a port of 127.0.0.1 that is taken until the script ends.
func listen(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { l.Close() })
	ts.Setenv(args[0], strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
}

// freeport VARIABLE: a port of 127.0.0.1 that was free a moment ago.
func freePort(ts *testscript.TestScript, _ bool, args []string) {
	port, err := harness.FreePort()
	ts.Check(err)
	ts.Setenv(args[0], port)
}

// sigkill controller|keeper: kills it and, for the controller, waits for the
// next.
func sigKill(ts *testscript.TestScript, _ bool, args []string) {
	c := client.New(home(ts).Home)
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	info, err := c.Info(ctx)
	ts.Check(err)
	pid := info.PID
	if args[0] == "keeper" {
		pid = info.KeeperPID
	}
	ts.Check(syscall.Kill(pid, syscall.SIGKILL))
	if args[0] == "keeper" {
		return
	}
	ts.Check(harness.Eventually(10*time.Second, func() error {
		now, err := c.Info(ctx)
		if err == nil && now.PID == pid {
			err = errors.New("still the old controller")
		}
		return err
	}))
}
