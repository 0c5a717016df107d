package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/internal/fdpass"
	"github.com/remuda-dev/remuda/internal/sockets"
	"github.com/remuda-dev/remuda/proc"
	"github.com/remuda-dev/remuda/supervise"
)

// activation keeps the sockets that are opened for apps (sockets: in
// remuda.yaml) from an app's first start until it is at rest or its spec has
// them no more. The keeper has a copy of each, so that nobody is refused while
// the app or the controller is away. Safe for use by several goroutines.
type activation struct {
	d *Daemon

	mu      sync.Mutex
	settled bool                                // who needs what is known
	open    map[string]map[string]*activeSocket // by app's prefix and key
	freed   chan struct{}                       // closed when one is given back, and made anew
}

// freeWait is how long a start waits for an address that the app's runs of an
// earlier spec still have.
const freeWait = 15 * time.Second

// activeSocket is an open socket of an app. activation.mu guards it.
type activeSocket struct {
	fd    int // not an *os.File: Go's poller would wake up for each connection
	place sockets.Place
	owner *sockets.Owner
}

// activePrefix is how the keeper's names of the sockets of an app begin.
func activePrefix(app string) string { return "so-" + hashed(app) + "-" }

// socketKey tells the sockets of an app apart. What can be changed of an open
// one is not part of it.
func socketKey(s config.Socket, index int) string {
	if s.ReusePort {
		return fmt.Sprintf("%d %s", index, s.Listen)
	}
	return s.Listen
}

// collide reports whether the kernel refuses one of two sockets while the other
// is open, which is not the same one.
func collide(a, b config.Socket) bool {
	if a.Listen == b.Listen {
		return a.ReusePort != b.ReusePort
	}
	network, at, _, err := a.Address()
	other, bt, _, berr := b.Address()
	if err != nil || berr != nil || network != other || at.Port() != bt.Port() || a.ReusePort && b.ReusePort {
		return false
	}
	return at.Addr().IsUnspecified() || bt.Addr().IsUnspecified()
}

// inherit takes the sockets out of what the keeper had stored.
func (a *activation) inherit(stored map[string]*os.File) {
	a.open = map[string]map[string]*activeSocket{}
	n := len(activePrefix(""))
	for name, f := range stored {
		if len(name) <= n || !strings.HasPrefix(name, "so-") {
			continue
		}
		delete(stored, name)
		fd, err := fdpass.DupFile(f)
		f.Close()
		if err != nil {
			a.d.log.Error("a socket of an app cannot be kept", "name", name, "error", err)
			continue
		}
		a.put(name[:n], name[n:], &activeSocket{fd: fd, place: sockets.PlaceOf(fd)})
	}
}

// put needs a.mu, or to be alone.
func (a *activation) put(prefix, key string, s *activeSocket) {
	if a.open[prefix] == nil {
		a.open[prefix] = map[string]*activeSocket{}
	}
	a.open[prefix][key] = s
}

