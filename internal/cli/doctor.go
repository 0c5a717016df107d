package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
)

// check is one thing doctor has looked at.
type check struct {
	Name   string `json:"name"`
	Status string `json:"status"` // "ok" | "warn" | "fail"
	Text   string `json:"text"`
	Fix    string `json:"fix,omitempty"` // what to do
}

func ok(name, format string, args ...any) check {
	return check{Name: name, Status: "ok", Text: fmt.Sprintf(format, args...)}
}

func warning(name, fix, format string, args ...any) check {
	return check{Name: name, Status: "warn", Text: fmt.Sprintf(format, args...), Fix: fix}
}

func failing(name, fix, format string, args ...any) check {
	return check{Name: name, Status: "fail", Text: fmt.Sprintf(format, args...), Fix: fix}
}

func (c *cli) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "doctor",
		GroupID: groupMachine,
		Short:   "Look for what may go wrong on this machine",
		Long:    "Check the daemon, its folder, the kernel, the limits and the process file of this\nfolder, and say what to do about what is not as it should be. Exits 1 where a\ncheck fails. It changes nothing.",
		Example: `  remuda doctor
  remuda doctor --json | jq '.[] | select(.status != "ok")'`,
		Args: takes(0, 0),
		RunE: c.run(needClient, func(ctx context.Context, _ []string) error {
			checks := c.doctor(ctx)
			failed := false
			for _, k := range checks {
				failed = failed || k.Status == "fail"
			}
			if c.json {
				if err := c.writeJSON(checks); err != nil {
					return err
				}
			} else {
				p := c.paint(c.Stdout)
				for _, k := range checks {
					colour := map[string]string{"ok": "32", "warn": "33", "fail": "1;31"}[k.Status]
					c.printf("%s  %-12s %s\n", p.sgr(colour, fmt.Sprintf("%-4s", k.Status)), k.Name, clean(k.Text, maxMessage))
					if k.Fix != "" {
						c.printf("%18s → %s\n", "", clean(k.Fix, maxMessage))
					}
				}
			}
			if failed {
				return errFailed
			}
			return nil
		}),
	}
}

func (c *cli) doctor(ctx context.Context) []check {
	home := c.client.Home()
	checks := checkHome(home)
	short, cancel := context.WithTimeout(ctx, pulseLimit)
	defer cancel()
	info, err := c.client.Info(short)
	checks = append(checks, checkSocket(home, err), c.checkDaemon(info, err))
	for _, w := range info.Warnings {
		checks = append(checks, warning("daemon", "", "%s", w))
	}
	checks = append(checks,
		checkState(filepath.Join(home, "state.json"), "the daemon begins without apps and keeps the file aside; `remuda resurrect` brings back what was saved"),
		checkState(filepath.Join(home, "dump.json"), "`remuda save` writes it anew"),
		checkKernel(),
		checkCgroup(info.Cgroup, err == nil),
	)
	checks = append(checks, checkLimits()...)
	checks = append(checks, c.checkRuntimes()...)
	return append(checks, c.checkConfig(ctx)...)
}

// Bounds of free space.
const (
	spaceLow  = 100 << 20
	spaceNone = 1 << 20
)

func checkHome(home string) []check {
	const name = "home"
	st, err := os.Stat(home)
	if errors.Is(err, fs.ErrNotExist) {
		dir := home
		for {
			dir = filepath.Dir(dir)
			if parent, err := os.Stat(dir); err == nil {
				if !parent.IsDir() || unix.Access(dir, unix.W_OK|unix.X_OK) != nil {
					return []check{failing(name, "set REMUDA_HOME to a folder that you may write", "%s does not exist and cannot be made in %s", home, dir)}
				}
				return []check{ok(name, "%s does not exist yet; the first start makes it", home)}
			}
			if dir == filepath.Dir(dir) {
				return []check{failing(name, "set REMUDA_HOME to a folder that you may write", "%s does not exist and cannot be made", home)}
			}
		}
	}
	if err != nil {
		return []check{failing(name, "set REMUDA_HOME to a folder that you may use", "%v", err)}
	}
	if !st.IsDir() {
		return []check{failing(name, "move it away, or set REMUDA_HOME", "%s is not a folder", home)}
	}
	var out []check
	if sys, is := st.Sys().(*syscall.Stat_t); is && int(sys.Uid) != os.Geteuid() {
		return []check{failing(name, "set REMUDA_HOME to a folder of your own", "%s belongs to user %d, and you are %d", home, sys.Uid, os.Geteuid())}
	}
	if mode := st.Mode().Perm(); mode&0o077 != 0 {
		out = append(out, warning(name, "chmod 700 "+quote(home), "%s is open to others (mode %04o)", home, mode))
	}
	if err := unix.Access(home, unix.W_OK|unix.X_OK); err != nil {
		return append(out, failing(name, "chmod 700 "+quote(home)+", or remount the file system writable", "%s cannot be written: %v", home, err))
	}
	tmp, err := os.CreateTemp(home, ".doctor-*")
	if err != nil {
		return append(out, failing(name, "make room, or set REMUDA_HOME to another file system", "no file can be made in %s: %v", home, err))
	}
	tmp.Close()
	os.Remove(tmp.Name())
	var fsys unix.Statfs_t
	if unix.Statfs(home, &fsys) == nil {
		free := int64(fsys.Bavail) * fsys.Bsize
		switch {
		case free < spaceNone:
			out = append(out, failing(name, "make room: logs and state cannot be written", "only %s is free in %s", size(free), home))
		case free < spaceLow:
			out = append(out, warning(name, "make room, or let logs rotate sooner (logs.max_size)", "only %s is free in %s", size(free), home))
		case len(out) == 0:
			out = append(out, ok(name, "%s, writable, %s free", home, size(free)))
		}
	}
	return out
}

