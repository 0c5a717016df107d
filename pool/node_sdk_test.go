package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/ipc"
)

func nodeSDKWorker(t *testing.T, script string) []string {
	t.Helper()
	return []string{"node", write(t, "w.cjs", strings.ReplaceAll(script, "SDK", sdkPath(t, "node/remuda-worker.cjs")))}
}

// A Node worker publishes and subscribes, within tasks and outside of them.
func TestNodeSDKTopics(t *testing.T) {
	p := newPool(t, Options{Size: 1, Command: nodeSDKWorker(t, `
const { serve, open } = require('SDK')
const worker = open({
  '': (t) => t.body,
  publish: (t) => t.publish('said/task', { by: 'task' }),
  refuse: () => {
    const bad = []
    for (const topic of ['', 'x*', 'é'.repeat(200)]) {
      try { worker.publish(topic, 1) } catch (err) { bad.push(err.name) }
    }
    try { worker.subscribe('', () => {}) } catch (err) { bad.push(err.name) }
    try { worker.subscribe('x', () => {}, { slow: 'x' }) } catch (err) { bad.push(err.name) }
    return bad
  },
  leave: () => leave()
})
const answer = (m) => worker.publish('said/' + m.topic.slice(4), { heard: m.data, missed: m.missed })
worker.subscribe('say/*', answer)
worker.subscribe('say/throw', () => { throw new Error('subscribers may fail: this belongs to the test') })
worker.subscribe('say/throw', async () => { throw new Error('subscribers may fail: this belongs to the test') })
const leave = worker.subscribe('say/x', answer, { slow: 'drop-newest' })
`)})
	ctx := limit(t)
	s, err := p.Subscribe("said/*", ipc.SubscribeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	hear := func(wants ...string) {
		t.Helper()
		for _, want := range wants {
			m, err := s.Receive(ctx)
			if got := m.Topic + " " + string(m.Body); err != nil || got != want {
				t.Errorf("heard %s, %v, want %s", got, err, want)
			}
		}
	}
	if r, err := p.Do(ctx, Task{Body: []byte("up")}); err != nil || string(r.Body) != "up" {
		t.Fatal(string(r.Body), err)
	}
	say := func(topic, body string) {
		t.Helper()
		if err := p.Publish(topic, []byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	say("say/throw", "1")
	hear(`said/throw {"heard":1,"missed":0}`)
	say("say/x", `"two"`)
	hear(`said/x {"heard":"two","missed":0}`, `said/x {"heard":"two","missed":0}`)
	if _, err := p.Do(ctx, Task{Name: "leave"}); err != nil {
		t.Fatal(err)
	}
	say("say/x", "")
	hear(`said/x {"heard":null,"missed":0}`)
	if _, err := p.Do(ctx, Task{Name: "publish"}); err != nil {
		t.Fatal(err)
	}
	hear(`said/task {"by":"task"}`)
	if r, err := p.Do(ctx, Task{Name: "refuse"}); err != nil || string(r.Body) != `["TypeError","TypeError","TypeError","TypeError","TypeError"]` {
		t.Errorf("%s, %v", r.Body, err)
	}
	if n := p.Stats().Died; n != 0 {
		t.Errorf("%d workers died", n)
	}
}

// A worker that is asked to end answers what it has; at SIGTERM it has that
// given up.
func TestNodeSDKShutdown(t *testing.T) {
	p := newPool(t, Options{Size: 1, Concurrency: 2, Grace: 20 * time.Second, Command: nodeSDKWorker(t, `
const { serve } = require('SDK')
serve({
  pid: () => process.pid,
  wait: (t) => new Promise((resolve) => t.signal.addEventListener('abort', () => resolve('gave up')))
}).then(() => console.log('the end'))
setInterval(() => {}, 1000) // the worker ends all the same
`)})
	ctx := limit(t)
	if _, err := p.Do(ctx, Task{Name: "pid"}); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	began := make(chan struct{})
	go func() {
		close(began)
		r, err := p.Do(ctx, Task{Name: "wait"})
		if err == nil && string(r.Body) != `"gave up"` {
			err = errors.New(string(r.Body))
		}
		done <- err
	}()
	<-began
	for p.Stats().Running == 0 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	// A Close that is cut short ends the task for its caller, so the signal is
	// sent by hand.
	r, err := p.Do(ctx, Task{Name: "pid"})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(ctx, "kill", "-TERM", string(r.Body)).CombinedOutput(); err != nil {
		t.Fatal(string(out), err)
	}
	if err := <-done; err != nil {
		t.Errorf("a task at SIGTERM: %v", err)
	}
}

// The time in the handler is told.
func TestNodeSDKTook(t *testing.T) {
	parent, child, err := ipc.Pair()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := ipc.NewFrames(parent, ipc.Options{})
	if err != nil {
		t.Fatal(err)
	}
	argv := nodeSDKWorker(t, `
const sleep = () => new Promise((resolve) => setTimeout(resolve, 30))
require('SDK').serve({ sleep, fail: () => sleep().then(() => { throw new Error('no') }), quick: () => 1 })`)
	cmd := exec.CommandContext(limit(t), argv[0], argv[1:]...)
	cmd.Env = append(ipc.Environ(os.Environ()), ipc.FDVar+"=3")
	cmd.ExtraFiles = []*os.File{child}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	child.Close()
	served := make(chan error, 1)
	go func() { served <- conn.Serve(nil) }()
	for _, c := range []struct {
		name string
		low  time.Duration
	}{{"sleep", 25 * time.Millisecond}, {"fail", 25 * time.Millisecond}, {"quick", time.Microsecond}} {
		end := make(answered, 1)
		r := &ipc.Request{Name: c.name, To: end}
		if err := conn.Start(r); err != nil {
			t.Fatal(err)
		}
		if err := <-end; (err != nil) != (c.name == "fail") {
			t.Errorf("%s: %v", c.name, err)
		}
		if r.Took < c.low || r.Took > time.Minute {
			t.Errorf("%s took %s", c.name, r.Took)
		}
	}
	conn.Stop()
	if err := errors.Join(<-served, cmd.Wait()); err != nil {
		t.Error(err)
	}
}

type answered chan error

func (a answered) End(_ *ipc.Request, _ []byte, err error) { a <- err }
func (a answered) Progress(*ipc.Request, []byte)           {}
func (a answered) Chunk(*ipc.Request, []byte)              {}

// A Node worker gets connections, listeners and UDP sockets with its tasks.
func TestNodeSDKHandles(t *testing.T) {
	before := countFDs(t)
	p := newPool(t, Options{Size: 1, Concurrency: 8, Command: nodeSDKWorker(t, `
require('SDK').serve({
  '': (t) => t.body,
  hello: (t) => { for (const s of t.handles) s.end('hello ' + t.data + ' from ' + s.constructor.name); return t.handles.length },
  ignore: () => 'ignored',
  listen: async (t) => {
    const [server] = t.handles
    const done = new Promise((resolve) => server.on('connection', (s) => { s.end('served'); server.close(resolve) }))
    t.progress('listening')
    await done
  },
  udp: (t) => new Promise((resolve) => t.handles[0].once('message', (b) => { t.handles[0].close(); resolve(b.toString()) }))
})
`)})
	ctx := limit(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	// connection returns both ends of one.
	connection := func() (net.Conn, *os.File) {
		t.Helper()
		client, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = client.SetDeadline(time.Now().Add(time.Minute))
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		f, err := c.(*net.TCPConn).File()
		if err != nil {
			t.Fatal(err)
		}
		return client, f
	}
	says := func(client net.Conn, want string) {
		t.Helper()
		defer client.Close()
		if b, err := io.ReadAll(client); string(b) != want {
			t.Errorf("the client got %q, %v, want %q", b, err, want)
		}
	}
	if r, err := p.Do(ctx, Task{Body: []byte("up")}); err != nil { // its hello has come
		t.Fatal(r, err)
	}
	var wg sync.WaitGroup
	for n := range 20 {
		c1, f1 := connection()
		c2, f2 := connection()
		wg.Go(func() {
			r, err := p.Do(ctx, Task{Name: "hello", Body: []byte(strconv.Itoa(n)), Files: []*os.File{f1, f2}})
			if err != nil || string(r.Body) != "2" {
				t.Errorf("hello: %s, %v", r.Body, err)
			}
			f1.Close()
			f2.Close()
			says(c1, fmt.Sprintf("hello %d from Socket", n))
			says(c2, fmt.Sprintf("hello %d from Socket", n))
		})
	}
	wg.Wait()
	// What a handler does not look at is closed.
	client, f := connection()
	if r, err := p.Do(ctx, Task{Name: "ignore", Files: []*os.File{f}}); err != nil {
		t.Errorf("ignore: %s, %v", r.Body, err)
	}
	f.Close()
	says(client, "")
	// A listener accepts for the worker.
	lf, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	listening := make(chan struct{})
	wg.Go(func() {
		if _, err := p.Do(ctx, Task{Name: "listen", Files: []*os.File{lf}, OnProgress: func([]byte) { close(listening) }}); err != nil {
			t.Errorf("listen: %v", err)
		}
	})
	<-listening
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	_ = client.SetDeadline(time.Now().Add(time.Minute))
	says(client, "served")
	wg.Wait()
	lf.Close()
	u, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	uf, err := u.File()
	if err != nil {
		t.Fatal(err)
	}
	_ = u.Close()
	if client, err = net.Dial("udp", u.LocalAddr().String()); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write([]byte("a datagram")); err != nil {
		t.Fatal(err)
	}
	if r, err := p.Do(ctx, Task{Name: "udp", Files: []*os.File{uf}}); err != nil || string(r.Body) != `"a datagram"` {
		t.Errorf("udp: %s, %v", r.Body, err)
	}
	client.Close()
	uf.Close()
	// Node would abort over a file.
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Do(ctx, Task{Name: "hello", Files: []*os.File{null}}); !errors.Is(err, ipc.ErrHandle) {
		t.Errorf("a file: %v", err)
	}
	null.Close()
	if n := p.Stats().Died; n != 0 {
		t.Errorf("%d workers died", n)
	}
	if err := p.Close(ctx); err != nil {
		t.Error(err)
	}
	l.Close()
	for countFDs(t) > before && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	if n := countFDs(t); n > before {
		t.Errorf("%d descriptors are open, %d at the start", n, before)
	}
}

// A Node program without an SDK gets a handle with its task and gives one back.
func TestNodeProgramFiles(t *testing.T) {
	p := newPool(t, Options{Size: 1, Protocol: Node, Command: []string{"node", write(t, "w.js", `
process.on('message', (m, h) => m === 'drop' ? process.send(h.destroy() && 'dropped') : process.send({ got: h.constructor.name }, h))`)}})
	ctx := limit(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	lf, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer lf.Close()
	r, err := p.Do(ctx, Task{Body: []byte("1"), Files: []*os.File{lf}})
	if err != nil || string(r.Body) != `{"got":"Server"}` || len(r.Files) != 1 || r.Files[0].Name() != "net.Server" {
		t.Fatalf("%s with %v, %v", r.Body, r.Files, err)
	}
	back, err := net.FileListener(r.Files[0])
	r.Files[0].Close()
	if err != nil || back.Addr().String() != l.Addr().String() {
		t.Fatal(back, err)
	}
	back.Close()
	if _, err := p.Do(ctx, Task{Body: []byte("1"), Files: []*os.File{lf, lf}}); !errors.Is(err, ipc.ErrTooLarge) {
		t.Errorf("two handles: %v", err)
	}
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	f, err := client.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if r, err := p.Do(ctx, Task{Body: []byte(`"drop"`), Files: []*os.File{f}}); err != nil || string(r.Body) != `"dropped"` || len(r.Files) != 0 {
		t.Errorf("%s with %v, %v", r.Body, r.Files, err)
	}
}

// countFDs counts what this process has open, but for the poller.
func countFDs(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range d {
		if to, _ := os.Readlink("/proc/self/fd/" + f.Name()); !strings.HasPrefix(to, "anon_inode:") {
			n++
		}
	}
	return n
}

// The package can be required and imported by its name, with types for both.
func TestNodeSDKPackage(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "node_modules"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(sdkPath(t, "node"), filepath.Join(dir, "node_modules", "remuda-worker")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for name, script := range map[string]string{
		"a.cjs": `console.log(Object.keys(require('remuda-worker')).sort().join())`,
		"b.mjs": `import * as w from 'remuda-worker'; console.log(Object.keys(w).join())`,
	} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(ctx, "node", file).CombinedOutput()
		if string(out) != "Message,Task,TaskError,Worker,open,serve\n" {
			t.Errorf("%s: %s, %v", name, out, err)
		}
	}
}