// settle closes the sockets of apps that are no more, or at rest.
func (a *activation) settle(apps map[string]*app) {
	a.mu.Lock()
	a.settled = true
	a.mu.Unlock()
	for name := range apps {
		a.tidy(name)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	there := map[string]bool{}
	for name := range apps {
		there[activePrefix(name)] = true
	}
	for prefix := range a.open {
		if !there[prefix] {
			a.drop(prefix, func(string) bool { return true })
		}
	}
}

// of are copies of the sockets that an instance of the app is given, opened
// where they are not open. The caller owns the files.
func (a *activation) of(i *instance, spec config.App, cred *proc.Credential) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	var owner *sockets.Owner
	if cred != nil {
		owner = &sockets.Owner{UID: int(cred.UID), GID: int(cred.GID)}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	prefix := activePrefix(spec.Name)
	for _, s := range spec.Sockets {
		key := socketKey(s, i.index)
		is := a.open[prefix][key]
		if is != nil && is.place.Lost() {
			// Those that have it finish what is in its queue.
			a.close(prefix, key)
			is = nil
		}
		if is == nil {
			if is, err = a.make(s, owner); err != nil {
				return files, err
			}
			a.put(prefix, key, is)
			if err := a.keep(prefix+key, is.fd); err != nil {
				a.d.log.Warn("a socket will not outlive this controller", "app", spec.Name, "socket", s.Listen, "error", err)
			}
			a.d.event(i, "app.socket", 0, "listens at "+s.Listen)
		} else {
			is.owner = owner
			a.adjust(s, is)
		}
		fd, err := unix.FcntlInt(uintptr(is.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return files, fmt.Errorf("copy socket %s: %w", s.Listen, err)
		}
		files = append(files, os.NewFile(uintptr(fd), s.Name))
	}
	return files, nil
}

func (a *activation) make(s config.Socket, owner *sockets.Owner) (*activeSocket, error) {
	network, addr, path, err := s.Address()
	if err != nil {
		return nil, fmt.Errorf("sockets: %w", err)
	}
	// Blocking, as systemd's are: a program that wants it otherwise says so.
	o := sockets.Spec{Addr: addr, Path: path, Datagram: network == "udp", Backlog: s.Backlog, ReusePort: s.ReusePort, Mode: modeOf(s), Stale: true}
	fd, err := sockets.Open(o, owner)
	if err != nil {
		hint := ""
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			hint = "; `ss -ltnup` and `ss -lx` tell who has it"
		case errors.Is(err, unix.EACCES) && path == "":
			hint = "; ports below 1024 are root's, or need CAP_NET_BIND_SERVICE"
		case errors.Is(err, unix.EACCES), errors.Is(err, unix.ENOENT):
			hint = "; the app's user must be able to make files in its folder"
		case errors.Is(err, unix.EADDRNOTAVAIL):
			hint = "; no interface of this machine has that address"
		}
		return nil, fmt.Errorf("sockets: cannot listen at %s: %w%s", s.Listen, err, hint)
	}
	return &activeSocket{fd: fd, place: sockets.PlaceOf(fd), owner: owner}, nil
}

// adjust brings an open socket in line with its spec.
func (a *activation) adjust(s config.Socket, is *activeSocket) {
	network, _, _, err := s.Address()
	if err != nil {
		return
	}
	if network != "udp" {
		err = sockets.Listen(is.fd, s.Backlog)
	}
	if err == nil {
		err = is.place.Chown(is.owner)
	}
	if mode := modeOf(s); err == nil && mode != 0 {
		err = is.place.Chmod(mode, is.owner)
	}
	if err != nil {
		a.d.log.Warn("a socket cannot be changed", "socket", s.Listen, "error", err)
	}
}

func modeOf(s config.Socket) fs.FileMode {
	m, err := strconv.ParseUint(s.Mode, 8, 9)
	if err != nil {
		return 0 // not given, or refused when the app was
	}
	return fs.FileMode(m)
}

// keep gives the keeper a copy.
func (a *activation) keep(name string, fd int) error {
	second, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(second), name)
	defer f.Close()
	return keeperStore{d: a.d}.Put(name, f)
}

// close closes one for good. a.mu is held.
func (a *activation) close(prefix, key string) {
	s := a.open[prefix][key]
	delete(a.open[prefix], key)
	_ = unix.Close(s.fd)
	s.place.Remove(s.owner)
	_ = keeperStore{a.d, prefix}.Drop(key)
	if a.freed != nil {
		close(a.freed)
		a.freed = nil
	}
}

// next is closed when a socket, of whichever app, is given back from now on.
func (a *activation) next() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.freed == nil {
		a.freed = make(chan struct{})
	}
	return a.freed
}

// outdated reports whether the app has sockets open that spec has no more.
func (a *activation) outdated(spec config.App) bool {
	list := a.d.instancesNamed(spec.Name)
	a.mu.Lock()
	defer a.mu.Unlock()
	old := maps.Clone(a.open[activePrefix(spec.Name)])
	for _, s := range spec.Sockets {
		for _, i := range list {
			delete(old, socketKey(s, i.index))
		}
	}
	return len(old) > 0
}

// whenFree is of, which waits for an address that runs of an earlier spec of
// the app still have.
func (a *activation) whenFree(ctx context.Context, i *instance, spec config.App, cred *proc.Credential) ([]*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, freeWait)
	defer cancel()
	for {
		freed := a.next()
		files, err := a.of(i, spec, cred)
		if !errors.Is(err, unix.EADDRINUSE) {
			return files, err
		}
		select {
		case <-freed: // meanwhile
			continue
		default:
		}
		if !a.outdated(spec) {
			return nil, err
		}
		select {
		case <-freed:
		case <-ctx.Done():
			return nil, err
		}
	}
}

