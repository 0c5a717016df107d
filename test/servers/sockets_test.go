package servers

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/remuda-dev/remuda/test/harness"
	"github.com/remuda-dev/remuda/test/load"
)

// goServer builds the example in Go and returns its path.
func goServer(t *testing.T, dir string) string {
	t.Helper()
	out := filepath.Join(dir, "goserver")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", out, "./examples/sockets/goserver")
	cmd.Dir = harness.Root()
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return out
}

// crash kills the controller and returns when the next one serves.
func (s *site) crash() {
	s.Helper()
	info, err := s.c.Info(s.ctx)
	if err == nil {
		err = syscall.Kill(info.PID, syscall.SIGKILL)
	}
	if err != nil {
		s.Fatal(err)
	}
	s.until("another controller", func() error {
		now, err := s.c.Info(s.ctx)
		if err == nil && now.PID == info.PID {
			err = errors.New("it is still the first")
		}
		return err
	})
}

// open reports whether somebody listens.
func open(addr string) bool {
	c, err := net.Dial("tcp", addr)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// TestSocketsForAnyLanguage: the servers of examples/sockets share a port that
// Remuda opened for them. Whoever dies, nobody is refused.
func TestSocketsForAnyLanguage(t *testing.T) {
	s := newSite(t)
	examples := filepath.Join(harness.Root(), "examples", "sockets")
	for _, c := range []struct{ name, run, more string }{
		{"go", goServer(t, s.h.Dir), ""},
		{"python", "python3 " + filepath.Join(examples, "server.py"), ""},
		{"node", "node " + filepath.Join(examples, "server.js"), ""},
		{"reuseport", goServer(t, s.h.Dir), ", reuseport: true"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := s.with(t)
			addr := "127.0.0.1:" + s.freePort()
			s.up(fmt.Sprintf("apps:\n  %s:\n    run: %s\n    instances: 2\n    sockets: [{listen: \"%s\"%s}]\n", c.name, c.run, addr, c.more))
			defer s.must("delete", c.name)
			l := load.Start(load.Options{Addr: addr, Kept: 4, Fresh: 8})
			s.bothServe(c.name, l)

			// Who is killed takes along what was being worked on, and no more.
			victim := s.pids(c.name)[0]
			gone := s.kill9(victim)
			s.bothServe(c.name, l)
			s.restarted(c.name, 0, victim)
			before := l.Figures()
			for _, x := range before.Failures {
				if x.Begun.After(gone) && c.more == "" || x.Kind == load.Refused || x.Kind == load.Timeout {
					t.Errorf("a request that was not inside the killed one failed: %v", x.Err)
				}
			}

			// The controller may go at any time.
			s.crash()
			s.bothServe(c.name, l)
			s.must("upgrade")
			s.bothServe(c.name, l)
			// All at once: who comes meanwhile waits for the next ones.
			s.must("restart", c.name)
			s.bothServe(c.name, l)
			s.must("scale", c.name, "3")
			s.must("scale", c.name, "2")
			s.must("reload", c.name)
			s.bothServe(c.name, l)
			f := l.Stop()
			t.Log(f.String())
			if n := len(f.Failures) - len(before.Failures); n > 0 {
				t.Errorf("%d requests failed without a kill: %v", n, f.Failures[len(f.Failures)-1].Err)
			}

			s.must("stop", c.name)
			s.until("the port is given back", func() error {
				if open(addr) {
					return errors.New("it is open")
				}
				return nil
			})
			s.must("start", c.name)
			if answer, err := load.Get("tcp", addr); err != nil {
				t.Error(err)
			} else if pids := s.pids(c.name); answer != pids[0] && answer != pids[1] {
				t.Errorf("answer of %s, not one of %v", answer, pids)
			}
		})
	}
}

// show prints what a program was handed.
const show = `
import os, socket, stat
print("pid", os.environ.get("LISTEN_PID") == str(os.getpid()), flush=True)
print("names", os.environ.get("LISTEN_FDNAMES"), flush=True)
for fd in range(3, 3 + int(os.environ.get("LISTEN_FDS", "0"))):
    s = socket.socket(fileno=fd)
    kind = {socket.SOCK_STREAM: "stream", socket.SOCK_DGRAM: "datagram"}[s.type]
    name = s.getsockname()
    print(fd, kind, os.get_blocking(fd), name if isinstance(name, str) else name[0], s.family.name, flush=True)
for fd in range(3 + int(os.environ.get("LISTEN_FDS", "0")), 30):
    try:
        os.fstat(fd)
        print("more", fd, os.environ.get("NODE_CHANNEL_FD"), flush=True)
    except OSError:
        pass
import time
time.sleep(1000)
`

