// Package watch tells when files below some folders change, for restarts on
// change: recursive, with globs that ignore, and one call for a burst.
//
// Invariant: an ignored folder is never descended into nor watched, so what
// node_modules holds costs nothing; a folder that appears is watched before
// its content is listed, so no file in it is missed.
//
// It must never import another package of Remuda or decide what a change
// means.
package watch

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/bmatcuk/doublestar/v4"
	"github.com/fsnotify/fsnotify"
)

const (
	defaultDebounce = 200 * time.Millisecond
	// maxPaths bounds the list of one call: it is there to be shown.
	maxPaths = 64
)

// ErrLimit says that the kernel's limit of inotify watches or instances is
// reached. The error that wraps it names the setting to raise.
var ErrLimit = errors.New("inotify limit reached")

// Options says what to watch and whom to tell.
type Options struct {
	// Paths are folders (watched with all below) and files. Each must exist;
	// one that is deleted and made again later is picked up again. Symbolic
	// links below a folder are not followed.
	Paths []string
	// Ignore are doublestar globs. One without a slash is compared with the
	// name of each file and folder below a path, at any depth ("*.log",
	// "node_modules"); one with a slash with the path relative to Base
	// ("public/**", "./tmp"), one that begins with a slash with the absolute
	// path. A folder that matches is ignored with all below. A path that is
	// itself in Paths is never ignored.
	//
	// Names that begin with a dot (.git, .env, editors' swap files) and
	// node_modules are ignored besides, as PM2 does, unless they are in
	// Paths or NoDefaults is set.
	Ignore []string
	// NoDefaults leaves it to Ignore alone.
	NoDefaults bool
	// Base is what Ignore is relative to; default the working folder.
	Base string
	// Debounce is how long it must be quiet before OnChange is called;
	// default 200 ms. A burst that does not end is told after ten times that
	// (one second at least).
	Debounce time.Duration
	// OnChange is given the paths that changed, absolute, sorted, at most 64
	// of them. A change of mode or times alone does not count. It is called
	// from the watcher's goroutine, one call after the other, and must not
	// call Close.
	OnChange func(paths []string)
	// OnError is told what went wrong later on, such as a new folder that
	// cannot be watched; watching goes on. Same rules. Nil: not told.
	OnError func(error)
}

// Watcher watches until it is closed. It holds one inotify instance (the
// kernel allows a user 128 by default), two goroutines and about 70 KB.
type Watcher struct {
	opt   Options
	roots []string
	globs []glob
	fs    *fsnotify.Watcher
	add   func(string) error // fs.Add, but for tests of the limit
	dirs  map[string]struct{}
	stop  chan struct{}
	done  chan struct{}
	once  sync.Once

	pending map[string]struct{}
	limited bool // the limit was told
}

// glob is one pattern of Options.Ignore.
type glob struct {
	pattern string
	kind    globKind
}

type globKind int

const (
	byName globKind = iota
	byRelative
	byAbsolute
)

// New begins to watch. The caller must Close the watcher. A file changed after
// New has returned is told.
func New(opt Options) (*Watcher, error) {
	w, err := prepare(opt)
	if err != nil {
		return nil, err
	}
	if w.fs, err = fsnotify.NewWatcher(); err != nil {
		return nil, fmt.Errorf("watch files: %w", explain(err, 0))
	}
	w.add = w.fs.Add
	if err := w.begin(); err != nil {
		_ = w.fs.Close()
		return nil, err
	}
	go w.run()
	return w, nil
}

// prepare checks the options; it touches no file.
func prepare(opt Options) (*Watcher, error) {
	if len(opt.Paths) == 0 {
		return nil, errors.New("watch files: no path given")
	}
	if opt.Debounce <= 0 {
		opt.Debounce = defaultDebounce
	}
	base, err := filepath.Abs(opt.Base)
	if err != nil {
		return nil, fmt.Errorf("watch files: %w", err)
	}
	opt.Base = base
	w := &Watcher{
		opt: opt, dirs: make(map[string]struct{}), stop: make(chan struct{}), done: make(chan struct{}),
		pending: make(map[string]struct{}),
	}
	for _, p := range opt.Paths {
		if p == "" {
			return nil, errors.New("watch files: empty path")
		}
		if p, err = filepath.Abs(p); err != nil {
			return nil, fmt.Errorf("watch files: %w", err)
		}
		if !slices.Contains(w.roots, p) {
			w.roots = append(w.roots, p)
		}
	}
	for _, pattern := range opt.Ignore {
		g, err := newGlob(pattern)
		if err != nil {
			return nil, err
		}
		w.globs = append(w.globs, g)
	}
	return w, nil
}

