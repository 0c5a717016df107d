package api

import (
	"context"
	"errors"
	"io"
	"iter"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/remuda-dev/remuda/client"
)

// The server lingers for half a second on a connection whose request was too
// large, longer than goleak waits.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*conn).closeWriteAndWait"))
}

// recorder is a daemon that remembers what it was asked.
type recorder struct {
	Daemon // what a test does not expect to be called panics
	asked  any
	err    error
	lines  []client.LogLine
	broken error // ends the stream
}

func (r *recorder) Info() client.Info { return client.Info{Version: "9", API: client.API, PID: 1} }
func (r *recorder) List(t []client.Target) ([]client.Instance, error) {
	r.asked = t
	return []client.Instance{{ID: 3, App: "web", State: client.Online}}, r.err
}
func (r *recorder) Describe(t []client.Target, secrets bool) ([]client.Detail, error) {
	r.asked = []any{t, secrets}
	return []client.Detail{{Instance: client.Instance{ID: 3}}}, r.err
}
func (r *recorder) Act(_ context.Context, req client.ActRequest) (client.ActResult, error) {
	r.asked = req
	return client.ActResult{Warnings: []string{"w"}}, r.err
}
func (r *recorder) Start(_ context.Context, req client.StartRequest) (client.ActResult, error) {
	r.asked = req
	return client.ActResult{}, r.err
}
func (r *recorder) Logs(_ context.Context, q client.LogQuery) (iter.Seq2[client.LogLine, error], error) {
	r.asked = q
	return func(yield func(client.LogLine, error) bool) {
		for _, l := range r.lines {
			if !yield(l, nil) {
				return
			}
		}
		if r.broken != nil {
			yield(client.LogLine{}, r.broken)
		}
	}, r.err
}
func (r *recorder) Events(_ context.Context, after uint64, follow bool, t []client.Target) (iter.Seq2[client.Event, error], error) {
	r.asked = []any{after, follow, t}
	return func(func(client.Event, error) bool) {}, r.err
}

// serve puts a recorder behind a real socket.
func serve(t *testing.T, r *recorder) *client.Client {
	t.Helper()
	return serveHandler(t, Handler(r, "9"))
}

func serveHandler(t *testing.T, h http.Handler) *client.Client {
	t.Helper()
	home, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	l, err := Listen(client.SocketPath(home))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
	c := client.New(home)
	t.Cleanup(func() {
		c.Close()
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		<-done
	})
	return c
}

func TestQueriesArriveWhole(t *testing.T) {
	r := &recorder{}
	c := serve(t, r)
	ctx := context.Background()
	want := func(what string, err error, asked any) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(r.asked, asked) {
			t.Errorf("%s: asked for %#v, want %#v; %v", what, r.asked, asked, err)
		}
	}
	targets := []string{"web", "a b&c", "/^x/"}
	list, err := c.List(ctx, targets...)
	want("list", err, targets)
	if len(list) != 1 || list[0].ID != 3 {
		t.Errorf("list: %v", list)
	}
	_, err = c.Describe(ctx, true, targets...)
	want("describe", err, []any{targets, true})
	req := client.ActRequest{Verb: client.VerbRestart, Targets: targets, Env: map[string]string{"A": "1"}, Signal: "SIGHUP"}
	_, err = c.Act(ctx, req)
	want("act", err, req)
	for _, err := range c.Events(ctx, 7, true, targets...) {
		t.Error(err)
	}
	want("events", nil, []any{uint64(7), true, targets})
	q := client.LogQuery{Targets: targets, Lines: -1, Since: time.Unix(1, 5).UTC(), Until: time.Unix(2, 0).UTC(), Grep: "a+", Out: true, Err: true, Follow: true}
	for _, err := range c.Logs(ctx, q) {
		t.Error(err)
	}
	want("logs", nil, q)
}

func TestRefusalsReachTheClient(t *testing.T) {
	r := &recorder{err: &client.Error{Status: http.StatusNotFound, Detail: "no app is called \"x\""}}
	c := serve(t, r)
	_, err := c.List(context.Background(), "x")
	if !errors.Is(err, client.ErrNoTarget) || err.Error() != `no app is called "x"` {
		t.Errorf("%v", err)
	}
	r.err = errors.New("the disk fell out")
	if _, err = c.List(context.Background()); err == nil || err.Error() != "the disk fell out" {
		t.Errorf("%v", err)
	}
}