func TestWhatAProgramIsHanded(t *testing.T) {
	s := newSite(t)
	script, err := s.h.Write("show.py", show)
	if err != nil {
		t.Fatal(err)
	}
	a, b, c := s.freePort(), s.freePort(), s.freePort()
	sock := filepath.Join(s.h.Dir, "x.sock")
	// One that an earlier program has left.
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	yaml := func(more string) string {
		return fmt.Sprintf(`
apps:
  show:
    run: python3 %s
    stop: {message: true, grace: 1ms}
    sockets:
      - {name: web, listen: %s}
      - 127.0.0.1:%s
      - {name: "a name", listen: "udp://127.0.0.1:%s"}
      - {listen: %s, mode: "0620"}
%s`, script, a, b, c, sock, more)
	}
	s.up(yaml(""))
	// Node's channel, which `stop: message` asks for, comes behind.
	s.says("show", "pid True", "names web:show:a name:show",
		"3 stream True :: AF_INET6", "4 stream True 127.0.0.1 AF_INET", "5 datagram True 127.0.0.1 AF_INET", "6 stream True "+sock+" AF_UNIX", "more 7 7")
	if st, err := os.Stat(sock); err != nil || st.Mode().Perm() != 0o620 {
		t.Errorf("%v, %v", st, err)
	}
	if out := s.must("describe", "show"); !strings.Contains(out, "udp://127.0.0.1:"+c) {
		t.Errorf("describe: %s", out)
	}

	// What changes: one goes, one comes, one stays.
	if !open("127.0.0.1:"+b) || !open("127.0.0.1:"+a) {
		t.Error("not open")
	}
	d := s.freePort()
	s.up(fmt.Sprintf("apps:\n  show:\n    run: python3 %s\n    stop: {message: true, grace: 1ms}\n    sockets: [%s, \"127.0.0.1:%s\"]\n", script, a, d))
	s.says("show", "pid True", "names show:show", "3 stream True :: AF_INET6", "4 stream True 127.0.0.1 AF_INET", "more 5 5")
	s.until("the other port is given back", func() error {
		if open("127.0.0.1:" + b) {
			return errors.New("it is open")
		}
		return nil
	})
	if !open("127.0.0.1:"+a) || !open("127.0.0.1:"+d) {
		t.Error("not open")
	}
	if _, err := os.Lstat(sock); !os.IsNotExist(err) {
		t.Errorf("the Unix socket's file is left: %v", err)
	}
	if out := s.must("events", "--json"); !strings.Contains(out, "app.socket") {
		t.Errorf("events: %s", out)
	}

	// Of several instances those that are first wait until the others have
	// given up the address.
	at := s.freePort()
	for _, sockets := range []string{"0.0.0.0:" + at, "127.0.0.1:" + at, "{listen: \"127.0.0.1:" + at + "\", reuseport: true}", "127.0.0.1:" + at} {
		file, err := s.h.Write("three.yaml", fmt.Sprintf("apps:\n  three:\n    run: sleep 1000\n    instances: 3\n    sockets: %s\n", sockets))
		if err != nil {
			t.Fatal(err)
		}
		s.must("up", "-f", file)
		if out := s.must("events"); strings.Contains(out, "start-failed") {
			t.Errorf("with %s: %s", sockets, out)
		}
	}
	s.must("delete", "three")

	// Another user's program: its socket's file is its own, and it need not be
	// able to reach the program remuda.
	if os.Getuid() == 0 {
		dir := filepath.Join(s.h.Dir, "run")
		if err := errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, 65534, 65534)); err != nil {
			t.Fatal(err)
		}
		sock := filepath.Join(dir, "n.sock")
		file, err := s.h.Write("nobody.yaml", fmt.Sprintf("apps:\n  nobody: {run: /usr/bin/python3 %s, user: nobody, sockets: [%s, \"127.0.0.1:%s\"]}\n", script, sock, s.freePort()))
		if err != nil {
			t.Fatal(err)
		}
		s.must("up", "-f", file)
		s.says("nobody", "pid True", "names nobody:nobody", "3 stream True "+sock+" AF_UNIX", "4 stream True 127.0.0.1 AF_INET")
		var st syscall.Stat_t
		if err := syscall.Stat(sock, &st); err != nil || st.Uid != 65534 {
			t.Errorf("%+v, %v", st, err)
		}
		s.must("delete", "nobody")
		if _, err := os.Lstat(sock); !os.IsNotExist(err) {
			t.Errorf("the Unix socket's file is left: %v", err)
		}
	}

	// What cannot be had is said.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, c := range map[string]struct{ yaml, want string }{
		"taken": {fmt.Sprintf("{run: sleep 9, sockets: [\"%s\"], restart: never}", l.Addr()), "cannot listen at " + l.Addr().String() + ": address already in use"},
		"no interpreter": {fmt.Sprintf("{run: %s, sockets: [\"127.0.0.1:%s\"], restart: never}",
			s.file("odd.sh", "#!/nosuch/interpreter\n"), s.freePort()), "it, or the interpreter its first line names, is not there"},
	} {
		file, err := s.h.Write("bad.yaml", "apps:\n  bad: "+c.yaml+"\n")
		if err != nil {
			t.Fatal(err)
		}
		if r := s.h.Run(s.ctx, "up", "-f", file); !strings.Contains(r.Stdout+r.Stderr, c.want) || r.Code == 0 {
			t.Errorf("%s: %v", name, r)
		}
		s.h.Run(s.ctx, "delete", "bad")
	}
}

// says waits until the last lines of an app's output are these.
func (s *site) says(app string, lines ...string) {
	s.Helper()
	want := strings.Join(lines, "\n")
	s.until("the program's words", func() error {
		got, err := os.ReadFile(filepath.Join(s.h.Home, "logs", app+"-out.log"))
		if err == nil && !strings.HasSuffix(strings.TrimSpace(string(got)), want) {
			err = fmt.Errorf("got %s\nwant %s", got, want)
		}
		return err
	})
}

func (s *site) file(name, content string) string {
	s.Helper()
	p, err := s.h.Write(name, content)
	if err != nil {
		s.Fatal(err)
	}
	return p
}
