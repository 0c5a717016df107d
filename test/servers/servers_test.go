// Package servers shows what becomes of servers under Remuda, by the real
// program and real clients: Node servers that nobody changed, in cluster mode
// (this file), and servers in any language by sockets that Remuda opened
// (sockets_test.go).
package servers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/test/harness"
	"github.com/remuda-dev/remuda/test/load"
)

const patience = 60 * time.Second

// site is a daemon of its own and what runs there.
type site struct {
	*testing.T
	h   *harness.Home
	c   *client.Client
	ctx context.Context
}

func newSite(t *testing.T) *site {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	dir := t.TempDir()
	bin, err := harness.Build(ctx, dir, false)
	if err != nil {
		t.Fatal(err)
	}
	h, err := harness.New(bin, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &site{T: t, h: h, c: h.Client(), ctx: ctx}
	t.Cleanup(func() {
		defer cancel()
		s.c.Close()
		log, _ := os.ReadFile(filepath.Join(h.Home, "logs", "daemon.log"))
		if err := h.Close(); err != nil {
			t.Errorf("%v\ndaemon.log: %s", err, log)
		}
		if strings.Contains(string(log), "panic:") || t.Failed() {
			t.Errorf("daemon.log: %s", log)
		}
	})
	return s
}

// with is the site within a subtest.
func (s *site) with(t *testing.T) *site {
	sub := *s
	sub.T = t
	return &sub
}

func (s *site) must(args ...string) string {
	s.Helper()
	r, err := s.h.Must(s.ctx, args...)
	if err != nil {
		s.Fatal(err)
	}
	return r.Stdout
}

// up runs apps as a remuda.yaml has them.
func (s *site) up(yaml string) {
	s.Helper()
	file, err := s.h.Write("remuda.yaml", yaml)
	if err != nil {
		s.Fatal(err)
	}
	s.must("up", "-f", file)
}

// pids are those of an app's instances that run, by index.
func (s *site) pids(app string) map[int]string {
	s.Helper()
	list, err := s.c.List(s.ctx, app)
	if err != nil {
		s.Fatal(err)
	}
	m := map[int]string{}
	for _, i := range list {
		if i.State == client.Online && i.PID != 0 {
			m[i.Index] = strconv.Itoa(i.PID)
		}
	}
	return m
}

// until waits for a condition.
func (s *site) until(what string, ok func() error) {
	s.Helper()
	if err := harness.Eventually(patience, ok); err != nil {
		s.Fatalf("%s: not within %v: %v\n%s", what, patience, err, s.h.Run(s.ctx, "list").Stdout)
	}
}

// bothServe waits until each of an app's two instances has answered a load,
// or ask, since it was called.
func (s *site) bothServe(app string, l *load.Load) {
	s.Helper()
	before := l.Figures().By
	s.until("both instances of "+app+" serve", func() error {
		pids, now := s.pids(app), l.Figures().By
		if len(pids) != 2 {
			return fmt.Errorf("%d instances are online", len(pids))
		}
		for n, pid := range pids {
			if now[pid] <= before[pid] {
				return fmt.Errorf("instance %d (pid %s) has not answered; %v", n, pid, now)
			}
		}
		return nil
	})
}

// kill9 ends the process and returns when it is gone: reaped, as a process whose
// first thread is a zombie may have others, and its connections open.
func (s *site) kill9(pid string) (gone time.Time) {
	s.Helper()
	n, err := strconv.Atoi(pid)
	was, _ := harness.Stat(n)
	if err == nil {
		err = syscall.Kill(n, syscall.SIGKILL)
	}
	if err != nil {
		s.Fatal(err)
	}
	s.until("the end of pid "+pid, func() error {
		if p, ok := harness.Stat(n); ok && p.Start == was.Start {
			return errors.New("it is still there")
		}
		return nil
	})
	return time.Now()
}

// pause stops the process until goOn is called.
func (s *site) pause(pid string) (goOn func()) {
	s.Helper()
	n, err := strconv.Atoi(pid)
	if err == nil {
		err = syscall.Kill(n, syscall.SIGSTOP)
	}
	if err != nil {
		s.Fatal(err)
	}
	s.until("pid "+pid+" stands still", func() error {
		if p, ok := harness.Stat(n); !ok || p.State != 'T' {
			return fmt.Errorf("state %c", p.State)
		}
		return nil
	})
	return func() { _ = syscall.Kill(n, syscall.SIGCONT) }
}

// freePort is one that was free a moment ago.
func (s *site) freePort() string {
	s.Helper()
	port, err := harness.FreePort()
	if err != nil {
		s.Fatal(err)
	}
	return port
}

// modules installs what package.json names, once for each lock file, into a
// folder that is kept, and returns its node_modules.
func modules(t *testing.T) string {
	t.Helper()
	lockFile, err := os.ReadFile(filepath.Join("testdata", "package-lock.json"))
	if err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadFile(filepath.Join("testdata", "package.json"))
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(harness.Root(), "bin", "cache", fmt.Sprintf("node-servers-%08x", sum(lockFile, list)))
	done := filepath.Join(dir, "node_modules")
	if _, err := os.Stat(done); err == nil {
		return done
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	fresh, err := os.MkdirTemp(filepath.Dir(dir), "installing-*")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(fresh)
	for name, content := range map[string][]byte{"package.json": list, "package-lock.json": lockFile} {
		if err := os.WriteFile(filepath.Join(fresh, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	err = harness.Eventually(2*time.Minute, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--cache", filepath.Join(fresh, "npm-cache"))
		// Also where nobody has a home.
		cmd.Dir, cmd.Env = fresh, append(os.Environ(), "HOME="+fresh)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	os.RemoveAll(filepath.Join(fresh, "npm-cache"))
	// Another test may have been quicker.
	if err := os.Rename(fresh, dir); err != nil {
		if _, serr := os.Stat(done); serr != nil {
			t.Fatal(err)
		}
	}
	return done
}

func sum(parts ...[]byte) (h uint32) {
	for _, p := range parts {
		for _, b := range p {
			h = (h ^ uint32(b)) * 16777619
		}
	}
	return h
}

// TestNodeServers: unmodified Node servers of all kinds share what they listen
// at; one that is killed costs the requests inside it and no other.
func TestNodeServers(t *testing.T) {
	s := newSite(t)
	library := modules(t)
	scripts, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, script string }{
		{"plain", "http.js"}, {"express", "express.js"}, {"fastify", "fastify.js"}, {"ports", "ports.js"}, {"unix", "unix.js"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := s.with(t)
			a, b := s.freePort(), s.freePort()
			sock := filepath.Join(s.h.Dir, "web.sock")
			s.up(fmt.Sprintf(`
apps:
  %s:
    run: node %s
    exec_mode: cluster
    instances: 2
    env: {PORT: %s, METRICS_PORT: %s, SOCKET: %s, NODE_PATH: %s}
`, c.name, filepath.Join(scripts, c.script), a, b, sock, library))
			defer s.must("delete", c.name)
			at := []load.Options{{Addr: "127.0.0.1:" + a, Kept: 4, Fresh: 8}}
			switch c.name {
			case "ports":
				at = append(at, load.Options{Addr: "127.0.0.1:" + b, Kept: 4, Fresh: 8})
			case "unix":
				at = []load.Options{{Network: "unix", Addr: sock, Kept: 4, Fresh: 8}}
			}
			var loads []*load.Load
			for _, o := range at {
				loads = append(loads, load.Start(o))
			}
			for _, l := range loads {
				s.bothServe(c.name, l)
			}
			victim := s.pids(c.name)[0]
			gone := s.kill9(victim)
			for _, l := range loads {
				s.bothServe(c.name, l)
			}
			s.restarted(c.name, 0, victim)
			for n, l := range loads {
				f := l.Stop()
				t.Log(f.String())
				for _, x := range f.Failures {
					// What was asked later than that was not inside of it.
					if x.Begun.After(gone) || x.Kind == load.Refused || x.Kind == load.Timeout {
						t.Errorf("a request that was not inside the killed one failed: %v", x.Err)
					}
				}
				if most := at[n].Kept + at[n].Fresh; len(f.Failures) > most {
					t.Errorf("%d failures of %d clients", len(f.Failures), most)
				}
			}
		})
	}
	t.Run("udp", func(t *testing.T) { udpEcho(s.with(t), filepath.Join(scripts, "udp.js")) })
}

// restarted checks that the instance runs again in place of the one with the
// pid.
func (s *site) restarted(app string, index int, was string) {
	s.Helper()
	s.until(fmt.Sprintf("%s:%d runs again", app, index), func() error {
		if pid := s.pids(app)[index]; pid == "" || pid == was {
			return fmt.Errorf("pid %q", pid)
		}
		return nil
	})
}

func udpEcho(s *site, script string) {
	port := s.freePort()
	s.up(fmt.Sprintf("apps:\n  udp: {run: node %s, exec_mode: cluster, instances: 2, env: {PORT: %s}}\n", script, port))
	defer s.must("delete", "udp")
	// echo is who answers; a datagram may be lost with who had it.
	echo := func() string {
		c, err := net.Dial("udp", "127.0.0.1:"+port)
		if err != nil {
			s.Fatal(err)
		}
		defer c.Close()
		buf := make([]byte, 100)
		for end := time.Now().Add(patience); time.Now().Before(end); {
			if _, err := c.Write([]byte("ping")); err != nil {
				s.Errorf("the port refuses: %v", err)
			}
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			n, err := c.Read(buf)
			if err == nil {
				pid, msg, _ := strings.Cut(string(buf[:n]), " ")
				if msg != "ping" {
					s.Errorf("echo %q", buf[:n])
				}
				return pid
			}
			if errors.Is(err, syscall.ECONNREFUSED) {
				s.Errorf("the port refuses: %v", err)
			}
		}
		s.Fatal("no echo")
		return ""
	}
	pids := s.pids("udp")
	for n := range 2 {
		// At rest the kernel may always wake the same one: hold up the other.
		goOn := s.pause(pids[1-n])
		if got := echo(); got != pids[n] {
			s.Errorf("echo of pid %s, want %s", got, pids[n])
		}
		goOn()
	}
	s.kill9(pids[0])
	for range 20 {
		echo()
	}
	s.restarted("udp", 0, pids[0])
	echo()
}

// TestSticky: with sticky: true a client address is served by one instance, and
// by the same after a reload.
func TestSticky(t *testing.T) {
	s := newSite(t)
	script, err := filepath.Abs(filepath.Join("testdata", "http.js"))
	if err != nil {
		t.Fatal(err)
	}
	port := s.freePort()
	s.up(fmt.Sprintf("apps:\n  web: {run: node %s, exec_mode: cluster, sticky: true, instances: 2, env: {PORT: %s}}\n", script, port))
	const clients = 16
	start := func() *load.Load {
		return load.Start(load.Options{Addr: "127.0.0.1:" + port, Kept: clients / 2, Fresh: clients / 2, From: func(client int) net.Addr {
			return &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+client))}
		}})
	}
	// homes are the instances that serve each client.
	homes := func() (out []int) {
		s.Helper()
		index := map[string]int{}
		for n, pid := range s.pids("web") {
			index[pid] = n
		}
		l := start()
		if err := l.Wait(10*clients, patience); err != nil {
			t.Error(err)
		}
		f := l.Stop()
		if len(f.Failures) > 0 {
			t.Error(f.String())
		}
		for n, places := range f.Places {
			if len(places) != 1 {
				t.Errorf("client %d was served by %v", n, places)
			}
			for pid := range places {
				out = append(out, index[pid])
			}
		}
		return out
	}
	first := homes()
	if !slices.Contains(first, 0) || !slices.Contains(first, 1) {
		t.Errorf("one instance has all clients: %v", first)
	}
	l := start()
	s.must("reload", "web")
	if f := l.Stop(); len(f.Failures) > 0 {
		t.Errorf("while it was reloaded: %s", &f)
	}
	if now := homes(); !slices.Equal(now, first) {
		t.Errorf("after a reload clients are at %v, before at %v", now, first)
	}
	s.crash()
	if now := homes(); !slices.Equal(now, first) {
		t.Errorf("with another controller clients are at %v, before at %v", now, first)
	}
	if out := s.must("describe", "web"); !strings.Contains(out, "cluster, sticky") {
		t.Errorf("describe: %s", out)
	}
}

// TestNobodyNotices: whatever is done to an app in cluster mode and to the
// daemon beside a kill of its instances, no request fails.
func TestNobodyNotices(t *testing.T) {
	s := newSite(t)
	script, err := filepath.Abs(filepath.Join("testdata", "http.js"))
	if err != nil {
		t.Fatal(err)
	}
	port := s.freePort()
	s.up(fmt.Sprintf("apps:\n  web: {run: node %s, exec_mode: cluster, instances: 2, env: {PORT: %s}}\n", script, port))
	l := load.Start(load.Options{Addr: "127.0.0.1:" + port, Kept: 10, Fresh: 10})
	s.bothServe("web", l)
	for _, step := range []struct {
		name string
		do   func()
	}{
		{"kill -9 of the controller", s.crash},
		{"scale up", func() { s.must("scale", "web", "4") }},
		{"scale down", func() { s.must("scale", "web", "1") }},
		{"kill -9 of the controller of one instance", s.crash},
		{"restart of the only instance", func() { s.must("restart", "web") }},
		{"reload of the only instance", func() { s.must("reload", "web") }},
		{"scale to two", func() { s.must("scale", "web", "2") }},
		{"upgrade", func() { s.must("upgrade") }},
		{"reload with another controller", func() { s.must("reload", "web") }},
		{"kill -9 of the controller within a reload", func() {
			done := make(chan struct{})
			go func() {
				defer close(done)
				s.h.Run(s.ctx, "reload", "web") // may be cut off
			}()
			s.crash()
			<-done
		}},
		{"restart of all", func() { s.must("restart", "web") }},
	} {
		before := len(l.Figures().Failures)
		step.do()
		if err := l.Wait(60, patience); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		f := l.Figures()
		for _, x := range f.Failures[before:] {
			t.Errorf("%s: %v", step.name, x.Err)
		}
	}
	s.bothServe("web", l)
	f := l.Stop()
	t.Log(f.String())
}