func checkSocket(home string, answer error) check {
	const name = "socket"
	path := client.SocketPath(home)
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && answer == nil:
		return warning(name, "`remuda kill` and start again, if commands do not reach it", "%s is gone, but a daemon answers", path)
	case errors.Is(err, fs.ErrNotExist):
		return ok(name, "none, as no daemon runs")
	case err != nil:
		return failing(name, "set REMUDA_HOME to a folder that you may use", "%v", err)
	case st.Mode()&fs.ModeSocket == 0:
		return failing(name, "move it away", "%s is not a socket", path)
	case st.Mode().Perm()&0o077 != 0:
		return warning(name, "chmod 600 "+quote(path), "%s is open to others (mode %04o)", path, st.Mode().Perm())
	case errors.Is(answer, client.ErrUnreachable) && !errors.Is(answer, os.ErrPermission) && !headless(answer):
		return warning(name, "nothing: the next start of a daemon replaces it", "%s is left from a daemon that was killed", path)
	}
	return ok(name, "%s", path)
}

func (c *cli) checkDaemon(info client.Info, err error) check {
	const name = "daemon"
	switch {
	case errors.Is(err, os.ErrPermission):
		return failing(name, "set REMUDA_HOME, or become that user", "%v", err)
	case headless(err):
		return failing(name, "", "%v", err)
	case errors.Is(err, client.ErrUnreachable):
		return ok(name, "none runs; the first start launches it")
	case errors.Is(err, context.DeadlineExceeded):
		return failing(name, "", "%s", c.silence(patience))
	case err != nil:
		return failing(name, "see "+filepath.Join(c.client.Home(), "logs", "daemon.log"), "%v", err)
	case info.API != client.API:
		return failing(name, "run `remuda upgrade` with the newer of the two", "it speaks version %d of the API, and this program %d", info.API, client.API)
	case info.Version != c.Version:
		return warning(name, "`remuda upgrade` puts this version in its place; no app is stopped", "it is Remuda %s, and this program %s", dash(info.Version), dash(c.Version))
	}
	return ok(name, "Remuda %s, pid %d, keeper %d, up %s, %d of %s online", dash(info.Version), info.PID, info.KeeperPID, since(info.Started), info.Online, plural(info.Instances, "instance"))
}

func checkState(path, fix string) check {
	name := filepath.Base(path)
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ok(name, "none yet")
	case err != nil:
		return failing(name, "make it readable for you", "%v", err)
	}
	var v struct {
		Version int `json:"version"`
		Apps    []json.RawMessage
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return failing(name, fix, "%s is damaged: %v", path, err)
	}
	return ok(name, "version %d, %s", v.Version, plural(len(v.Apps), "app"))
}

func checkKernel() check {
	const name = "kernel"
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return failing(name, "", "uname: %v", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return failing(name, "use Linux 5.7 or newer, and let seccomp allow pidfd_open", "%s: no pidfd (%v)", release, err)
	}
	unix.Close(fd)
	have := []string{"pidfd"}
	major, minor := kernelVersion(release)
	old := major < 5 || major == 5 && minor < 7
	if !old {
		have = append(have, "clone3 into a cgroup")
	}
	// landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)
	if abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, 1); errno == 0 {
		have = append(have, fmt.Sprintf("landlock %d", abi))
	}
	if old {
		return warning(name, "use Linux 5.7 or newer", "%s: %s", release, strings.Join(have, ", "))
	}
	return ok(name, "%s: %s", release, strings.Join(have, ", "))
}

