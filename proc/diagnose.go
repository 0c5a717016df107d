package proc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// diagnose finds words for the bare errno of a failed start. sure is false
// where it found nothing wrong with what the spec names.
func diagnose(spec *Spec, err error) (serr *SpawnError, sure bool) {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return &SpawnError{Op: OpFork, Path: spec.Path, Err: err}, false
	}
	say := func(op, path, format string, args ...any) (*SpawnError, bool) {
		return &SpawnError{Op: op, Path: path, Err: &Reason{Text: fmt.Sprintf(format, args...), Errno: errno}}, true
	}
	switch errno {
	case unix.EAGAIN:
		return say(OpFork, spec.Path, "no more processes can be created: the limit of the user (ulimit -u), of the container (pids) or of the system is reached")
	case unix.ENOMEM:
		return say(OpFork, spec.Path, "the system is out of memory")
	case unix.EMFILE, unix.ENFILE:
		return say(OpFiles, spec.Path, "too many open files: raise the limit (ulimit -n)")
	case unix.E2BIG:
		return say(OpExec, spec.Path, "arguments and environment together are too large for the kernel")
	}

	dir := spec.Dir
	if dir == "" {
		dir = "/"
	}
	switch st, e := os.Stat(dir); {
	case errors.Is(e, os.ErrNotExist):
		return say(OpChdir, dir, "the working directory (cwd) does not exist")
	case errors.Is(e, unix.ENOTDIR), e == nil && !st.IsDir():
		return say(OpChdir, dir, "the working directory (cwd) is not a directory")
	case e != nil && errors.Is(e, unix.EACCES):
		return say(OpChdir, dir, "the working directory (cwd) cannot be reached: permission denied")
	}
	if c := spec.Credential; c != nil && os.Geteuid() != 0 && !alreadyIs(c) && errno == unix.EPERM {
		return say(OpCredential, spec.Path, "cannot run as uid %d gid %d: only root may change identity, this is uid %d", c.UID, c.GID, os.Geteuid())
	}
	if errno == unix.EACCES {
		if at := barred(dir, spec.Credential); at != "" {
			return say(OpChdir, dir, "the working directory (cwd) cannot be reached by %s: permission denied at %s", who(spec.Credential), quote(at))
		}
	}

	st, e := os.Stat(spec.Path)
	switch {
	case errors.Is(e, os.ErrNotExist):
		if l, le := os.Lstat(spec.Path); le == nil && l.Mode()&os.ModeSymlink != 0 {
			to, _ := os.Readlink(spec.Path)
			return say(OpExec, spec.Path, "no such file: a symbolic link to %s, which does not exist", quote(to))
		}
		return say(OpExec, spec.Path, "no such file")
	case errors.Is(e, unix.ENOTDIR):
		return say(OpExec, spec.Path, "no such file: a part of the path is not a directory")
	case e == nil && st.IsDir():
		return say(OpExec, spec.Path, "is a directory, not a program")
	case e == nil && !st.Mode().IsRegular():
		return say(OpExec, spec.Path, "not a regular file")
	}
	switch errno {
	case unix.EACCES:
		if e == nil && st.Mode()&0o111 == 0 {
			return say(OpExec, spec.Path, "not executable (chmod +x, or name an interpreter)")
		}
		if at := barred(spec.Path, spec.Credential); at != "" {
			return say(OpExec, spec.Path, "not executable by %s: permission denied at %s", who(spec.Credential), quote(at))
		}
		if ip, _ := interpreter(spec.Path); ip != "" {
			if is, ie := os.Stat(ip); ie == nil && (is.IsDir() || is.Mode()&0o111 == 0) {
				return say(OpExec, spec.Path, "bad interpreter %s (#! line): not executable", quote(ip))
			}
		}
		return say(OpExec, spec.Path, "permission denied (is the file system mounted noexec, or does a security policy forbid it?)")
	case unix.ENOENT:
		ip, cr := interpreter(spec.Path)
		switch {
		case cr:
			return say(OpExec, spec.Path, "bad interpreter %q (#! line): the line ends in a carriage return, save the file with Unix line ends", ip)
		case ip != "":
			return say(OpExec, spec.Path, "bad interpreter %s (#! line): no such file", quote(ip))
		}
		return say(OpExec, spec.Path, "the dynamic loader it was built for is not installed (another libc or architecture?)")
	case unix.ENOEXEC:
		return say(OpExec, spec.Path, "not a program this machine can run: neither an executable for it nor a script with a #! line; a script needs one, or an interpreter")
	case unix.ETXTBSY:
		return say(OpExec, spec.Path, "the file is open for writing")
	case unix.ELOOP:
		return say(OpExec, spec.Path, "too many symbolic links, or interpreters (#! lines), one after another")
	case unix.EPERM:
		if spec.Credential != nil {
			return say(OpCredential, spec.Path, "cannot run as %s: not permitted", who(spec.Credential))
		}
	case unix.EINVAL:
		if spec.Credential != nil {
			return say(OpCredential, spec.Path, "cannot run as %s: the id is not valid here (user namespace?)", who(spec.Credential))
		}
	}
	return &SpawnError{Op: OpExec, Path: spec.Path, Err: errno}, false
}

func who(c *Credential) string {
	if c == nil {
		return fmt.Sprintf("uid %d", os.Geteuid())
	}
	return fmt.Sprintf("uid %d", c.UID)
}

// interpreter reads the program of a #! line, "" where there is none; cr says
// that it ends in a carriage return.
func interpreter(path string) (name string, cr bool) {
	var buf [256]byte
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", false
	}
	defer func() { _ = unix.Close(fd) }()
	b, err := readFD(fd, buf[:])
	if err != nil {
		return "", false
	}
	rest, ok := bytes.CutPrefix(b, []byte("#!"))
	if !ok {
		return "", false
	}
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	line = bytes.Trim(line, " \t")
	if i := bytes.IndexAny(line, " \t"); i >= 0 {
		line = line[:i]
	}
	return string(line), bytes.HasSuffix(line, []byte("\r"))
}

// barred returns the first part of the path that the mode bits keep c from
// searching (executing, for the last part), "" where none does. Access lists
// are not looked at: it only serves an error message.
func barred(path string, c *Credential) string {
	uid, gid, groups := uint32(os.Geteuid()), uint32(os.Getegid()), []uint32(nil)
	if c != nil {
		uid, gid, groups = c.UID, c.GID, c.Groups
	} else if gs, err := os.Getgroups(); err == nil {
		for _, g := range gs {
			groups = append(groups, uint32(g))
		}
	}
	if uid == 0 {
		return ""
	}
	at := "/"
	for part := range strings.SplitSeq(filepath.Clean(path), "/") {
		at = filepath.Join(at, part)
		var st unix.Stat_t
		if unix.Stat(at, &st) != nil {
			return ""
		}
		bits := st.Mode & 0o7
		switch {
		case st.Uid == uid:
			bits = st.Mode >> 6 & 0o7
		case st.Gid == gid || slices.Contains(groups, st.Gid):
			bits = st.Mode >> 3 & 0o7
		}
		if bits&1 == 0 {
			return at
		}
	}
	return ""
}
