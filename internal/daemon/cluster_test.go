package daemon

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/test/harness"
)

// server is Node's plainest: nothing of it knows of clusters or signals.
const server = `require('http').createServer((req, res) => setTimeout(() => res.end(String(process.pid)), 10)).listen(%s, '127.0.0.1')`

// web is a Node app of two instances in cluster mode, and where it listens.
func (b *box) web() (spec config.App, addr string) {
	b.Helper()
	port, err := harness.FreePort()
	if err != nil {
		b.Fatal(err)
	}
	addr = "127.0.0.1:" + port
	b.write("server.js", fmt.Sprintf(server, port))
	spec = b.app("web", "")
	spec.Command = []string{"node", filepath.Join(b.home, "server.js")}
	spec.Script, spec.Interpreter = "server.js", "node"
	spec.Instances, spec.ExecMode = 2, "cluster"
	return spec, addr
}

func get(addr string) (string, error) {
	c := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := c.Get("http://" + addr)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return string(body), err
}

// open reports whether somebody listens.
func open(addr string) bool {
	c, err := net.Dial("tcp", addr)
	if err == nil {
		c.Close()
	}
	return err == nil
}

func TestClusterLosesNoRequest(t *testing.T) {
	b := newBox(t)
	spec, addr := b.web()
	b.start(spec)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan int)
	for range 4 {
		go func() {
			n := 0
			for ; ctx.Err() == nil; n++ {
				if _, err := get(addr); err != nil {
					t.Errorf("a request failed: %v", err)
					break
				}
			}
			done <- n
		}()
	}
	answers := func(when string) {
		b.Helper()
		seen := map[string]bool{}
		b.until("both answer "+when, func() bool {
			pid, err := get(addr)
			if err != nil {
				b.Fatal(err)
			}
			seen[pid] = true
			all := b.list()
			return seen[fmt.Sprint(all["web:0"].PID)] && seen[fmt.Sprint(all["web:1"].PID)]
		})
	}
	answers("at first")
	before := b.list()
	b.well(b.act(client.VerbReload, "web"))
	if now := b.list(); now["web:0"].PID == before["web:0"].PID || now["web:1"].PID == before["web:1"].PID {
		t.Errorf("not reloaded: %+v", now)
	}
	answers("after a reload")
	b.crash()
	answers("with another controller")
	b.well(b.act(client.VerbReload, "web"))
	answers("after its reload")
	b.well(b.act(client.VerbRestart, "web")) // both at once: who comes waits
	stop()
	n := 0
	for range 4 {
		n += <-done
	}
	t.Logf("%d requests", n)

	b.well(b.act(client.VerbStop, "web"))
	b.until("the port is given back", func() bool { return !open(addr) })
}

func TestClusterPortIsGivenBack(t *testing.T) {
	b := newBox(t)
	spec, addr := b.web()
	b.well(b.c.Up(b.ctx, ofFile(nil, spec)))
	b.until("it listens", func() bool { return open(addr) })

	// Without cluster mode the program opens the port itself, once the last
	// worker is gone.
	spec.ExecMode = "fork"
	b.well(b.c.Scale(b.ctx, client.ScaleRequest{App: "web", To: "1"}))
	spec.Instances = 1
	b.well(b.c.Up(b.ctx, ofFile(nil, spec)))
	b.until("it answers", func() bool {
		pid, err := get(addr)
		return err == nil && pid == fmt.Sprint(b.list()["web:0"].PID)
	})
	b.crash()
	spec.Instances, spec.ExecMode, spec.Restart.MaxRestarts = 2, "cluster", 1
	b.well(b.c.Up(b.ctx, ofFile(nil, spec)))
	b.until("it answers", func() bool { _, err := get(addr); return err == nil })

	// A program that fails for good does not keep clients waiting either.
	b.write("server.js", "process.exit(1)")
	_, _ = b.act(client.VerbRestart, "web")
	b.become("web:0", client.Errored)
	b.become("web:1", client.Errored)
	for end := time.Now().Add(patience); open(addr); {
		if time.Now().After(end) {
			t.Fatal("the port is still open")
		}
	}
	b.well(b.act(client.VerbDelete, "web"))
}