func TestStream(t *testing.T) {
	r := &recorder{broken: errors.New("the file vanished")}
	for n := range 5000 {
		r.lines = append(r.lines, client.LogLine{ID: n, Text: strings.Repeat("<é>", n%50)})
	}
	c := serve(t, r)
	n := 0
	var last error
	for l, err := range c.Logs(context.Background(), client.LogQuery{}) {
		if err != nil {
			last = err
			continue
		}
		if l != r.lines[n] {
			t.Fatalf("line %d: %+v", n, l)
		}
		n++
	}
	if n != len(r.lines) || last == nil || last.Error() != "the file vanished" {
		t.Errorf("%d lines, then %v", n, last)
	}
}

func TestBadRequests(t *testing.T) {
	r := &recorder{}
	c := serve(t, r)
	hc := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", client.SocketPath(c.Home()))
	}}}
	defer hc.CloseIdleConnections()
	for _, tc := range []struct {
		name, method, path, header, body string
		status                           int
		says                             string
	}{
		{name: "another version", method: "GET", path: "/v1/instances", header: "7", status: 406, says: "remuda upgrade"},
		{name: "a version that is none", method: "GET", path: "/v1/instances", header: "\"><", status: 406, says: "version"},
		{name: "no version", method: "GET", path: "/v1/info", status: 200},
		{name: "no JSON", method: "POST", path: "/v1/act", body: "{", status: 400, says: "unexpected end"},
		{name: "unknown field", method: "POST", path: "/v1/act", body: `{"verb":"stop","targets":["a"],"sginal":"x"}`, status: 422, says: "sginal"},
		{name: "wrong type", method: "POST", path: "/v1/act", body: `{"verb":"stop","targets":"a"}`, status: 422, says: "array"},
		{name: "missing field", method: "POST", path: "/v1/act", body: `{"targets":["a"]}`, status: 422, says: "verb"},
		{name: "no body", method: "POST", path: "/v1/act", status: 400, says: "body"},
		{name: "no such path", method: "GET", path: "/v1/nothing", status: 404},
		{name: "wrong method", method: "DELETE", path: "/v1/info", status: 405},
		{name: "no number", method: "GET", path: "/v1/logs?lines=x", status: 422, says: "lines"},
		{name: "endless regular expression", method: "GET", path: "/v1/logs?grep=" + strings.Repeat("a", 2000), status: 422, says: "1000"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			req, err := http.NewRequest(tc.method, "http://x"+tc.path, strings.NewReader(tc.body))
			if err != nil {
				t.Fatal(err)
			}
			if tc.header != "" {
				req.Header.Set(client.HeaderAPI, tc.header)
			}
			resp, err := hc.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != tc.status || !strings.Contains(string(b), tc.says) {
				t.Errorf("%s %s, %v; want %d with %q", resp.Status, b, err, tc.status, tc.says)
			}
		})
	}
	if r.asked != nil {
		t.Errorf("a bad request reached the daemon: %v", r.asked)
	}
}

func TestOversizedBody(t *testing.T) {
	r := &recorder{}
	c := serve(t, r)
	_, err := c.Act(context.Background(), client.ActRequest{Verb: "stop", Targets: []string{strings.Repeat("x", maxBody)}})
	if err == nil || r.asked != nil {
		t.Errorf("%v, asked %T", err, r.asked)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "s")
	first, err := Listen(stale)
	if err != nil {
		t.Fatal(err)
	}
	first.Close() // its socket stays, as after kill -9
	second, err := Listen(stale)
	if err != nil {
		t.Fatalf("a stale socket is in the way: %v", err)
	}
	defer second.Close()
	if st, err := os.Stat(stale); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("%v", err)
	}
	long := filepath.Join(dir, strings.Repeat("d", 100))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(client.SocketPath(long))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			c.Close()
		}
		accepted <- err
	}()
	c := client.New(long)
	defer c.Close()
	if _, err := c.Info(context.Background()); errors.Is(err, client.ErrUnreachable) {
		t.Errorf("a long path is not reached: %v", err)
	}
	if err := <-accepted; err != nil {
		t.Error(err)
	}
}
