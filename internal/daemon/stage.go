package daemon

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/proc"
)

// stageWord is the first argument of this program as a stage.
const stageWord = "stage"

// stage has ps go by way of this program, which puts LISTEN_PID into the
// environment: the pid is known in the process only. It is handed over as a
// descriptor, because the app's user need not be able to reach its path, and
// because the file at that path may be another by then. The stage costs the
// start some milliseconds, and only apps with sockets go by it.
func stage(ps *proc.Spec) (*os.File, error) {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, fmt.Errorf("find this program, by which the app is started: %w", err)
	}
	if c := ps.Credential; c != nil {
		if st, err := self.Stat(); err != nil || st.Mode().Perm()&0o001 == 0 {
			self.Close()
			return nil, errors.New("an app with sockets is started by the program remuda, which the app's user must be allowed to execute: chmod o+x it")
		}
	}
	n := strconv.Itoa(len(ps.Files))
	ps.Files = append(ps.Files, self)
	args := ps.Args
	if len(args) == 0 {
		args = []string{ps.Path}
	}
	ps.Args = append([]string{"remuda", stageWord, n, ps.Path}, args...)
	ps.Path = "/proc/self/fd/" + n
	return self, nil
}

// Stage is this program between the fork and the app: where args, those of the
// process, say so, it becomes the app's program and does not return. It must be
// called before anything else is done.
func Stage(args []string) {
	if len(args) < 5 || args[0] != "remuda" || args[1] != stageWord {
		return
	}
	fd, err := strconv.Atoi(args[2])
	if err != nil || fd < 3 {
		return
	}
	unix.CloseOnExec(fd)
	path, argv := args[3], args[4:]
	err = os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	if err == nil {
		err = syscall.Exec(path, argv, os.Environ())
	}
	text := err.Error()
	if errors.Is(err, syscall.ENOENT) {
		text = "it, or the interpreter its first line names, is not there"
	}
	fmt.Fprintf(os.Stderr, "remuda: cannot start %s: %s\n", path, text)
	os.Exit(127) //nolint:revive // as a shell does; nothing is to be cleaned up
}