func newGlob(pattern string) (glob, error) {
	p := strings.TrimPrefix(pattern, "./")
	if len(p) > 1 {
		p = strings.TrimSuffix(p, "/")
	}
	switch {
	case p == "":
		return glob{}, errors.New("watch files: empty ignore pattern")
	case p[0] == '!':
		return glob{}, fmt.Errorf("watch files: ignore pattern %q: a pattern cannot be negated", pattern)
	case !doublestar.ValidatePattern(p):
		return glob{}, fmt.Errorf("watch files: ignore pattern %q: %w", pattern, doublestar.ErrBadPattern)
	case p[0] == '/':
		return glob{p, byAbsolute}, nil
	case strings.Contains(p, "/"):
		return glob{p, byRelative}, nil
	}
	return glob{p, byName}, nil
}

// Close stops watching and waits for the watcher's goroutines. OnChange is not
// called any more, nor for what is pending. It must not be called from a
// callback.
func (w *Watcher) Close() {
	w.once.Do(func() { close(w.stop) })
	<-w.done
}

// begin places the first watches.
func (w *Watcher) begin() error {
	for _, root := range w.roots {
		st, err := os.Stat(root)
		if err != nil {
			return fmt.Errorf("watch files: %w", err)
		}
		// The folder above shows when the path itself is replaced: by an
		// editor that writes a new file and renames it, or by a build that
		// deletes the folder and makes it anew.
		err = w.add(filepath.Dir(root))
		switch {
		case err == nil:
		case st.IsDir() && !isLimit(err): // it may be unreadable, the root is what counts
		default:
			return fmt.Errorf("watch %s: %w", root, explain(err, len(w.dirs)))
		}
		if !st.IsDir() {
			continue
		}
		if err := w.addTree(root, nil); err != nil {
			return err
		}
		if _, ok := w.dirs[root]; !ok {
			return fmt.Errorf("watch %s: the folder cannot be read or went away", root)
		}
	}
	return nil
}

// addTree watches dir and all below that is not ignored, and calls found with
// each file and folder below it. Only the limit is an error; what went away
// meanwhile is not, and what cannot be read is told and left out.
func (w *Watcher) addTree(dir string, found func(string)) error {
	todo := []string{dir}
	for len(todo) > 0 {
		dir := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		// First the watch, then the list: what comes between is seen twice
		// rather than not at all.
		if err := w.add(dir); err != nil {
			switch {
			case isLimit(err):
				return fmt.Errorf("watch %s: %w", dir, explain(err, len(w.dirs)))
			case gone(err):
			default:
				w.tell(fmt.Errorf("watch %s: %w", dir, err))
			}
			continue
		}
		w.dirs[dir] = struct{}{}
		entries, err := os.ReadDir(dir)
		if err != nil && !gone(err) {
			w.tell(fmt.Errorf("watch %s: %w", dir, err))
		}
		for _, e := range entries {
			p := filepath.Join(dir, e.Name())
			if !w.wanted(p) {
				continue
			}
			if found != nil {
				found(p)
			}
			if e.IsDir() {
				todo = append(todo, p)
			}
		}
	}
	return nil
}

func (w *Watcher) run() {
	defer close(w.done)
	defer func() { _ = w.fs.Close() }()
	quiet := time.NewTimer(time.Hour)
	quiet.Stop()
	defer quiet.Stop()
	var since time.Time // of the burst's first change
	longest := max(10*w.opt.Debounce, time.Second)
	for {
		select {
		case <-w.stop:
			return
		case ev := <-w.fs.Events:
			if !w.event(ev) {
				continue
			}
		case err := <-w.fs.Errors:
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				w.tell(fmt.Errorf("watch files: %w", err))
				continue
			}
			w.rescan()
		case <-quiet.C:
			paths := slices.Sorted(maps.Keys(w.pending))
			clear(w.pending)
			since = time.Time{}
			if w.opt.OnChange != nil {
				w.opt.OnChange(paths)
			}
			continue
		}
		now := time.Now()
		if since.IsZero() {
			since = now
		}
		quiet.Reset(max(0, min(w.opt.Debounce, since.Add(longest).Sub(now))))
	}
}

