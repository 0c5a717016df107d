package logs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// watcher tells which of the followed logs may have changed. It watches their
// folders, so a log that is renamed or does not exist yet is no special case.
type watcher struct {
	f       *os.File // inotify
	dirs    map[int32]string
	streams map[string]*stream // path → stream
	missing map[string]bool    // folders that did not exist
}

const (
	watchFolder = unix.IN_MODIFY | unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_DELETE | unix.IN_ATTRIB | unix.IN_ONLYDIR
	watchParent = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_ONLYDIR | unix.IN_MASK_ADD
)

func newWatcher(streams []*stream) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("cannot follow logs: %w (see fs.inotify.max_user_instances)", os.NewSyscallError("inotify_init1", err))
	}
	w := &watcher{f: os.NewFile(uintptr(fd), "inotify"), dirs: map[int32]string{}, streams: map[string]*stream{}, missing: map[string]bool{}}
	for _, s := range streams {
		w.streams[s.path] = s
		w.missing[s.dir] = true
	}
	if err := w.add(); err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// add watches the folders not yet watched, or the nearest folder above where
// one will appear.
func (w *watcher) add() error {
	rc, err := w.f.SyscallConn()
	if err != nil {
		return err
	}
	var werr error
	err = rc.Control(func(fd uintptr) {
		for dir := range w.missing {
			for at := dir; ; {
				mask := uint32(watchParent)
				if at == dir {
					mask = watchFolder
				}
				wd, err := unix.InotifyAddWatch(int(fd), at, mask)
				if err == nil {
					w.dirs[int32(wd)] = at
					if at == dir {
						delete(w.missing, dir)
					} else if _, err := os.Stat(filepath.Join(at, first(at, dir))); err == nil {
						at = dir // it came meanwhile
						continue
					}
					break
				}
				if at == "/" || !errors.Is(err, unix.ENOENT) {
					werr = fmt.Errorf("cannot follow logs in %s: %w", dir, os.NewSyscallError("inotify_add_watch", err))
					return
				}
				at = filepath.Dir(at)
			}
		}
	})
	if err != nil {
		return err
	}
	return werr
}

// first returns the first element of dir below at.
func first(at, dir string) string {
	rest := strings.TrimPrefix(strings.TrimPrefix(dir, at), "/")
	name, _, _ := strings.Cut(rest, "/")
	return name
}

func (w *watcher) close() { w.f.Close() }

// interrupt ends a wait.
func (w *watcher) interrupt() { _ = w.f.SetReadDeadline(time.Unix(1, 0)) }

// wait returns the logs that may have changed; without block it does not wait.
func (w *watcher) wait(block bool) ([]*stream, error) {
	rc, err := w.f.SyscallConn()
	if err != nil {
		return nil, err
	}
	buf := make([]byte, 16<<10)
	seen := map[*stream]bool{}
	var dirty []*stream
	mark := func(s *stream) {
		if s != nil && !seen[s] {
			seen[s] = true
			dirty = append(dirty, s)
		}
	}
	for {
		n := 0
		var rerr error
		read := func(fd uintptr) bool {
			n, rerr = unix.Read(int(fd), buf)
			return !block || !errors.Is(rerr, unix.EAGAIN)
		}
		if block {
			err = rc.Read(read)
		} else {
			err = rc.Control(func(fd uintptr) { read(fd) })
		}
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return nil, nil
			}
			return nil, fmt.Errorf("cannot follow logs: %w", err)
		}
		if errors.Is(rerr, unix.EINTR) {
			continue
		}
		if errors.Is(rerr, unix.EAGAIN) {
			return dirty, nil
		}
		if rerr != nil {
			return nil, fmt.Errorf("cannot follow logs: %w", os.NewSyscallError("read", rerr))
		}
		block = false
		retry := false
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			wd := int32(binary.NativeEndian.Uint32(b))
			mask := binary.NativeEndian.Uint32(b[4:])
			size := int(binary.NativeEndian.Uint32(b[12:]))
			if len(b) < unix.SizeofInotifyEvent+size {
				break
			}
			name := strings.TrimRight(string(b[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+size]), "\x00")
			b = b[unix.SizeofInotifyEvent+size:]
			dir := w.dirs[wd]
			switch {
			case mask&unix.IN_Q_OVERFLOW != 0:
				for _, s := range w.streams {
					mark(s)
				}
			case mask&unix.IN_IGNORED != 0: // the folder was removed
				delete(w.dirs, wd)
				for _, s := range w.streams {
					if s.dir == dir {
						w.missing[dir], retry = true, true
						mark(s)
					}
				}
			default:
				mark(w.streams[filepath.Join(dir, name)])
				retry = retry || len(w.missing) > 0 && mask&unix.IN_ISDIR != 0
			}
		}
		if retry {
			if err := w.add(); err != nil {
				return nil, err
			}
			for _, s := range w.streams {
				mark(s)
			}
		}
	}
}
