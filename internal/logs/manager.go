package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Manager takes the output of many programs into their logs. Its methods may
// be called from any goroutine.
type Manager struct {
	o       Options
	ep      *os.File // epoll; owned by loop
	epfd    int
	seed    maphash.Seed
	shards  []shard
	wg      sync.WaitGroup
	stop    chan struct{}
	settled atomic.Bool
	down    atomic.Bool
	bufs    sync.Pool
	// relayAfter is the constant, but for tests.
	relayAfter int64

	// mu is taken after a sink's mutex, never before one.
	mu          sync.Mutex
	closed      bool
	caps        map[int32]*Capture
	nextID      int32
	sinks       map[string]*sink
	open        map[*sink]struct{} // log is open
	idle        *time.Timer        // nil: nothing is open
	jobs        []packJob
	compressing bool
	nullFD      int
}

// shard is a queue of captures with something to write. Its goroutine lives
// while the queue is not empty.
type shard struct {
	mu      sync.Mutex
	q       []*Capture
	running bool
}

// New starts a manager. It owns one goroutine and one epoll descriptor until
// Close; writers come and go.
func New(o Options) (*Manager, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Writers <= 0 {
		o.Writers = 4
	}
	if o.IdleClose <= 0 {
		o.IdleClose = 30 * time.Second
	}
	if o.MaxOpen <= 0 {
		o.MaxOpen = 256
		var lim unix.Rlimit
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil && lim.Cur >= 8192 {
			o.MaxOpen = 1024
		}
	}
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot watch pipes: %w", os.NewSyscallError("epoll_create1", err))
	}
	// An epoll descriptor can itself be waited for, so the loop below costs
	// no thread while nothing happens.
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("cannot watch pipes: %w", err)
	}
	m := &Manager{
		o: o, ep: os.NewFile(uintptr(fd), "epoll"), epfd: fd,
		seed: maphash.MakeSeed(), shards: make([]shard, o.Writers), stop: make(chan struct{}),
		relayAfter: relayAfter,
		caps:       map[int32]*Capture{}, sinks: map[string]*sink{}, open: map[*sink]struct{}{}, nullFD: -1,
	}
	m.wg.Add(1)
	go m.loop()
	return m, nil
}

func (m *Manager) now() time.Time { return m.o.Now() }

func (m *Manager) isClosed() bool { return m.down.Load() }

// loop hands captures with something to read to their writers.
func (m *Manager) loop() {
	defer m.wg.Done()
	rc, err := m.ep.SyscallConn()
	if err != nil {
		return
	}
	events := make([]unix.EpollEvent, 64)
	for {
		n := 0
		err := rc.Read(func(fd uintptr) bool {
			n, _ = unix.EpollWait(int(fd), events, 0)
			return n > 0
		})
		if err != nil {
			return // closed
		}
		for _, e := range events[:n] {
			m.mu.Lock()
			c := m.caps[e.Fd]
			m.mu.Unlock()
			if c != nil {
				m.enqueue(c)
			}
		}
	}
}

// enqueue gives c a turn.
func (m *Manager) enqueue(c *Capture) {
	if m.isClosed() {
		return
	}
	h := &m.shards[c.s.shard]
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.queued || m.isClosed() {
		return
	}
	c.queued = true
	h.q = append(h.q, c)
	if !h.running {
		h.running = true
		m.wg.Add(1)
		go m.write(h)
	}
}

func (m *Manager) write(h *shard) {
	defer m.wg.Done()
	for {
		h.mu.Lock()
		if len(h.q) == 0 || m.isClosed() {
			h.q, h.running = nil, false
			h.mu.Unlock()
			return
		}
		c := h.q[0]
		h.q = h.q[1:]
		c.queued = false
		h.mu.Unlock()
		c.handle()
	}
}

// arm has c given a turn when its pipe has something.
func (m *Manager) arm(c *Capture) {
	_ = unix.EpollCtl(m.epfd, unix.EPOLL_CTL_MOD, c.pipe, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: c.id})
}

// forget ends the watching of c's pipe.
func (m *Manager) forget(c *Capture) {
	m.mu.Lock()
	delete(m.caps, c.id)
	m.mu.Unlock()
	if !m.isClosed() {
		// The keeper may hold the pipe open, so closing it would not do.
		_ = unix.EpollCtl(m.epfd, unix.EPOLL_CTL_DEL, c.pipe, nil)
	}
}