// drop closes those of an app that are useless. a.mu is held.
func (a *activation) drop(prefix string, useless func(key string) bool) (dropped []string) {
	for _, key := range slices.Sorted(maps.Keys(a.open[prefix])) {
		if useless(key) {
			a.close(prefix, key)
			dropped = append(dropped, key)
		}
	}
	if len(a.open[prefix]) == 0 {
		delete(a.open, prefix)
	}
	return dropped
}

// tidy gives the sockets of an app back that none of its instances needs: it
// is at rest, or has another spec by now.
func (a *activation) tidy(name string) {
	if !a.any(name) {
		return
	}
	list := a.d.instancesNamed(name)
	a.mu.Lock()
	defer a.mu.Unlock()
	wanted := map[string]bool{}
	for _, i := range list {
		st, ok := i.sup.Status(i.name)
		i.mu.Lock()
		var specs []config.App
		if ok && !supervise.Ended(st) {
			specs = append(specs, i.spec)
		}
		for _, r := range i.runs {
			specs = append(specs, r.spec)
		}
		if i.candidate != nil {
			specs = append(specs, i.candidate.spec)
		}
		i.mu.Unlock()
		for _, spec := range specs {
			for _, s := range spec.Sockets {
				wanted[socketKey(s, i.index)] = true
			}
		}
	}
	for _, key := range a.drop(activePrefix(name), func(key string) bool { return !wanted[key] }) {
		a.d.bus.publish(client.Event{Type: "app.socket", App: name, ID: -1, Text: "listens no more at " + key})
	}
}

// leave gives the sockets back that an instance which is to stop has alone, so
// that the kernel deals out nothing to it once its program has closed them.
func (a *activation) leave(i *instance, spec config.App, cause string) {
	if cause != "stop" && cause != "scale" && cause != "delete" {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	prefix := activePrefix(spec.Name)
	for _, s := range spec.Sockets {
		if key := socketKey(s, i.index); s.ReusePort && a.open[prefix][key] != nil {
			a.close(prefix, key)
		}
	}
}

// any reports whether an app has sockets that could be given back.
func (a *activation) any(name string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.settled && len(a.open[activePrefix(name)]) > 0
}

// end gives up all: everything, or with keep only this process's part.
func (a *activation) end(keep bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for prefix, m := range a.open {
		for key, s := range m {
			if keep {
				_ = unix.Close(s.fd)
			} else {
				a.close(prefix, key)
			}
		}
		delete(a.open, prefix)
	}
}

// instancesNamed are those of an app, none where there is no such app.
func (d *Daemon) instancesNamed(name string) []*instance {
	d.mu.Lock()
	defer d.mu.Unlock()
	if a := d.apps[name]; a != nil {
		return slices.Clone(a.instances)
	}
	return nil
}

// sockets puts the sockets of the app behind the descriptors that ps has, which
// are 0 to 2. The files are the caller's to close.
func (i *instance) sockets(ctx context.Context, spec config.App, ps *proc.Spec) ([]*os.File, error) {
	i.d.sockets.tidy(i.app) // what is open of an earlier spec may be in the way
	if len(spec.Sockets) == 0 {
		return nil, nil
	}
	files, err := i.d.sockets.whenFree(ctx, i, spec, ps.Credential)
	if err != nil {
		return nil, err
	}
	ps.Files = append(ps.Files, files...)
	return files, nil
}

// announce tells the program of its sockets, when all else of ps is complete.
// The file is the caller's to close.
func announce(spec config.App, ps *proc.Spec) (*os.File, error) {
	if len(spec.Sockets) == 0 {
		return nil, nil
	}
	var names []string
	for _, s := range spec.Sockets {
		names = append(names, s.Name)
	}
	ps.Env = append(ps.Env, "LISTEN_FDS="+strconv.Itoa(len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	// What a start of the program itself would fail with.
	st, err := os.Stat(ps.Path)
	switch {
	case err != nil:
		return nil, &proc.SpawnError{Op: proc.OpExec, Path: ps.Path, Err: errors.Unwrap(err)}
	case st.IsDir():
		return nil, &proc.SpawnError{Op: proc.OpExec, Path: ps.Path, Err: errors.New("it is a folder")}
	case st.Mode().Perm()&0o111 == 0:
		return nil, &proc.SpawnError{Op: proc.OpExec, Path: ps.Path, Err: errors.New("it is not executable; `chmod +x` makes it so")}
	}
	return stage(ps)
}