func kernelVersion(release string) (major, minor int) {
	parts := strings.FieldsFunc(release, func(r rune) bool { return r < '0' || r > '9' })
	if len(parts) > 1 {
		major, _ = strconv.Atoi(parts[0])
		minor, _ = strconv.Atoi(parts[1])
	}
	return major, minor
}

func checkCgroup(daemon string, answered bool) check {
	const (
		name = "cgroup"
		fix  = "run the daemon as root, or as a systemd service with Delegate=yes (`remuda startup`); without, it traces what apps start by other means"
	)
	if answered && daemon != "" {
		if strings.HasPrefix(daemon, "none") {
			return warning(name, fix, "the daemon uses none: %s", strings.TrimPrefix(strings.TrimPrefix(daemon, "none"), ": "))
		}
		return ok(name, "the daemon uses %s", daemon)
	}
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var fsys unix.Statfs_t
		if unix.Statfs(dir, &fsys) != nil || fsys.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		if os.Geteuid() == 0 && unix.Access(dir, unix.W_OK) == nil {
			return ok(name, "v2 at %s", dir)
		}
		return warning(name, fix, "v2 at %s, which you may not write", dir)
	}
	return warning(name, fix, "no cgroup v2 is mounted")
}

// Limits below which a few hundred apps run into trouble.
const (
	watchesLow   = 65536
	watchersLow  = 256
	filesLow     = 4096
	pipeSizeWant = 1 << 20
)

func checkLimits() []check {
	var out []check
	if n, err := kernelNumber("/proc/sys/fs/inotify/max_user_watches"); err == nil {
		m, _ := kernelNumber("/proc/sys/fs/inotify/max_user_instances")
		if n < watchesLow || m < watchersLow/2 {
			out = append(out, warning("inotify", fmt.Sprintf("sysctl fs.inotify.max_user_watches=%d fs.inotify.max_user_instances=%d", 8*watchesLow, 2*watchersLow), "%d watches, %d instances: little for --watch on large folders", n, m))
		} else {
			out = append(out, ok("inotify", "%d watches, %d instances", n, m))
		}
	} else {
		out = append(out, warning("inotify", "--watch will not work", "%v", err))
	}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err == nil {
		if lim.Max < filesLow {
			out = append(out, warning("open files", "raise the hard limit: `ulimit -Hn`, limits.conf, or LimitNOFILE= of the service", "at most %d; an instance takes about four in the daemon", lim.Max))
		} else {
			out = append(out, ok("open files", "at most %d", lim.Max))
		}
	}
	if n, err := kernelNumber("/proc/sys/fs/pipe-max-size"); err == nil {
		if n < pipeSizeWant {
			out = append(out, warning("pipes", fmt.Sprintf("sysctl fs.pipe-max-size=%d", pipeSizeWant), "at most %s a pipe: busy output is read in smaller pieces", size(n)))
		} else {
			out = append(out, ok("pipes", "at most %s each", size(n)))
		}
	}
	return out
}

func kernelNumber(path string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

func (c *cli) checkRuntimes() []check {
	var out []check
	for _, name := range []string{"node", "python3"} {
		if path := lookPath(name, c.getenv("PATH")); path != "" {
			out = append(out, ok(name, "%s", path))
		} else {
			out = append(out, ok(name, "not in PATH; only needed by apps that use it"))
		}
	}
	return out
}

// lookPath is exec.LookPath in a PATH that is not the process's own.
func lookPath(name, path string) string {
	for _, dir := range filepath.SplitList(path) {
		if found, err := exec.LookPath(filepath.Join(dir, name)); dir != "" && err == nil {
			return found
		}
	}
	return ""
}

func (c *cli) checkConfig(ctx context.Context) []check {
	const name = "config"
	dir, err := c.cwd()
	if err != nil {
		return []check{warning(name, "cd to a folder that exists", "%v", err)}
	}
	path, err := config.Find(dir)
	if errors.Is(err, config.ErrNotFound) {
		return []check{ok(name, "no process file in this folder")}
	}
	if err != nil {
		return []check{warning(name, "", "%v", err)}
	}
	file, warnings, err := config.Load(ctx, path, c.loadOptions())
	var out []check
	for _, w := range warnings {
		out = append(out, warning(name, "", "%s", w))
	}
	var bad *config.Error
	if errors.As(err, &bad) {
		for _, p := range bad.Problems {
			out = append(out, failing(name, "", "%s", p))
		}
		return out
	}
	if err != nil {
		return append(out, failing(name, "", "%s: %v", path, err))
	}
	return append(out, ok(name, "%s: %s", path, plural(len(file.Apps), "app")))
}