func (m *Manager) drop(s *sink) {
	m.mu.Lock()
	if m.sinks[s.path] == s {
		delete(m.sinks, s.path)
	}
	m.mu.Unlock()
}

func (m *Manager) null() (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.nullFD < 0 {
		fd, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: "/dev/null", Err: err}
		}
		m.nullFD = fd
	}
	return m.nullFD, nil
}

// opened notes that a log was opened or closed, and keeps the number of open
// ones in bounds. The caller holds s.mu.
func (m *Manager) opened(s *sink, is bool) {
	m.mu.Lock()
	if !is {
		delete(m.open, s)
		m.mu.Unlock()
		return
	}
	m.open[s] = struct{}{}
	if m.idle == nil && !m.closed {
		m.idle = time.AfterFunc(m.o.IdleClose, m.closeIdle)
	}
	var others []*sink
	if len(m.open) > m.o.MaxOpen {
		for o := range m.open {
			if o != s {
				others = append(others, o)
			}
		}
	}
	m.mu.Unlock()
	// Any eight will do; the oldest of all would need a sorted list.
	closed := 0
	for _, o := range others {
		if closed == 8 {
			break
		}
		if o.mu.TryLock() { // never wait: two sinks could wait for each other
			o.closeAll()
			o.mu.Unlock()
			closed++
		}
	}
}

// closeIdle closes logs that were not written lately, and comes again only if
// some stay open.
func (m *Manager) closeIdle() {
	m.mu.Lock()
	open := make([]*sink, 0, len(m.open))
	for s := range m.open {
		open = append(open, s)
	}
	m.mu.Unlock()
	for _, s := range open {
		if s.mu.TryLock() {
			if time.Since(s.used) >= m.o.IdleClose {
				s.closeAll()
			}
			s.mu.Unlock()
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.idle = nil
	if len(m.open) > 0 && !m.closed {
		m.idle = time.AfterFunc(m.o.IdleClose, m.closeIdle)
	}
}

// checkTarget returns t as it is used: Path is "" where it discards.
func checkTarget(t Target) (Target, error) {
	switch t.Compress {
	case "", CompressNone, CompressGzip, CompressZstd:
	default:
		return t, fmt.Errorf("log compression %q is unknown: use none, gzip or zstd", t.Compress)
	}
	if discards(t.Path) {
		t.Path = ""
		return t, nil
	}
	if !filepath.IsAbs(t.Path) {
		return t, fmt.Errorf("log path %q is relative: give an absolute one", t.Path)
	}
	t.Path = filepath.Clean(t.Path)
	if len(filepath.Base(t.Path)) > 200 {
		return t, fmt.Errorf("log path %q: the file name is longer than 200 bytes, which leaves no room for rotation", t.Path)
	}
	var st unix.Stat_t
	if err := unix.Lstat(t.Path, &st); err == nil {
		kind := ""
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
		case unix.S_IFDIR:
			kind = "a folder"
		case unix.S_IFIFO:
			kind = "a FIFO"
		case unix.S_IFSOCK:
			kind = "a socket"
		case unix.S_IFLNK:
			kind = "a symbolic link"
		default:
			kind = "a device"
		}
		if kind != "" {
			return t, fmt.Errorf("log path %s is %s: name a regular file, or /dev/null to discard", t.Path, kind)
		}
	}
	return t, nil
}

func discards(path string) bool { return path == "" || path == "none" || path == os.DevNull }

// Attach takes what comes out of pipe, the read end of a pipe that one run of
// a program writes to, into t until Finish. The manager owns pipe from then
// on, unless it returns an error: then the caller still does (and may attach
// it with a target that discards). adopted says that an earlier manager had
// this very pipe already and was killed or closed: the run's unfinished last
// line is carried on then, where otherwise a new line is begun.
//
// Errors: a path that is relative, or that is a folder, FIFO, socket, symbolic
// link or device other than /dev/null; an unknown Compress; a pipe that is
// none. A folder or file that cannot be written is no error but a Trouble.
func (m *Manager) Attach(src Source, pipe *os.File, t Target, adopted bool) (*Capture, error) {
	return m.attach(src, pipe, nil, t, adopted)
}

func (m *Manager) attach(src Source, pipe *os.File, y *relay, t Target, adopted bool) (*Capture, error) {
	t, err := checkTarget(t)
	if err != nil {
		return nil, err
	}
	fd, ino, err := dupPipe(pipe)
	if err != nil {
		return nil, fmt.Errorf("output of %s %d: %w", src.App, src.ID, err)
	}
	c := &Capture{m: m, src: src, pipe: fd, pipeIno: ino, relay: y, relayed: y != nil, adopted: adopted, end: -1}
	s, err := m.sinkOf(t, c)
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	// s.mu is held.
	c.s = s
	s.caps = append(s.caps, c)
	if s.t.Path != "" {
		// The line of an earlier run is ended now: after a kill nobody would
		// know that this run had not begun. Several sources go apart now too.
		// And what a killed manager has left half done is done.
		_, log := inode(s.path)
		_, ckpt := inode(s.state(".ckpt"))
		_, cut := inode(s.state(".cut"))
		if log && (!adopted || len(s.caps) > 1) || ckpt || cut {
			if err = s.ready(c); err == nil && s.ck != nil {
				err = s.transform(c, false)
			}
			if err != nil {
				c.fail(err)
			}
		}
	}
	if y != nil && y.pending > 0 && c.tr == nil { // the pipe itself may have nothing to say
		if _, err = s.take(c); err != nil {
			c.fail(err)
		}
	}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		c.relay = nil // on error the caller's
		c.close()
		s.detach(c)
		s.mu.Unlock()
		return nil, errClosed
	}
	for m.nextID++; m.caps[m.nextID] != nil; m.nextID++ {
	}
	c.id = m.nextID
	m.caps[c.id] = c
	m.mu.Unlock()
	events := uint32(unix.EPOLLIN | unix.EPOLLONESHOT)
	if c.tr != nil {
		events = unix.EPOLLONESHOT // its timer gives it turns
	}
	if err := unix.EpollCtl(m.epfd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: c.id}); err != nil {
		m.forget(c)
		c.relay = nil
		c.close()
		s.detach(c)
		s.mu.Unlock()
		return nil, fmt.Errorf("output of %s %d: %w", src.App, src.ID, os.NewSyscallError("epoll_ctl", err))
	}
	c.unlock()
	pipe.Close()
	return c, nil
}

