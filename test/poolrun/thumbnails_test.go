// Package poolrun drives `remuda pool run` as a user does, with the real program.
//
// It runs examples/thumbnails with a progress bar on a terminal, by workers in
// Node and in Python and by a program for each picture, killed half-way and
// resumed.
package poolrun

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"image/png"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/test/harness"
)

const (
	pictures = 200
	patience = 2 * time.Minute
)

func TestThumbnails(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "examples", "thumbnails")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(harness.Root(), "examples", "thumbnails"))); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "node_modules")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(harness.Root(), "sdk"), filepath.Join(root, "sdk")); err != nil {
		t.Fatal(err)
	}
	bin, err := harness.Build(t.Context(), root, false)
	if err != nil {
		t.Fatal(err)
	}
	command(t, dir, "python3", "generate.py", strconv.Itoa(pictures))
	if err := harness.Eventually(patience, func() error { // the network
		cmd := exec.CommandContext(t.Context(), "npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--cache", filepath.Join(root, "npm"))
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "HOME="+root)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("npm ci: %w\n%s", err, out)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	list, err := filepath.Glob(filepath.Join(dir, "images", "*.png"))
	if err != nil || len(list) != pictures {
		t.Fatalf("%d pictures, %v", len(list), err)
	}
	var names bytes.Buffer
	for _, p := range list {
		fmt.Fprintln(&names, "images/"+filepath.Base(p))
	}
	if err := os.WriteFile(filepath.Join(dir, "names"), names.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name, input string
		args        []string
	}{
		{"node", "tasks.jsonl", []string{"--", "node", "worker.mjs"}},
		{"python", "tasks.jsonl", []string{"--", "python3", "worker.py"}},
		{"exec", "names", []string{"--exec", "--", "python3", "thumb.py", "{}", "thumbs/{/}"}},
	} {
		t.Run(x.name, func(t *testing.T) {
			if err := os.RemoveAll(filepath.Join(dir, "thumbs")); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(filepath.Join(dir, "thumbs"), 0o755); err != nil {
				t.Fatal(err)
			}
			log := filepath.Join(dir, x.name+".log")
			results := filepath.Join(dir, x.name+".results")
			args := append([]string{bin, "pool", "run", "-n", "2", "--joblog", log, "--resume", "--results", results}, x.args...)

			first := start(t, dir, x.input, args)
			if err := harness.Eventually(patience, func() error {
				if n := len(logged(t, log)); n < pictures/2 {
					return fmt.Errorf("%d tasks are logged", n)
				}
				return nil
			}); err != nil {
				t.Fatalf("%v\n%s", err, first.screen.String())
			}
			_ = first.cmd.Process.Kill()
			if err := first.wait(); err == nil {
				t.Fatal("it was done before it was killed")
			}
			before := logged(t, log)
			made := map[string]time.Time{}
			for name := range before {
				made[name] = modified(t, dir, name)
			}

			second := start(t, dir, x.input, args)
			if err := second.wait(); err != nil {
				t.Fatalf("%v\n%s", err, second.screen.String())
			}
			bar := fmt.Sprintf("%d/%d 100%%  [", pictures, pictures)
			if s := second.screen.String(); !strings.Contains(s, bar) || !strings.Contains(s, fmt.Sprintf("%d before", len(before))) {
				t.Errorf("the screen shows %q, want %q", s, bar)
			}
			for name, at := range made {
				if got := modified(t, dir, name); !got.Equal(at) {
					t.Errorf("%s was done and is done again", name)
				}
			}
			if n := len(logged(t, log)); n != pictures {
				t.Errorf("%d tasks are logged", n)
			}
			check(t, dir, results)
			t.Logf("killed when %d were done", len(before))
		})
	}
}

func command(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// running is a program whose standard error is a terminal.
type running struct {
	cmd    *exec.Cmd
	screen bytes.Buffer // what was shown; to be read after wait
	read   chan struct{}
	master *os.File
}

func start(t *testing.T, dir, input string, args []string) *running {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fd := int(master.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 100})
	}
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	in, err := os.Open(filepath.Join(dir, input))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	r := &running{cmd: exec.CommandContext(ctx, args[0], args[1:]...), read: make(chan struct{}), master: master}
	r.cmd.Dir, r.cmd.Stdin, r.cmd.Stderr = dir, in, slave
	r.cmd.Env = append(os.Environ(), "TERM=xterm", "NO_COLOR=1")
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(r.read)
		_, _ = io.Copy(&r.screen, master) // EIO when nobody has the other end any more
	}()
	return r
}

func (r *running) wait() error {
	err := r.cmd.Wait()
	select {
	case <-r.read:
	case <-time.After(patience):
	}
	r.master.Close()
	return err
}

// logged are the pictures whose end is in the job log, with how often.
func logged(t *testing.T, log string) map[string]int {
	t.Helper()
	b, err := os.ReadFile(log)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	done := map[string]int{}
	for line := range strings.Lines(string(b)) {
		var r struct {
			Seq int
			OK  *bool
		}
		if !strings.HasSuffix(line, "\n") || json.Unmarshal([]byte(line), &r) != nil || r.OK == nil {
			continue
		}
		name := fmt.Sprintf("%04d.png", r.Seq)
		if done[name]++; done[name] > 1 || !*r.OK {
			t.Errorf("%s", line)
		}
	}
	return done
}

func modified(t *testing.T, dir, name string) time.Time {
	t.Helper()
	st, err := os.Stat(filepath.Join(dir, "thumbs", name))
	if err != nil {
		t.Fatal(err)
	}
	return st.ModTime()
}

// check looks at the thumbnails, and that there is one result for each, in order.
func check(t *testing.T, dir, results string) {
	t.Helper()
	b, err := os.ReadFile(results)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	if len(lines) != pictures {
		t.Errorf("%d results", len(lines))
	}
	for i, line := range lines {
		name := fmt.Sprintf("thumbs/%04d.png", i+1)
		if !strings.Contains(line, name) {
			t.Errorf("result %d is %s", i+1, line)
		}
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		img, err := png.Decode(f)
		f.Close()
		if err != nil || img.Bounds().Dx() != 64 || img.Bounds().Dy() != 48 {
			t.Errorf("%s: %v", name, err)
		}
	}
}
