package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
)

// stateVersion grows when an older daemon could misread a newer file.
const stateVersion = 1

// state is what shall run, and what must be remembered of what ran. What does
// run is never read from here: the keeper and the kernel know that.
type state struct {
	Version int            `json:"version"`
	NextID  int            `json:"next_id"`
	Apps    []appState     `json:"apps"`
	Pools   []poolState    `json:"pools,omitempty"`
	Groups  []config.Group `json:"groups,omitempty"`
}

type appState struct {
	Spec config.App `json:"spec"`
	Gen  int        `json:"gen,omitempty"`
	// LastGen is the highest that a spec of the app had, Next the spec that is
	// being tried and has LastGen, nil where none is. A controller that finds
	// one goes on with it.
	LastGen   int             `json:"last_gen,omitempty"`
	Next      *config.App     `json:"next,omitempty"`
	Instances []instanceState `json:"instances"`
}

type instanceState struct {
	ID       int       `json:"id"`
	Index    int       `json:"index"`
	Run      bool      `json:"run"`             // it shall run
	Alone    bool      `json:"alone,omitempty"` // made as the only one: its log files carry no id
	Created  time.Time `json:"created"`
	Restarts int       `json:"restarts,omitempty"`
	Gen      int       `json:"gen,omitempty"` // of the spec it has
	// How it ended for good, where it did.
	State    client.State `json:"state,omitempty"`
	LastExit *client.Exit `json:"last_exit,omitempty"`
	Reason   string       `json:"reason,omitempty"`
	LastErr  []string     `json:"last_stderr,omitempty"`
}

// store keeps the state file. Concurrent saves share one write. It is safe for
// concurrent use.
type store struct {
	path     string
	snapshot func() state
	frozen   func() bool // from when it is set on nothing is written; nil is never

	mu      sync.Mutex
	running bool          // a writer is at work
	dirty   bool          // … and must do it once more
	next    chan struct{} // closed when the write that takes in everything up to now is done
	err     error         // of the last write
}

func newStore(path string, snapshot func() state, frozen func() bool) *store {
	return &store{path: path, snapshot: snapshot, frozen: frozen, next: make(chan struct{})}
}

// save returns when the state as it is at the call, or later, is on the disk.
func (s *store) save() error {
	<-s.touch()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// failed is why the last write did not succeed, nil where it did.
func (s *store) failed() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// touch has the state written soon, and tells when it was.
func (s *store) touch() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dirty = true
	if !s.running {
		s.running = true
		go s.write()
	}
	return s.next
}

func (s *store) write() {
	s.mu.Lock()
	for s.dirty {
		done := s.next
		s.next = make(chan struct{})
		s.dirty = false
		err := s.err
		s.mu.Unlock()
		st := s.snapshot()
		if s.frozen == nil || !s.frozen() { // asked after the look at the state
			err = writeJSON(s.path, st)
		}
		s.mu.Lock()
		s.err = err
		close(done)
	}
	s.running = false
	s.mu.Unlock()
}

// writeJSON replaces a file so that whoever reads it after a crash or a power
// cut finds the old content or the new, whole. The content before is kept as
// path.bak.
func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	tmp := path + ".tmp"
	if err := writeSynced(tmp, b); err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	// A second copy, against damage from outside; the rename above already
	// stands for durability, so this one needs no fsync.
	bak := path + ".bak"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("cannot write %s: %w", bak, err)
	}
	return os.Rename(tmp, bak)
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		f.Close()
		return err
	}
	if err := f.Sync(); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// errFuture says that a state file was written by a newer Remuda.
var errFuture = errors.New("written by a newer Remuda")

// loadState reads the state file, or its copy where the file is damaged or
// gone; then a warning says so. Neither of the two is an empty state.
func loadState(path string) (st state, warning string, err error) {
	st, err = readState(path)
	switch {
	case err == nil:
		return st, "", nil
	case errors.Is(err, fs.ErrNotExist):
		return loadCopy(path)
	case errors.Is(err, errFuture):
		return state{}, "", fmt.Errorf("%w: run that version, or move the file and %s away (their apps are then forgotten)", err, filepath.Base(path)+".bak")
	}
	copied, cerr := readState(path + ".bak")
	if cerr != nil {
		return state{}, "", fmt.Errorf("%w, nor can its copy (%w): repair it, or move both away (their apps are then forgotten)", err, cerr)
	}
	aside := fmt.Sprintf("%s.damaged-%s", path, time.Now().Format("20060102-150405"))
	if rerr := os.Rename(path, aside); rerr != nil {
		return state{}, "", fmt.Errorf("%w, and it cannot be moved away: %w", err, rerr)
	}
	return copied, fmt.Sprintf("%v: it was moved to %s and the copy used", err, aside), nil
}

// loadCopy is loadState where there is no state file.
func loadCopy(path string) (state, string, error) {
	copied, err := readState(path + ".bak")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return state{Version: stateVersion}, "", nil
	case err != nil:
		return state{}, "", fmt.Errorf("%w: repair it, or move it away (its apps are then forgotten)", err)
	}
	return copied, fmt.Sprintf("the state file %s is gone: its copy was used", path), nil
}

func readState(path string) (state, error) {
	var st state
	b, err := os.ReadFile(path)
	if err != nil {
		return st, err
	}
	var v struct{ Version int }
	if err := json.Unmarshal(b, &v); err != nil {
		return st, fmt.Errorf("the state file %s cannot be read: %w", path, err)
	}
	if v.Version > stateVersion {
		return st, fmt.Errorf("the state file %s has version %d, this Remuda reads up to %d: %w", path, v.Version, stateVersion, errFuture)
	}
	if err := json.Unmarshal(b, &st); err != nil {
		return st, fmt.Errorf("the state file %s cannot be read: %w", path, err)
	}
	if v.Version < 1 {
		return st, fmt.Errorf("the state file %s cannot be read: it has no version", path)
	}
	for n := range st.Apps {
		// Once taken for any program, and of no effect.
		if s := &st.Apps[n].Spec; s.ExecMode == "cluster" && !s.Clustered() {
			s.ExecMode = "fork"
		}
	}
	return st, nil
}
