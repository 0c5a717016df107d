package probe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxOutput is how much of a command's output is kept: its end.
const maxOutput = 512

// outputWait is how long a command's output is waited for after its end: its
// pipe may have been handed to a process that left the group.
const outputWait = 100 * time.Millisecond

// tryExec runs the command once. Whatever it leaves in its process group ends
// with it.
func tryExec(ctx context.Context, command []string, env Env) error {
	begun := time.Now()
	name := command[0]
	path, err := lookPath(name, env)
	if err != nil {
		return fmt.Errorf("exec %s: %w", name, err)
	}
	out := &tail{max: maxOutput}
	cmd := &exec.Cmd{
		Path:      path,
		Args:      command,
		Dir:       env.Dir,
		Env:       env.Environ,
		Stdout:    out,
		Stderr:    out,
		WaitDelay: outputWait,
		SysProcAttr: &syscall.SysProcAttr{
			Setpgid:    true,
			Credential: env.Credential,
			Pdeathsig:  syscall.SIGKILL, // no probe outlives whoever asked
		},
	}
	if cmd.Env == nil {
		cmd.Env = []string{} // nil would be our own environment
	}
	if err := cmd.Start(); err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return fmt.Errorf("exec %s: cannot be started: %w", name, err)
	}
	pid := cmd.Process.Pid
	// Waited for without being reaped, so that the pid, and the group that
	// has its number, are still its own when the group is killed.
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	late := false
	select {
	case <-ended:
	case <-ctx.Done():
		late = true
	}
	_ = unix.Kill(-pid, unix.SIGKILL)
	<-ended
	err = cmd.Wait()
	text := words(out.bytes())
	if text != "" {
		text = ": " + text
	}
	switch {
	case late:
		return fmt.Errorf("exec %s: did not end within %s%s", name, took(begun), text)
	case err == nil || errors.Is(err, exec.ErrWaitDelay):
		return nil
	}
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		return fmt.Errorf("exec %s: %s%s", name, ee.ProcessState, text)
	}
	return fmt.Errorf("exec %s: %w%s", name, err, text)
}

// lookPath finds the command as the program itself would: by PATH of its own
// environment, relative to its own folder.
func lookPath(name string, env Env) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil // relative to Dir, as execve sees it
	}
	path := ""
	for _, kv := range env.Environ {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v // the last one counts, as in os/exec
		}
	}
	if path == "" {
		path = "/usr/local/bin:/usr/bin:/bin"
	}
	for _, dir := range filepath.SplitList(path) {
		if dir == "" {
			dir = "."
		}
		file := filepath.Join(dir, name)
		if !filepath.IsAbs(file) {
			file = filepath.Join(env.Dir, file)
		}
		if st, err := os.Stat(file); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("not found in PATH (%s)", path)
}

// tail keeps the last bytes written to it.
type tail struct {
	max int

	mu  sync.Mutex
	buf []byte
	cut bool
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(p)
	if len(p) > t.max {
		p, t.cut = p[len(p)-t.max:], true
	}
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - t.max; over > 0 {
		t.buf, t.cut = append(t.buf[:0], t.buf[over:]...), true
	}
	return n, nil
}

func (t *tail) bytes() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.cut {
		return append([]byte("…"), t.buf...)
	}
	return t.buf
}
