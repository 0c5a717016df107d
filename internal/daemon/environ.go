package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/proc"
)

// inherited are the variables an app with InheritEnv gets from the daemon.
func inherited(name string) bool {
	switch name {
	case "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR":
		return true
	}
	return strings.HasPrefix(name, "LC_")
}

// environment is the whole environment of a run but for its IPC channel.
func (i *instance) environment(spec config.App, cred *proc.Credential) []string {
	env := map[string]string{}
	if spec.InheritEnv {
		for _, kv := range os.Environ() {
			if k, v, ok := strings.Cut(kv, "="); ok && inherited(k) {
				env[k] = v
			}
		}
	}
	if cred != nil {
		if u, err := user.LookupId(strconv.Itoa(int(cred.UID))); err == nil {
			env["HOME"], env["USER"], env["LOGNAME"] = u.HomeDir, u.Username, u.Username
		}
	}
	maps.Copy(env, spec.Env)
	if spec.IncrementVar != "" {
		if n, err := strconv.Atoi(env[spec.IncrementVar]); err == nil {
			env[spec.IncrementVar] = strconv.Itoa(n + i.index)
		}
	}
	if spec.InstanceVar != "" {
		env[spec.InstanceVar] = strconv.Itoa(i.index)
	}
	env["pm_id"] = strconv.Itoa(i.id)
	env["REMUDA_APP"], env["REMUDA_ID"], env["REMUDA_INSTANCE"] = spec.Name, strconv.Itoa(i.id), strconv.Itoa(i.index)
	env["PWD"] = spec.Cwd
	delete(env, "NODE_CHANNEL_FD") // of whoever ran the command line
	delete(env, "NODE_CHANNEL_SERIALIZATION_MODE")
	delete(env, "NODE_UNIQUE_ID")
	delete(env, "LISTEN_FDS")
	delete(env, "LISTEN_PID")
	delete(env, "LISTEN_FDNAMES")
	delete(env, "NOTIFY_SOCKET")
	if spec.Ready.Type == "notify" {
		env["NOTIFY_SOCKET"] = i.d.notifyPath
	}
	out := make([]string, 0, len(env)+3)
	for _, k := range slices.Sorted(maps.Keys(env)) {
		out = append(out, k+"="+env[k])
	}
	return out
}

// lookPath finds the program as a shell would in the program's own PATH.
func lookPath(name string, env []string, cwd string) (string, error) {
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(cwd, name)
		}
		return name, nil
	}
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v
		}
	}
	for _, dir := range filepath.SplitList(path) {
		if dir == "" {
			dir = "."
		}
		if !filepath.IsAbs(dir) {
			dir = filepath.Join(cwd, dir)
		}
		full := filepath.Join(dir, name)
		if st, err := os.Stat(full); err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o111 != 0 {
			return full, nil
		}
	}
	return "", fmt.Errorf("%q is not in the app's PATH (%s): install it, or give its full path", name, path)
}

// credential is the user an app runs as, nil for the daemon's own.
func credential(spec config.App) (*proc.Credential, error) {
	if spec.User == "" && spec.Group == "" {
		return nil, nil
	}
	c := &proc.Credential{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
	if spec.User != "" {
		u, err := user.Lookup(spec.User)
		if err != nil {
			if _, nerr := strconv.ParseUint(spec.User, 10, 32); nerr != nil {
				return nil, fmt.Errorf("unknown user %q: see `getent passwd`", spec.User)
			}
			// A number without an entry is good enough for a container.
			u = &user.User{Uid: spec.User, Gid: spec.User}
			if known, err := user.LookupId(spec.User); err == nil {
				u = known
			}
		}
		if c.UID, c.GID, err = ids(u.Uid, u.Gid); err != nil {
			return nil, err
		}
		if groups, err := u.GroupIds(); err == nil {
			for _, g := range groups {
				if n, err := strconv.ParseUint(g, 10, 32); err == nil {
					c.Groups = append(c.Groups, uint32(n))
				}
			}
		}
	}
	if spec.Group != "" {
		gid := spec.Group
		if g, err := user.LookupGroup(spec.Group); err == nil {
			gid = g.Gid
		} else if _, nerr := strconv.ParseUint(gid, 10, 32); nerr != nil {
			return nil, fmt.Errorf("unknown group %q: see `getent group`", spec.Group)
		}
		n, err := strconv.ParseUint(gid, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("group %q: %w", spec.Group, err)
		}
		c.GID = uint32(n)
	}
	if os.Geteuid() == int(c.UID) && os.Getegid() == int(c.GID) {
		return nil, nil
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("cannot run as user %q, group %q: only root's daemon may change users", spec.User, spec.Group)
	}
	return c, nil
}

func ids(uid, gid string) (uint32, uint32, error) {
	u, err := strconv.ParseUint(uid, 10, 32)
	if err != nil {
		return 0, 0, fmt.Errorf("user id %q: %w", uid, err)
	}
	g, err := strconv.ParseUint(gid, 10, 32)
	if err != nil {
		return 0, 0, fmt.Errorf("group id %q: %w", gid, err)
	}
	return uint32(u), uint32(g), nil
}

func umask(s string) (*int, error) {
	if s == "" {
		return nil, nil
	}
	n, err := strconv.ParseUint(s, 8, 12)
	if err != nil {
		return nil, fmt.Errorf("umask %q is not an octal number", s)
	}
	m := int(n)
	return &m, nil
}

// signalNow takes the signal that was given for the next stop alone.
func (i *instance) signalNow() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	once := i.signalOnce
	i.signalOnce = ""
	return once
}

// stopSignal is what a run is asked to end with: once, unless that is "".
func stopSignal(spec config.App, once string) syscall.Signal {
	if once == "" {
		once = spec.Stop.Signal
	}
	if sig, err := parseSignal(once); err == nil {
		return sig
	}
	return syscall.SIGTERM
}

// parseSignal reads SIGUSR2, usr2 or 12.
func parseSignal(s string) (syscall.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > 64 {
			return 0, fmt.Errorf("signal %d is outside 1 … 64", n)
		}
		return syscall.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if sig := unix.SignalNum(name); sig != 0 {
		return sig, nil
	}
	return 0, fmt.Errorf("unknown signal %.40q: see `kill -l`", s)
}

// readEnviron is the environment a process was started with.
func readEnviron(pid int) (map[string]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	env := map[string]string{}
	for kv := range strings.SplitSeq(string(b), "\x00") {
		if k, v, ok := strings.Cut(kv, "="); ok {
			env[k] = v
		}
	}
	return env, nil
}