// event takes one event and reports whether it is a change.
func (w *Watcher) event(ev fsnotify.Event) bool {
	if ev.Name == "" || ev.Op&^fsnotify.Chmod == 0 {
		return false
	}
	p := filepath.Clean(ev.Name) // below "/" it comes with two slashes
	if ev.Op.Has(fsnotify.Remove) || ev.Op.Has(fsnotify.Rename) {
		w.forget(p)
	}
	if !w.wanted(p) {
		return false
	}
	w.note(p)
	// Whatever the event was, the folder that is there now must be watched.
	if _, ok := w.dirs[p]; !ok && ev.Op&(fsnotify.Create|fsnotify.Remove|fsnotify.Rename) != 0 {
		if w.isDir(p) {
			w.grow(p)
		}
	}
	return true
}

// isDir reports whether p is a folder to be watched: one of Paths may be a
// symbolic link to one, others may not.
func (w *Watcher) isDir(p string) bool {
	stat := os.Lstat
	if slices.Contains(w.roots, p) {
		stat = os.Stat
	}
	st, err := stat(p)
	return err == nil && st.IsDir()
}

func (w *Watcher) grow(dir string) {
	err := w.addTree(dir, w.note)
	if err != nil && !w.limited {
		w.limited = true // once is enough: each new folder would say it again
		w.tell(err)
	}
}

// forget drops the watches of a folder that was deleted or moved, and of all
// below: inotify follows a moved folder, and would go on under the old name.
func (w *Watcher) forget(p string) {
	if _, ok := w.dirs[p]; !ok {
		return
	}
	for dir := range w.dirs {
		if dir == p || within(p, dir) {
			_ = w.fs.Remove(dir) // gone already, mostly
			delete(w.dirs, dir)
		}
	}
	// A parent watched for the sake of one of Paths is not ours to drop.
	for _, root := range w.roots {
		if parent := filepath.Dir(root); parent == p || within(p, parent) {
			_ = w.add(parent)
		}
	}
}

// rescan makes good for events that the kernel dropped.
func (w *Watcher) rescan() {
	for _, root := range w.roots {
		w.note(root)
		if w.isDir(root) {
			w.grow(root)
		}
	}
}

func (w *Watcher) note(p string) {
	if len(w.pending) < maxPaths {
		w.pending[p] = struct{}{}
	}
}

func (w *Watcher) tell(err error) {
	if w.opt.OnError != nil {
		w.opt.OnError(err)
	}
}

// wanted reports whether a change of p counts: it is one of Paths, or below
// one and ignored by nothing on the way.
func (w *Watcher) wanted(p string) bool {
	for _, root := range w.roots {
		if p == root {
			return true
		}
	}
	for _, root := range w.roots {
		if within(root, p) && !w.ignored(root, p) {
			return true
		}
	}
	return false
}

// ignored looks at p and every folder between root and it.
func (w *Watcher) ignored(root, p string) bool {
	start := len(root)
	if root == "/" {
		start = 0
	}
	for start < len(p) {
		end := strings.IndexByte(p[start+1:], '/')
		if end < 0 {
			end = len(p)
		} else {
			end += start + 1
		}
		if w.matches(p[:end], p[start+1:end]) {
			return true
		}
		start = end
	}
	return false
}

// matches compares one path, whose last part is name, with every pattern.
func (w *Watcher) matches(p, name string) bool {
	if !w.opt.NoDefaults && (name[0] == '.' || name == "node_modules") && !slices.Contains(w.roots, p) {
		return true
	}
	for _, g := range w.globs {
		subject := name
		switch g.kind {
		case byAbsolute:
			subject = p
		case byRelative:
			if !within(w.opt.Base, p) {
				continue
			}
			subject = strings.TrimPrefix(p[len(w.opt.Base):], "/")
		}
		if doublestar.MatchUnvalidated(g.pattern, subject) {
			return true
		}
	}
	return false
}

// within reports whether p is below dir. Both are clean and absolute.
func within(dir, p string) bool {
	if dir == "/" {
		return len(p) > 1
	}
	return len(p) > len(dir) && p[len(dir)] == '/' && p[:len(dir)] == dir
}

func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

func isLimit(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// explain says what to do about a limit.
func explain(err error, folders int) error {
	switch {
	case errors.Is(err, syscall.ENOSPC):
		return fmt.Errorf("%w after %d folders: ignore more of them, or raise it: sysctl fs.inotify.max_user_watches=1048576 (%w)",
			ErrLimit, folders, err)
	case errors.Is(err, syscall.EMFILE):
		return fmt.Errorf("%w: too many watchers of this user: raise it: sysctl fs.inotify.max_user_instances=1024, or the limit of open files (%w)",
			ErrLimit, err)
	}
	return err
}