// dupPipe takes a descriptor of our own, which the runtime does not watch.
func dupPipe(pipe *os.File) (fd int, ino uint64, err error) {
	rc, err := pipe.SyscallConn()
	if err != nil {
		return -1, 0, err
	}
	cerr := rc.Control(func(p uintptr) {
		var st unix.Stat_t
		if err = unix.Fstat(int(p), &st); err != nil {
			return
		}
		if st.Mode&unix.S_IFMT != unix.S_IFIFO {
			err = errors.New("not a pipe")
			return
		}
		ino = st.Ino
		fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0)
	})
	if cerr != nil {
		err = cerr
	}
	return fd, ino, err
}

// sinkOf returns the sink of t, locked.
func (m *Manager) sinkOf(t Target, c *Capture) (*sink, error) {
	key := t.Path
	for {
		m.mu.Lock()
		if m.closed {
			m.mu.Unlock()
			return nil, errClosed
		}
		var s *sink
		if key != "" {
			s = m.sinks[key]
		}
		if s == nil {
			s = &sink{m: m, path: t.Path, t: t, fd: -1, idx: indexWriter{fd: -1}}
			if key != "" {
				s.names = namesOf(t.Path)
				s.shard = int(maphash.String(m.seed, key) % uint64(len(m.shards)))
				m.sinks[key] = s
			} else {
				s.shard = int(c.pipeIno % uint64(len(m.shards)))
			}
		}
		m.mu.Unlock()
		s.mu.Lock()
		if !s.dead {
			s.t.Shared = s.t.Shared || t.Shared
			return s, nil
		}
		s.mu.Unlock()
	}
}

// Settle says that every pipe that survived an earlier manager has been
// attached. What that manager had taken of pipes that nobody attached (as when
// the whole machine was restarted) is then written into its log, as of an
// ended run, when that log is used next.
func (m *Manager) Settle() { m.settled.Store(true) }

func (m *Manager) named(paths []string) []*sink {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []*sink
	if len(paths) == 0 {
		for _, s := range m.sinks {
			out = append(out, s)
		}
	}
	for _, p := range paths {
		if s := m.sinks[filepath.Clean(p)]; s != nil {
			out = append(out, s)
		}
	}
	return out
}

