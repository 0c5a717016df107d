package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/remuda-dev/remuda/client"
)

// TestMain lets the test binary play the daemon that cannot start: commands
// launch their own executable.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "keeper" {
		fmt.Println("this keeper refuses to run")
		os.Exit(7)
	}
	goleak.VerifyTestMain(m)
}

// fake is a daemon that knows instances and answers as it is told.
type fake struct {
	t    *testing.T
	home string

	mu        sync.Mutex
	instances []client.Instance
	details   []client.Detail
	requests  []request
	override  map[string]http.HandlerFunc // by path
	result    client.ActResult
	changes   []client.Change
	info      client.Info
}

type request struct {
	path  string
	query map[string][]string
	body  string
}

// newFake serves until the test ends.
func newFake(t *testing.T, instances ...client.Instance) *fake {
	t.Helper()
	f := &fake{t: t, home: newHome(t), instances: instances, override: map[string]http.HandlerFunc{},
		info: client.Info{Version: "1.2.3", API: client.API, PID: os.Getpid(), KeeperPID: os.Getpid(), Instances: len(instances), Started: time.Now(), Cgroup: "v2"}}
	f.serve()
	return f
}

// newHome is a folder whose name is short enough for a socket.
func newHome(t *testing.T) string {
	t.Helper()
	home, err := os.MkdirTemp("", "rm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	return home
}

func (f *fake) serve() {
	l, err := net.Listen("unix", client.SocketPath(f.home))
	if err != nil {
		f.t.Fatal(err)
	}
	if err := os.Chmod(client.SocketPath(f.home), 0o600); err != nil {
		f.t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(f.handle), ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	f.t.Cleanup(func() { _ = srv.Close(); <-done })
}

func (f *fake) on(path string, h http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.override[path] = h
}

// seen are the requests of one path.
func (f *fake) seen(path string) []request {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []request
	for _, r := range f.requests {
		if r.path == path {
			out = append(out, r)
		}
	}
	return out
}

func problem(w http.ResponseWriter, status int, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"title": "x", "status": status, "detail": detail})
}

func (f *fake) match(targets []string) []client.Instance {
	if len(targets) == 0 {
		return f.instances
	}
	out := []client.Instance{}
	for _, i := range f.instances {
		for _, t := range targets {
			if t == "all" || t == i.App || t == i.Namespace || t == fmt.Sprint(i.ID) {
				out = append(out, i)
				break
			}
		}
	}
	return out
}

func (f *fake) handle(w http.ResponseWriter, r *http.Request) {
	var body bytes.Buffer
	_, _ = body.ReadFrom(r.Body)
	f.mu.Lock()
	f.requests = append(f.requests, request{r.URL.Path, r.URL.Query(), body.String()})
	h := f.override[r.URL.Path]
	f.mu.Unlock()
	if h != nil {
		h(w, r)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	reply := func(v any) { _ = json.NewEncoder(w).Encode(v) }
	targets := r.URL.Query()["target"]
	var act client.ActRequest
	_ = json.Unmarshal(body.Bytes(), &act)
	if len(targets) == 0 {
		targets = act.Targets
	}
	if len(targets) > 0 && targets[0] != "all" && len(f.match(targets)) == 0 {
		problem(w, http.StatusNotFound, fmt.Sprintf("no app, id or namespace is called %q", targets[0]))
		return
	}
	switch r.URL.Path {
	case "/v1/info":
		reply(f.info)
	case "/v1/instances":
		reply(map[string]any{"instances": f.match(targets)})
	case "/v1/details":
		list := []client.Detail{}
		for _, d := range f.details {
			if len(targets) == 0 || targets[0] == "all" || targets[0] == d.App || targets[0] == fmt.Sprint(d.ID) {
				list = append(list, d)
			}
		}
		reply(map[string]any{"details": list})
	case "/v1/up":
		res := f.result
		res.Changes = f.changes
		reply(res)
	case "/v1/save":
		reply(client.Saved{Path: filepath.Join(f.home, "dump.json"), Apps: len(f.instances)})
	case "/v1/act", "/v1/start", "/v1/scale", "/v1/signal", "/v1/message", "/v1/down", "/v1/resurrect":
		res := f.result
		if res.Instances == nil {
			for _, i := range f.match(targets) {
				res.Instances = append(res.Instances, client.Outcome{Instance: i})
			}
		}
		reply(res)
	default:
		problem(w, http.StatusNotFound, "no such path "+r.URL.Path)
	}
}

// outcome is what one command line came to.
type outcome struct {
	out, err string
	code     int
}

// remuda runs one command line. Its PATH is that of the tests.
func remuda(t *testing.T, home string, args ...string) outcome {
	t.Helper()
	return remudaWith(t, context.Background(), Options{Args: args, Environ: []string{"REMUDA_HOME=" + home, "PATH=" + os.Getenv("PATH"), "HOME=/nonexistent"}})
}

func remudaWith(t *testing.T, ctx context.Context, o Options) outcome { //nolint:revive // t goes first in helpers of tests
	t.Helper()
	var out, err bytes.Buffer
	o.Stdout, o.Stderr, o.Stdin = &out, &err, strings.NewReader("")
	o.Version = "1.2.3"
	if o.Cwd == "" {
		o.Cwd = t.TempDir()
	}
	code := Main(ctx, o)
	return outcome{out.String(), err.String(), code}
}

func (o outcome) want(t *testing.T, code int, inOut, inErr string) {
	t.Helper()
	if o.code != code || !strings.Contains(o.out, inOut) || !strings.Contains(o.err, inErr) {
		t.Errorf("exit code %d, want %d\nstdout (want %q):\n%s\nstderr (want %q):\n%s", o.code, code, inOut, o.out, inErr, o.err)
	}
}

func instance(id int, app string, index int, st client.State) client.Instance {
	i := client.Instance{ID: id, App: app, Namespace: "default", Index: index, State: st, ExecMode: "fork", User: "root",
		Since: time.Now().Add(-3 * time.Minute), Created: time.Now().Add(-time.Hour), Memory: 26_000_000, CPU: 0.5, Version: "1.0.0"}
	if st == client.Online {
		i.PID = 1000 + id
	}
	return i
}
