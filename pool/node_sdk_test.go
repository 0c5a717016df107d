package pool

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