// Reopen closes the log files with these paths (none: all), so that the next
// output opens them anew, as after they were renamed by another program.
func (m *Manager) Reopen(paths ...string) {
	for _, s := range m.named(paths) {
		s.mu.Lock()
		s.closeAll()
		s.mu.Unlock()
	}
}

// Flush empties the logs with these paths and removes their rotated files,
// whether something is attached to them or not.
func (m *Manager) Flush(paths ...string) error {
	var errs []error
	for _, p := range paths {
		if discards(p) {
			continue
		}
		p = filepath.Clean(p)
		if !filepath.IsAbs(p) {
			errs = append(errs, fmt.Errorf("log path %q is relative: give an absolute one", p))
			continue
		}
		if live := m.named([]string{p}); len(live) > 0 {
			live[0].mu.Lock()
			if !live[0].dead {
				errs = append(errs, live[0].flush())
				live[0].mu.Unlock()
				continue
			}
			live[0].mu.Unlock()
		}
		errs = append(errs, namesOf(p).flush())
	}
	return errors.Join(errs...)
}

func (n names) flush() error {
	list, err := n.list()
	if err != nil {
		return err
	}
	for _, r := range list {
		n.remove(r)
	}
	_ = os.Remove(n.state(".idx"))
	if err := os.Truncate(filepath.Join(n.dir, n.base), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (s *sink) flush() error {
	if _, ok := inode(s.path); ok {
		if err := s.openLog(); err != nil {
			return err
		}
		if s.ck != nil && s.ck.fd >= 0 {
			if err := s.commit(-1, 0, 0); err != nil {
				return err
			}
		}
		for _, c := range s.caps {
			if s.ck == nil {
				s.pump(c)
			}
			c.start = 0
			if c.tap != nil {
				c.tap.off, c.tap.part = 0, nil
			}
		}
		if err := unix.Ftruncate(s.fd, 0); err != nil {
			return &os.PathError{Op: "truncate", Path: s.path, Err: err}
		}
		s.size, s.born = 0, time.Time{}
	}
	err := s.names.flush()
	s.idx.close()
	if s.fd >= 0 {
		s.idx.open(s.state(".idx"), s.ino, 0)
	}
	return err
}

// Close stops taking output, and closes pipes and files. It takes nothing more
// from the pipes and ends no line: who holds the other read ends can attach
// them to another manager, with adopted set. When ctx ends before the writers
// and background compression do, they are left to end by themselves.
func (m *Manager) Close(ctx context.Context) error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	m.down.Store(true)
	close(m.stop)
	if m.idle != nil {
		m.idle.Stop()
	}
	m.mu.Unlock()
	m.ep.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.wg.Wait()
		m.mu.Lock()
		sinks := make(map[*sink]struct{}, len(m.sinks))
		for _, s := range m.sinks {
			sinks[s] = struct{}{}
		}
		for _, c := range m.caps {
			sinks[c.s] = struct{}{}
		}
		m.mu.Unlock()
		for s := range sinks {
			s.mu.Lock()
			s.closeAll()
			for _, c := range s.caps {
				if c.tr != nil {
					c.tr.timer.Stop()
				}
				c.close()
			}
			s.mu.Unlock()
		}
		m.mu.Lock()
		if m.nullFD >= 0 {
			_ = unix.Close(m.nullFD)
			m.nullFD = -1
		}
		m.mu.Unlock()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// scratch is the memory of one rewriting step.
type scratch struct{ in, out []byte }

func (m *Manager) buffers() *scratch {
	if b, ok := m.bufs.Get().(*scratch); ok {
		return b
	}
	return &scratch{}
}

func (m *Manager) release(b *scratch) {
	if cap(b.in) <= 4*readSize && cap(b.out) <= 2*batch {
		m.bufs.Put(b)
	}
}

// fill reads have bytes from pos on, or less: but at least a whole line, or
// more than MaxLine bytes, where there are that many.
func (b *scratch) fill(fd int, pos, have int64) ([]byte, error) {
	want := min(have, readSize)
	n := 0
	for {
		if int64(cap(b.in)) < want {
			b.in = slices.Grow(b.in[:n], int(want)-n)
		}
		b.in = b.in[:want]
		k, err := preadFull(fd, b.in[n:], pos+int64(n))
		if err != nil {
			return nil, err
		}
		found := bytes.IndexByte(b.in[n:], '\n') >= 0
		n += k
		if found || want == have || want > MaxLine {
			return b.in[:n], nil
		}
		want = min(have, want*4, MaxLine+readSize)
	}
}
